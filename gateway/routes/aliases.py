"""`/v1/aliases`: names that stand for the first of several models that is live. They change at run time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter, Request

from gateway.dependencies import AdminCaller, PartsDep
from gateway.http.request_body import check_name, read_json
from gateway.model_catalog import ModelCatalog
from gateway.operator_requests import Targets
from schemas.errors import InvalidRequest, NotFound
from schemas.presence import Alias

router = APIRouter(tags=["operation"])


@router.get("/v1/aliases")
async def list_aliases(parts: PartsDep, _: AdminCaller) -> dict[str, Any]:
    """Every alias, also those that resolve to nothing now."""
    snapshot = parts.dispatcher.registry.snapshot
    aliases = sorted(snapshot.aliases.values(), key=lambda alias: alias.name) if snapshot else []
    return {"object": "list", "data": [_shape(alias, parts.dispatcher.catalog) for alias in aliases]}


@router.put("/v1/aliases/{alias:path}")
async def put_alias(alias: str, request: Request, parts: PartsDep, _: AdminCaller) -> dict[str, Any]:
    """Enter an alias, or replace the one of that name. Body: `{"targets": ["first", "else this", …]}`. `warnings` of the answer names
    targets that no model has for a name.
    """
    body = await read_json(request, Targets)
    targets = tuple(dict.fromkeys(check_name(one, "a target", "targets") for one in body.targets))
    wanted = Alias(
        name=check_name(alias, "an alias", "alias"),
        targets=targets,
        unsupported_parameters=body.unsupported_parameters,
    )
    catalog = parts.dispatcher.catalog
    _refuse_useless(wanted, catalog)
    await parts.dispatcher.registry.put_alias(wanted)
    return _shape(wanted, catalog) | {"warnings": list(_doubts(wanted, catalog))}


@router.delete("/v1/aliases/{alias:path}")
async def remove_alias(alias: str, parts: PartsDep, _: AdminCaller) -> dict[str, Any]:
    """Remove an alias."""
    if not await parts.dispatcher.registry.remove_alias(alias):
        raise NotFound(f"there is no alias '{alias[:100]}'; GET /v1/aliases lists them", code="alias_not_found")
    return {"id": alias, "object": "alias", "deleted": True}


def _refuse_useless(alias: Alias, catalog: ModelCatalog) -> None:
    """What would be without effect is an error. Raises InvalidRequest."""
    name = alias.name
    if catalog.is_model(name):
        raise InvalidRequest(
            f"'{name}' is a model that is or was served here: its requests go to it, never to an alias", param="alias"
        )
    for target in alias.targets:
        if target == name or catalog.is_alias(target):
            raise InvalidRequest(f"'{target}' is an alias itself; name the models it stands for", param="targets")
    if users := catalog.aliases_of(name):
        raise InvalidRequest(f"'{name}' is a target of the alias '{users[0]}', so it must be a model", param="alias")


def _doubts(alias: Alias, catalog: ModelCatalog) -> Iterator[str]:
    """What may be a mistake: an alias may be entered before its models come, so that nothing of it is refused."""
    for target in alias.targets:
        if not catalog.is_model(target):
            yield f"No model called '{target}' is or was served here.{catalog.suggestion(target)}"


def _shape(alias: Alias, catalog: ModelCatalog) -> dict[str, Any]:
    return {
        "id": alias.name,
        "object": "alias",
        "targets": list(alias.targets),
        "resolves_to": catalog.resolved_target(alias),
        **({"unsupported_parameters": policy} if (policy := alias.unsupported_parameters) else {}),
    }
