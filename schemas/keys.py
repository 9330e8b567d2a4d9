"""API keys: who may do what, and how much of it."""

from __future__ import annotations

from enum import StrEnum

from pydantic import BaseModel, ConfigDict, Field


class Scope(StrEnum):
    """What a key may be used for."""

    INFERENCE = "inference"
    """Inference endpoints and models."""
    JOBS = "jobs"
    """Jobs, files, batches, and requests that are answered later."""
    ADMIN = "admin"
    """Operating: workers, queues, keys, dead letters, aliases, services."""


ALL_SCOPES = frozenset(Scope)


class ApiKey(BaseModel):
    """What is kept of a key: never the key itself."""

    model_config = ConfigDict(frozen=True)

    id: str
    """`key_…`; not secret."""
    hash: str
    """SHA-256 of the key, in hex. A key holds 256 random bits, so that no slow hash is needed."""
    hint: str = ""
    """Its last four characters, to tell keys apart."""
    name: str
    owner: str
    """Jobs, files, batches and responses belong to owners; keys of one owner share them."""
    scopes: frozenset[Scope] = ALL_SCOPES
    max_queued: int | None = Field(default=None, ge=0)
    """Jobs that may wait at once; None: no limit of its own."""
    max_running: int | None = Field(default=None, ge=1)
    """Jobs that may run at once; None: no limit of its own."""
    created_at: int
    """Unix seconds."""
    expires_at: int | None = None
    """Unix seconds; None: never."""
    revoked_at: int | None = None
    """Unix seconds; None: it is not. A revoked key is kept for a while, so that no cache brings it back."""
    webhook_secret: str = ""
    """`whsec_` and base64: what its jobs' webhooks are signed with."""
