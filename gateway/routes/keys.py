"""`/v1/keys`: API keys, made, listed and revoked at run time. The key itself is shown once."""

from __future__ import annotations

import math
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from gateway import clock
from gateway.dependencies import AdminCaller, PartsDep
from gateway.http.request_body import Name, check_name, read_json
from schemas.errors import InvalidRequest
from schemas.keys import ApiKey, Scope

router = APIRouter(tags=["operation"])

LONGEST_S = 10 * 365 * 86_400
LATEST = 2**40
MOST = 1_000_000

Count = Annotated[int, Field(strict=True, le=MOST)]


class NewKey(BaseModel):
    """The body of `POST /v1/keys`."""

    model_config = ConfigDict(extra="forbid")

    name: Name
    owner: Name | None = None
    """Whom its jobs, files, batches and responses belong to; keys of one owner share them. Left out: the name, as an owner
    of its own."""
    scopes: list[Scope] = Field(default=[Scope.INFERENCE, Scope.JOBS], min_length=1)
    max_queued: Annotated[Count, Field(ge=0)] | None = None
    """Jobs that may wait at once; null: no limit of its own."""
    max_running: Annotated[Count, Field(ge=1)] | None = None
    """Jobs that may run at once; null: no limit of its own."""
    expires_in: float | None = Field(default=None, strict=True, gt=0, le=LONGEST_S)
    """Seconds from now; null: never."""
    expires_at: int | None = Field(default=None, strict=True, le=LATEST)
    """Unix seconds, in place of `expires_in`."""

    def end(self, now: float) -> int | None:
        """When it expires. Raises InvalidRequest."""
        if self.expires_in is not None and self.expires_at is not None:
            raise InvalidRequest("say either expires_in or expires_at, not both", param="expires_in")
        if self.expires_at is not None and self.expires_at <= now:
            raise InvalidRequest("expires_at lies in the past", param="expires_at")
        return math.ceil(now + self.expires_in) if self.expires_in is not None else self.expires_at


@router.post("/v1/keys", status_code=201)
async def create_key(request: Request, parts: PartsDep, _: AdminCaller) -> dict[str, Any]:
    """Make a key. `key` and `webhook_secret` are in this answer and in no other."""
    body = await read_json(request, NewKey)
    new = await parts.keys.create(
        check_name(body.name, "a key's name", "name"),
        owner=None if body.owner is None else check_name(body.owner, "an owner", "owner"),
        scopes=body.scopes,
        max_queued=body.max_queued,
        max_running=body.max_running,
        expires_at=body.end(clock.now()),
    )
    return _shape(new.record) | {"key": new.key, "webhook_secret": new.record.webhook_secret}


@router.get("/v1/keys")
async def list_keys(parts: PartsDep, _: AdminCaller) -> dict[str, Any]:
    """Every key that is not revoked, the newest first. The bootstrap key is none of them."""
    return {"object": "list", "data": [_shape(key) for key in await parts.keys.list_active()]}


@router.get("/v1/keys/{key_id}")
async def get_key(key_id: str, parts: PartsDep, _: AdminCaller) -> dict[str, Any]:
    """One key that is not revoked."""
    return _shape(await parts.keys.get_active(key_id))


@router.delete("/v1/keys/{key_id}")
async def revoke_key(key_id: str, parts: PartsDep, _: AdminCaller) -> dict[str, Any]:
    """End a key for good. Every gateway refuses it within milliseconds, at the worst within seconds."""
    key = await parts.keys.revoke(key_id)
    return {"id": key.id, "object": "api_key", "deleted": True}


def _shape(key: ApiKey) -> dict[str, Any]:
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
