"""Describe models, aliases, services, workers, queues, keys and readiness."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from schemas.jobs import Capability, Lane
from schemas.keys import Scope
from schemas.presence import WorkerPresence, WorkerState


class Model(BaseModel):
    """A model, or an alias for one."""

    id: str
    object: Literal["model"]
    created: int
    """Unix seconds; 0 where the server does not say."""
    owned_by: str
    capabilities: list[Capability]
    """What it can be used for."""
    context_length: int | None = None
    """Tokens of prompt and answer together, where the server says."""
    embedding_length: int | None = None
    """Numbers in an embedding."""
    voices: list[str] | None = None
    alias_for: list[str] | None = None
    """Of an alias: the models that it stands for, in order of preference."""
    resolves_to: str | None = None
    """Of an alias: the model that answers now; null where none is live."""


class ModelList(BaseModel):
    """The models that can be used now, and the aliases for them."""

    object: Literal["list"]
    data: list[Model]


class Voice(BaseModel):
    """A voice."""

    id: str
    name: str


class VoiceList(BaseModel):
    """The voices of all models that speak now."""

    voices: list[Voice]


class SpeechModel(BaseModel):
    """A model that speaks."""

    id: str
    name: str
    object: Literal["model"]


class SpeechModelList(BaseModel):
    """The models that speak, as OpenAI lists models (`data`) and as Open WebUI reads them (`models`)."""

    object: Literal["list"]
    data: list[SpeechModel]
    models: list[SpeechModel]


class ModelAlias(BaseModel):
    """A name that stands for the first of its targets that is live."""

    id: str
    object: Literal["alias"]
    targets: list[str]
    """Models, in order of preference."""
    resolves_to: str | None
    """The model that answers now; null where none is live."""
    unsupported_parameters: Literal["refuse", "adapt"] | None = None
    """What becomes of parameters that a model's server lacks; missing: as its worker does."""


class AliasList(BaseModel):
    """Every alias."""

    object: Literal["list"]
    data: list[ModelAlias]


class AliasDeleted(BaseModel):
    """An alias was deleted."""

    id: str
    object: Literal["alias"]
    deleted: Literal[True]


class Service(BaseModel):
    """A registered HTTP service, with the fields that it was registered with."""

    id: str
    object: Literal["service"]
    name: str
    base_url: str
    metadata_url: str
    """Empty: `<base_url>/v1/metadata`."""
    state: WorkerState | None
    """The state of the worker that serves it; null while none does."""


class ServiceList(BaseModel):
    """Every registered service."""

    object: Literal["list"]
    data: list[Service]


class ServiceDeleted(BaseModel):
    """A service's record was deleted; the service itself is left alone."""

    id: str
    object: Literal["service"]
    deleted: Literal[True]


class WorkerList(BaseModel):
    """Every worker that is connected."""

    object: Literal["list"]
    data: list[WorkerPresence]


class WorkerDraining(BaseModel):
    """A worker finishes its jobs, takes no more, and stops."""

    id: str
    state: Literal["draining"]


class QueueState(BaseModel):
    """A queue that holds a job."""

    capability: Capability
    lane: Lane
    model: str
    depth: int
    """Jobs that wait."""
    in_progress: int
    """Jobs that a worker runs."""


class QueueList(BaseModel):
    """Every queue that holds a job."""

    object: Literal["list"]
    data: list[QueueState]


class Key(BaseModel):
    """An API key, without the key itself."""

    id: str
    object: Literal["api_key"]
    name: str
    owner: str
    """Jobs, files, batches and responses belong to owners; keys of one owner share them."""
    scopes: list[Scope]
    max_queued: int | None
    """Jobs that may wait at once; null: no limit of its own."""
    max_running: int | None
    """Jobs that may run at once; null: no limit of its own."""
    created_at: int
    """Unix seconds."""
    expires_at: int | None
    """Unix seconds; null: never."""
    status: Literal["active", "expired"]
    hint: str
    """The key's last four characters."""


class CreatedKey(Key):
    """A new key. No other answer holds `key` and `webhook_secret`: store them now."""

    key: str
    """Send it as `Authorization: Bearer KEY`."""
    webhook_secret: str
    """What the webhooks of this key's jobs are signed with."""


class KeyList(BaseModel):
    """Every key that is not revoked, the newest first."""

    object: Literal["list"]
    data: list[Key]


class KeyDeleted(BaseModel):
    """A key was revoked."""

    id: str
    object: Literal["api_key"]
    deleted: Literal[True]


class Health(BaseModel):
    """The process runs."""

    status: Literal["ok"]


class PartReadiness(BaseModel):
    """The state of one server that the gateway needs."""

    ok: bool
    ms: float | None = None
    """Milliseconds of the round trip."""
    error: str | None = None


class ReadinessState(BaseModel):
    """Whether requests should come to this gateway."""

    status: Literal["ready", "degraded", "unavailable", "leaving"]
    """`degraded`: synchronous requests work, something else does not. `leaving`: the gateway shuts down."""
    parts: dict[str, PartReadiness] | None = Field(default=None, examples=[{"nats": {"ok": True, "ms": 0.4}}])
    """Each server that the gateway needs; for operators only."""
