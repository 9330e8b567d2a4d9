"""The adapter `service`; `adapter.py` says what it does."""

from workers.backends.service.adapter import ServiceBackend as ServiceBackend
