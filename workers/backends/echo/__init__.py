"""The adapter `echo`; `adapter.py` says what it does."""

from workers.backends.echo.adapter import EchoBackend as EchoBackend
