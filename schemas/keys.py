"""Define API keys and their scopes."""

from __future__ import annotations

from enum import StrEnum

from pydantic import BaseModel, ConfigDict, Field


class Scope(StrEnum):
    """What an API key may be used for."""

    INFERENCE = "inference"
    """Inference endpoints and the list of models."""
    JOBS = "jobs"
    """Jobs, files, batches, and requests that are answered later."""
    ADMIN = "admin"
    """Operation: workers, queues, keys, dead letters, aliases, services."""


ALL_SCOPES = frozenset(Scope)


class ApiKey(BaseModel):
    """The record of an API key, without the key itself."""

    model_config = ConfigDict(frozen=True)

    id: str
    """`key_…`; not secret."""
    hash: str
    """SHA-256 of the key, in hex. A key holds 256 random bits, so that a fast hash is safe."""
    hint: str = ""
    """The last four characters of the key, which help to tell keys apart."""
    name: str
    owner: str
    """The owner of jobs, files, batches and responses. Keys of one owner share them."""
    scopes: frozenset[Scope] = ALL_SCOPES
    max_queued: int | None = Field(default=None, ge=0)
    """The maximum number of waiting jobs. None: the key has no limit."""
    max_running: int | None = Field(default=None, ge=1)
    """The maximum number of running jobs. None: the key has no limit."""
    created_at: int
    """Unix seconds."""
    expires_at: int | None = None
    """Unix seconds; None: never."""
    revoked_at: int | None = None
    """Unix seconds. None: the key is valid. The record of a revoked key is kept for a while, so that no cache restores the key."""
    webhook_secret: str = ""
    """`whsec_` and base64: the secret that signs the webhooks of the key's jobs."""
