"""The console's files, which `/ui` serves: `console/` at the top level is built into the folder `app`."""
