"""Define API keys, their teams, their scopes and their limits."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from pydantic import BaseModel, ConfigDict

from schemas.budgets import Budget
from schemas.inspection import Inspection

LaneName = Literal["priority", "default", "flex"]
"""The value of a `schemas.jobs.Lane`."""
Retain = Literal["none"]
"""What is kept of a team's requests and answers."""


class Scope(StrEnum):
    """What an API key may be used for."""

    INFERENCE = "inference"
    """Inference endpoints and the list of models."""
    JOBS = "jobs"
    """Jobs, files, batches, and requests that are answered later."""
    ADMIN = "admin"
    """All of operation: the three scopes below."""
    ADMIN_READ = "admin:read"
    """Read workers, queues, aliases, services, dead letters and the state of any team's jobs."""
    ADMIN_OPERATE = "admin:operate"
    """Change aliases and services; drain workers; pull and load models; replay dead letters; cancel any team's jobs."""
    ADMIN_KEYS = "admin:keys"
    """Read and change keys and teams."""

    __hash__ = str.__hash__


ALL_SCOPES = frozenset({Scope.INFERENCE, Scope.JOBS, Scope.ADMIN})
ADMIN_SCOPES = frozenset({Scope.ADMIN_READ, Scope.ADMIN_OPERATE, Scope.ADMIN_KEYS})
"""The scopes that `admin` grants."""


def granted(scopes: frozenset[Scope]) -> frozenset[Scope]:
    """Return the scopes with those that they include."""
    return scopes | ADMIN_SCOPES if Scope.ADMIN in scopes else scopes


class AccessLimits(BaseModel):
    """The limits of a key or a team. None: no limit of its own; for a team, the default of the settings."""

    model_config = ConfigDict(frozen=True)

    models: tuple[str, ...] | None = None
    """Patterns of the model names that requests may use: `*` stands for any text, `?` for one character."""
    lanes: tuple[LaneName, ...] | None = None
    """The lanes that requests may use."""
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_open: int | None = None
    """Requests that may be open at the same time, at each gateway process."""
    max_queued: int | None = None
    """Jobs that may wait at the same time."""
    max_running: int | None = None
    """Jobs that may run at the same time. Others wait."""
    max_stored_bytes: int | None = None
    """Bytes of files that may be stored at the same time, with 1 KiB for each file and batch."""
    max_pending_bytes: int | None = None
    """Bytes of request bodies over 512 KiB that may be stored for requests and jobs that have not ended, and of answers that are sent."""
    max_result_bytes: int | None = None
    """Bytes of ended jobs, of results by URL, of stored responses, and of unfinished batches' results: each for itself. The oldest are
    deleted above it; lines of batches fail.
    """
    max_batches: int | None = None
    """Batches that may be unfinished at the same time."""
    max_webhooks: int | None = None
    """Webhooks that each gateway process sends at the same time. Others wait."""
    networks: tuple[str, ...] | None = None
    """Addresses and CIDR ranges from which requests may come."""
    retain: Retain | None = None
    """What is kept of requests and answers: `none`, nothing once the answer was delivered."""
    budgets: tuple[Budget, ...] | None = None
    """How much may be used in a day, a week or a month; at most one for each unit and period."""
    budget_webhook: str | None = None
    """The URL that receives warnings of these budgets."""


MAX_WEIGHT = 100


class Team(AccessLimits):
    """The record of a team: the owner of jobs, files, batches and responses, and of the keys that share them."""

    id: str
    """The `owner` of its keys."""
    created_at: int
    """Unix seconds."""
    expires_at: int | None = None
    """The time at which all its keys end, in Unix seconds; None: never."""
    weight: int = 1
    """Its share of a queue, beside the weights of the other teams whose jobs wait there."""
    inspection: Inspection | None = None
    """What administrators inspect of its requests; it may have ended. None: nothing."""
    deleted_at: int | None = None
    """Unix seconds. None: the team exists. The record is kept for a while, so that no cache restores the team."""
    webhook_secret: str = ""
    """`whsec_` and base64: the secret that signs the webhooks of the team's budgets. Empty: it has had none."""
    version: int = 0
    """Counts changes. Of two records, the one with the greater version is newer."""


class ApiKey(AccessLimits):
    """The record of an API key, without the key itself."""

    id: str
    """`key_…`; not secret."""
    hash: str
    """SHA-256 of the key, in hex. A key holds 256 random bits, so that a fast hash is safe."""
    hint: str = ""
    """The last four characters of the key, which help to tell keys apart."""
    name: str
    owner: str
    """The team: the owner of jobs, files, batches and responses. Keys of one team share them."""
    scopes: frozenset[Scope] = ALL_SCOPES
    created_at: int
    """Unix seconds."""
    expires_at: int | None = None
    """Unix seconds; None: never."""
    revoked_at: int | None = None
    """Unix seconds. None: the key is valid. The record of a revoked key is kept for a while, so that no cache restores the key."""
    webhook_secret: str = ""
    """`whsec_` and base64: the secret that signs the webhooks of the key's jobs."""
    person: str = ""
    """Id of the person who made the key; empty: it was made with a key."""
    old_hash: str = ""
    """SHA-256 of the key that a rotation replaced, in hex."""
    old_hash_until: int | None = None
    """The time until which the replaced key is still valid, in Unix seconds."""
    version: int = 0
    """Counts changes. Of two records, the one with the greater version is newer."""


LIMITS = tuple(AccessLimits.model_fields)
"""The names of the limits."""
