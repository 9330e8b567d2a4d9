"""`/v1/keys`: create, list and revoke API keys. Only the response to the creation contains the key itself."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from gateway import clock
from gateway.dependencies import AdminCaller, PartsDep
from gateway.http.request_body import check_name, read_json
from gateway.operator_requests import NewKey
from schemas.keys import ApiKey

router = APIRouter(tags=["operation"])


@router.post("/v1/keys", status_code=201)
async def create_key(request: Request, parts: PartsDep, _: AdminCaller) -> dict[str, Any]:
    """Create a key. Only this response contains `key` and `webhook_secret`."""
    body = await read_json(request, NewKey)
    new = await parts.keys.create(
        check_name(body.name, "a key's name", "name"),
        owner=None if body.owner is None else check_name(body.owner, "an owner", "owner"),
        scopes=body.scopes,
        max_queued=body.max_queued,
        max_running=body.max_running,
        expires_at=body.end(clock.now()),
    )
    return _key_object(new.record) | {"key": new.key, "webhook_secret": new.record.webhook_secret}


@router.get("/v1/keys")
async def list_keys(parts: PartsDep, _: AdminCaller) -> dict[str, Any]:
    """List all keys that are not revoked, newest first, without the bootstrap key."""
    return {"object": "list", "data": [_key_object(key) for key in await parts.keys.list_active()]}


@router.get("/v1/keys/{key_id}")
async def get_key(key_id: str, parts: PartsDep, _: AdminCaller) -> dict[str, Any]:
    """Return one key that is not revoked."""
    return _key_object(await parts.keys.get_active(key_id))


@router.delete("/v1/keys/{key_id}")
async def revoke_key(key_id: str, parts: PartsDep, _: AdminCaller) -> dict[str, Any]:
    """Revoke a key permanently. All gateways reject it within milliseconds, in the worst case within seconds."""
    key = await parts.keys.revoke(key_id)
    return {"id": key.id, "object": "api_key", "deleted": True}


def _key_object(key: ApiKey) -> dict[str, Any]:
    ended = key.expires_at is not None and key.expires_at <= clock.now()
    return {
        "id": key.id,
        "object": "api_key",
        "name": key.name,
        "owner": key.owner,
        "scopes": sorted(key.scopes),
        "max_queued": key.max_queued,
        "max_running": key.max_running,
        "created_at": key.created_at,
        "expires_at": key.expires_at,
        "status": "expired" if ended else "active",
        "hint": key.hint,
    }
