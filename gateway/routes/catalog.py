"""`GET /v1/catalog` and `GET /v1/catalog/{id}`: models and aliases with their state and their parameters."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from gateway.dependencies import Caller, PartsDep
from schemas.endpoints import Capability
from schemas.keys import Scope

router = APIRouter(tags=["models"])


@router.get("/v1/catalog")
async def list_catalog(parts: PartsDep, caller: Caller, capability: Capability | None = None) -> dict[str, Any]:
    """List the models and aliases that the caller may use, also those without a live worker."""
    models = [
        model
        for model in parts.dispatcher.catalog.list_all()
        if caller.limits.allows_model(model.name) and (capability is None or capability in model.capabilities)
    ]
    return parts.dispatcher.catalog_entries.listing(models, problems=Scope.ADMIN_READ in caller.scopes)


@router.get("/v1/catalog/{model_id:path}")
async def get_catalog_entry(model_id: str, parts: PartsDep, caller: Caller) -> dict[str, Any]:
    """Return one model or alias with its parameters. Its id may contain `:` and `/`; an id without a tag means `:latest`."""
    caller.limits.require_model(model_id)
    model = parts.dispatcher.catalog.get(model_id)
    if model is None:
        raise parts.dispatcher.catalog.not_found(model_id)
    return parts.dispatcher.catalog_entries.entry(model, problems=Scope.ADMIN_READ in caller.scopes)
