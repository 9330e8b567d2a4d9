"""The adapter `comfyui`; `adapter.py` says what it does."""

from workers.backends.comfyui.adapter import ComfyUIBackend as ComfyUIBackend
