"""The adapter `invokeai`; `adapter.py` says what it does."""

from workers.backends.invokeai.adapter import InvokeAIBackend as InvokeAIBackend
