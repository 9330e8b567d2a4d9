"""`/v1/aliases`: alternative model names that resolve to the first live model among their targets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter, Request

from gateway.audit.route import AuditedRoute
from gateway.dependencies import AdminReader, AuditDep, Operator, Parts, PartsDep
from gateway.http.request_body import check_name, read_json
from gateway.model_catalog import ModelCatalog
from gateway.operator_requests import AliasTargets
from schemas.errors import InvalidRequest, NotFound
from schemas.presence import Alias

router = APIRouter(tags=["operation"], route_class=AuditedRoute)


@router.get("/v1/aliases")
async def list_aliases(parts: PartsDep, _: AdminReader) -> dict[str, Any]:
    """List all aliases, including aliases without a live target."""
    snapshot = parts.dispatcher.registry.snapshot
    aliases = sorted(snapshot.aliases.values(), key=lambda alias: alias.name) if snapshot else []
    return {"object": "list", "data": [_alias_object(alias, parts.dispatcher.catalog) for alias in aliases]}


@router.put("/v1/aliases/{alias:path}")
async def put_alias(alias: str, request: Request, parts: PartsDep, _: Operator, audit: AuditDep) -> dict[str, Any]:
    """Create or replace an alias. `warnings` in the response lists targets that no model has as its name."""
    body = await read_json(request, AliasTargets)
    targets = tuple(dict.fromkeys(check_name(one, "a target", "targets") for one in body.targets))
    new = Alias(
        name=check_name(alias, "an alias", "alias"),
        targets=targets,
        unsupported_parameters=body.unsupported_parameters,
    )
    catalog = parts.dispatcher.catalog
    _check_effective(new, catalog)
    audit.compare(_audited(parts, new.name), new.model_dump(exclude={"name"}))
    await parts.dispatcher.registry.put_alias(new)
    return _alias_object(new, catalog) | {"warnings": list(_warnings(new, catalog))}


@router.delete("/v1/aliases/{alias:path}")
async def remove_alias(alias: str, parts: PartsDep, _: Operator, audit: AuditDep) -> dict[str, Any]:
    """Delete an alias."""
    audit.compare(_audited(parts, alias), None)
    if not await parts.dispatcher.registry.remove_alias(alias):
        raise NotFound(
            f"Alias '{alias[:100]}' does not exist. `GET /v1/aliases` lists all aliases.", code="alias_not_found"
        )
    return {"id": alias, "object": "alias", "deleted": True}


def _audited(parts: Parts, name: str) -> dict[str, Any] | None:
    """Return the present fields of an alias; None: there is none."""
    snapshot = parts.dispatcher.registry.snapshot
    alias = snapshot.aliases.get(name) if snapshot is not None else None
    return alias.model_dump(exclude={"name"}) if alias is not None else None


def _check_effective(alias: Alias, catalog: ModelCatalog) -> None:
    """Check that an alias would have an effect. Raises InvalidRequest."""
    name = alias.name
    if catalog.is_model(name):
        raise InvalidRequest(
            f"'{name}' is the name of a model, and requests for it go to that model. Choose another name.",
            param="alias",
        )
    for target in alias.targets:
        if target == name or catalog.is_alias(target):
            raise InvalidRequest(
                f"Target '{target}' is an alias. Use the names of its models instead.", param="targets"
            )
    if users := catalog.aliases_of(name):
        raise InvalidRequest(
            f"'{name}' is a target of the alias '{users[0]}', so it cannot be an alias itself. Choose another name.",
            param="alias",
        )


def _warnings(alias: Alias, catalog: ModelCatalog) -> Iterator[str]:
    """Yield warnings about unknown targets. They are allowed: an alias may be created before its models are live."""
    for target in alias.targets:
        if not catalog.is_model(target):
            yield f"No worker serves or has served a model '{target}'.{catalog.suggestion(target)}"


def _alias_object(alias: Alias, catalog: ModelCatalog) -> dict[str, Any]:
    return {
        "id": alias.name,
        "object": "alias",
        "targets": list(alias.targets),
        "resolves_to": catalog.resolved_target(alias),
        **({"unsupported_parameters": policy} if (policy := alias.unsupported_parameters) else {}),
    }
