"""Serve stable-diffusion-webui, Forge and stable-diffusion.cpp: see `adapter`."""

from workers.backends.sdwebui.adapter import SDWebUIBackend as SDWebUIBackend
