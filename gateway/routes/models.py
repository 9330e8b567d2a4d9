"""`GET /v1/models` and `GET /v1/models/{id}`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from gateway.dependencies import Caller, PartsDep
from gateway.dialects.anthropic.asgi_app import is_anthropic
from gateway.dialects.anthropic.models import answers_messages, model_info
from gateway.dialects.anthropic.pages import page_of
from gateway.model_catalog import COLD, LOADED, LOADING, CatalogModel

STATES = (LOADED, LOADING, COLD)
"""Model states from best to worst. A model is loaded if any worker has loaded it."""

router = APIRouter(tags=["models"])


def _model_object(model: CatalogModel) -> dict[str, Any]:
    shape: dict[str, Any] = {"id": model.name, "object": "model", "created": model.created, "owned_by": model.owned_by}
    if model.context_length:
        shape["context_length"] = model.context_length
    if model.embedding_length:
        shape["embedding_length"] = model.embedding_length
    if model.voices:
        shape["voices"] = list(model.voices)
    if model.loads:
        states = dict(model.loads)
        shape |= {"state": next(state for state in STATES if state in states.values()), "workers": states}
    if model.alias_for:
        shape |= {"alias_for": list(model.alias_for), "resolves_to": model.resolves_to}
    return shape | {"capabilities": sorted(model.capabilities)}


@router.get("/v1/models")
async def list_models(request: Request, parts: PartsDep, caller: Caller) -> dict[str, Any]:
    """List the live models and the aliases that resolve to them. Anthropic's clients get a page of those that chat, in their form."""
    models = [model for model in parts.dispatcher.list_models() if caller.limits.allows_model(model.name)]
    if is_anthropic(request.scope):
        return page_of([model_info(model) for model in models if answers_messages(model)], request.query_params)
    return {"object": "list", "data": [_model_object(model) for model in models]}


@router.get("/v1/models/{model_id:path}")
async def get_model(model_id: str, request: Request, parts: PartsDep, caller: Caller) -> dict[str, Any]:
    """Return one model or alias. Its id may contain `:` and `/`; an id without a tag means `:latest`."""
    caller.limits.require_model(model_id)
    model = parts.dispatcher.catalog.get(model_id)
    if model is None:
        raise parts.dispatcher.catalog.not_found(model_id)
    return model_info(model) if is_anthropic(request.scope) else _model_object(model)
