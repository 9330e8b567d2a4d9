"""`/v1/keys`: create, list, change, rotate and revoke API keys. Only the responses to creation and rotation contain the key itself."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter, Request

from gateway import clock
from gateway.audit.limits import audited_limits
from gateway.audit.route import AuditedRoute
from gateway.auth.authenticator import Principal
from gateway.auth.key_store import IssuedKey, KeyNotFound
from gateway.dependencies import AuditDep, KeyManager, Parts, PartsDep
from gateway.http.request_body import check_name, read_json
from gateway.limits.effective import assigned_budgets
from gateway.operator_requests import KeyUpdate, NewKey, Rotation
from gateway.routes.budgets import budget_objects, check_budgets
from schemas.errors import InvalidRequest, PermissionDenied
from schemas.keys import LIMITS, ApiKey, Scope
from schemas.people import MEMBER_SCOPES

router = APIRouter(tags=["operation"], route_class=AuditedRoute)

MAX_TEAM_KEYS = 100
"""Keys that a team can have for its members to make another one."""


@router.post("/v1/keys", status_code=201)
async def create_key(request: Request, parts: PartsDep, caller: KeyManager, audit: AuditDep) -> dict[str, Any]:
    """Create a key. Only this response contains `key` and `webhook_secret`."""
    body = await read_json(request, NewKey)
    _require_power_over(caller, frozenset(body.scopes))
    check_budgets(parts, body)
    new = await parts.keys.create(
        check_name(body.name, "a key's name", "name"),
        owner=await _owner(parts, caller, body),
        scopes=body.scopes,
        expires_at=body.end(clock.now()),
        person=caller.person,
        **body.limits(),
    )
    audit.target, audit.target_team = new.record.id, new.record.owner
    audit.compare(None, audited_key(new.record))
    return _issued_object(new) | {"webhook_secret": new.record.webhook_secret}


@router.get("/v1/keys")
async def list_keys(parts: PartsDep, caller: KeyManager) -> dict[str, Any]:
    """List all keys that are not revoked, newest first, without the bootstrap key."""
    keys = [key for key in await parts.keys.list_active() if _may_see(caller, key)]
    used = await parts.keys.last_used(keys)
    return {"object": "list", "data": [key_object(key, used.get(key.id)) for key in keys]}


@router.get("/v1/keys/{key_id}")
async def get_key(key_id: str, parts: PartsDep, caller: KeyManager) -> dict[str, Any]:
    """Return one key that is not revoked, and what is left of its budgets."""
    key = await _get(parts, caller, key_id)
    usage = await budget_objects(parts, assigned_budgets("key", key.id, key))
    return await _described(parts, key) | {"budget_usage": usage}


@router.patch("/v1/keys/{key_id}")
async def change_key(
    key_id: str, request: Request, parts: PartsDep, caller: KeyManager, audit: AuditDep
) -> dict[str, Any]:
    """Change a key's name, scopes, end or limits. All gateways apply the change within milliseconds, in the worst case within seconds."""
    body = await read_json(request, KeyUpdate)
    check_budgets(parts, body)
    changes = body.limits()
    if body.name is not None:
        changes["name"] = check_name(body.name, "a key's name", "name")
    if body.scopes is not None:
        changes["scopes"] = frozenset(body.scopes)
        _require_power_over(caller, changes["scopes"])
    if body.sets_end():
        changes["expires_at"] = body.end(clock.now())
    old = await _get(parts, caller, key_id)
    audit.target_team = old.owner
    _require_power_over(caller, old.scopes)
    new = await parts.keys.change(key_id, **changes)
    audit.compare(audited_key(old), audited_key(new))
    return await _described(parts, new)


@router.post("/v1/keys/{key_id}/rotate")
async def rotate_key(
    key_id: str, request: Request, parts: PartsDep, caller: KeyManager, audit: AuditDep
) -> dict[str, Any]:
    """Replace a key by a new one with the same id, limits and webhook secret. Only this response contains the new `key`."""
    body = await read_json(request, Rotation)
    old = await _get(parts, caller, key_id)
    audit.target_team = old.owner
    _require_power_over(caller, old.scopes)
    new = await parts.keys.rotate(key_id, body.overlap_s)
    audit.details["replaced_until"] = new.record.old_hash_until
    return _issued_object(new)


