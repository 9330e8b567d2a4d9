"""The documentation, and in `generator/` what writes its references."""
