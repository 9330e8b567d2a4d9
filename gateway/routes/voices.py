"""`GET /v1/audio/voices` and `GET /v1/audio/models`, which chat front ends such as Open WebUI read."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from gateway.dependencies import Caller, PartsDep
from gateway.model_catalog import CatalogModel
from schemas.jobs import Capability

router = APIRouter(tags=["models"])


@router.get("/v1/audio/voices")
async def list_voices(parts: PartsDep, _: Caller) -> dict[str, Any]:
    """List the voices of all live speech models."""
    voices = dict.fromkeys(voice for model in _speech_models(parts) for voice in model.voices)
    return {"voices": [{"id": voice, "name": voice} for voice in voices]}


@router.get("/v1/audio/models")
async def list_speech_models(parts: PartsDep, _: Caller) -> dict[str, Any]:
    """List the live speech models and their aliases, in the forms of OpenAI and Open WebUI."""
    models = [{"id": model.name, "name": model.name, "object": "model"} for model in _speech_models(parts)]
    return {"object": "list", "data": models, "models": models}


def _speech_models(parts: PartsDep) -> list[CatalogModel]:
    return [model for model in parts.dispatcher.catalog.list_usable() if Capability.SPEECH in model.live]