@router.delete("/v1/keys/{key_id}")
async def revoke_key(
    key_id: str, parts: PartsDep, caller: KeyManager, audit: AuditDep, jobs: Literal["keep", "cancel"] = "keep"
) -> dict[str, Any]:
    """Revoke a key permanently, and end its open calls and result URLs. `jobs` says what becomes of its unfinished jobs."""
    old = await _get(parts, caller, key_id)
    audit.target_team = old.owner
    _require_power_over(caller, old.scopes)
    key = await parts.keys.revoke(key_id)
    audit.compare({"revoked_at": None}, {"revoked_at": key.revoked_at})
    answer = {"id": key.id, "object": "api_key", "deleted": True}
    if jobs == "keep":
        return answer
    audit.details["cancelled_jobs"] = None  # known if all of them could be cancelled
    cancelled = audit.details["cancelled_jobs"] = await parts.key_work.cancel(key.owner, key.id)
    return answer | {"cancelled_jobs": cancelled}


def _manages_all(caller: Principal) -> bool:
    return Scope.ADMIN_KEYS in caller.scopes


def _may_see(caller: Principal, key: ApiKey) -> bool:
    return _manages_all(caller) or key.owner == caller.owner


def _require_power_over(caller: Principal, scopes: frozenset[Scope]) -> None:
    """Raise PermissionDenied unless the caller may manage keys with these scopes: members, only those without power."""
    if not _manages_all(caller) and scopes - MEMBER_SCOPES:
        lacking = min(scopes - MEMBER_SCOPES)
        raise PermissionDenied(
            f"Keys that members manage have the scopes {', '.join(sorted(MEMBER_SCOPES))}, not '{lacking}'.",
            param="scopes",
        )
    caller.require_power_over(scopes)


async def _get(parts: Parts, caller: Principal, key_id: str) -> ApiKey:
    """Return a key that the caller may manage. Raises KeyNotFound."""
    key = await parts.keys.get_active(key_id)
    if not _may_see(caller, key):
        raise KeyNotFound(f"There is no API key '{key_id[:100]}'. GET /v1/keys lists all keys.")
    return key


async def _owner(parts: Parts, caller: Principal, body: NewKey) -> str | None:
    """Return the team of a new key; None: a new one. Raises PermissionDenied, InvalidRequest."""
    owner = None if body.owner is None else check_name(body.owner, "an owner", "owner")
    if _manages_all(caller):
        return owner
    if owner not in {None, caller.owner}:
        raise PermissionDenied(f"You can make keys for your team '{caller.owner}' alone.", param="owner")
    if sum(key.owner == caller.owner for key in await parts.keys.list_active()) >= MAX_TEAM_KEYS:
        raise InvalidRequest(
            f"Your team has {MAX_TEAM_KEYS} keys, the most that its members can make. Revoke some first."
        )
    return caller.owner


async def _described(parts: Parts, key: ApiKey) -> dict[str, Any]:
    return key_object(key, (await parts.keys.last_used([key])).get(key.id))


def audited_key(key: ApiKey) -> dict[str, Any]:
    """Return the fields of a key whose changes are recorded. None of them is a secret."""
    return audited_limits(key) | {
        name: getattr(key, name) for name in ("name", "owner", "person", "scopes", "expires_at")
    }


def _issued_object(new: IssuedKey) -> dict[str, Any]:
    return key_object(new.record, None) | {"key": new.key}


def key_object(key: ApiKey, last_used_at: int | None) -> dict[str, Any]:
    """Return the API's object for a key."""
    ended = key.expires_at is not None and key.expires_at <= clock.now()
    return {
        "id": key.id,
        "object": "api_key",
        "name": key.name,
        "owner": key.owner,
        "person": key.person or None,
        "scopes": sorted(key.scopes),
        **{name: getattr(key, name) for name in LIMITS},
        "created_at": key.created_at,
        "expires_at": key.expires_at,
        "last_used_at": last_used_at,
        "replaced_until": key.old_hash_until,
        "status": "expired" if ended else "active",
        "hint": key.hint,
    }
