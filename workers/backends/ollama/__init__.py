"""The adapter `ollama`; `adapter.py` says what it does."""

from workers.backends.ollama.adapter import OllamaBackend as OllamaBackend
