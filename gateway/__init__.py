"""The front door: routes, dispatch, bus, events, bytes."""
