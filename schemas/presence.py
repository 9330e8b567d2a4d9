"""What workers and operators write into the registry, and what the gateway reads from it."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from schemas.jobs import Capability
from schemas.names import SubjectToken

_KNOWN = frozenset(Capability)


def _skip_unknown(capabilities: Any) -> Any:
    """Leave out the capabilities that only a newer Nexus knows: the others of its workers still count."""
    return [one for one in capabilities if one in _KNOWN] if isinstance(capabilities, list) else capabilities


KnownCapabilities = Annotated[tuple[Capability, ...], BeforeValidator(_skip_unknown)]


class ModelOffer(BaseModel):
    """One model that a worker serves."""

    model_config = ConfigDict(frozen=True)

    name: str
    capabilities: KnownCapabilities
    loaded: bool | None = None
    """Whether the backend holds it in memory now; None where the backend does not say."""
    loading: bool = False
    """Whether the backend is loading it now."""
    context_length: int | None = None
    """Tokens that a request may use: as the model is loaded, where the backend says."""
    owned_by: str = "nexus"
    created: int = 0
    """Unix seconds, where the backend says; 0 where it does not."""
    voices: tuple[str, ...] = ()
    """Of a model that speaks."""
    embedding_length: int | None = None
    """Numbers in an embedding."""


class WorkerState(StrEnum):
    """Whether a worker takes jobs."""

    READY = "ready"
    UNHEALTHY = "unhealthy"
    """Its backend does not answer."""
    DRAINING = "draining"


class Limitation(BaseModel):
    """A feature that a model's server lacks, as a probe of the worker's own has shown."""

    model_config = ConfigDict(frozen=True)

    model: str
    feature: str
    """`stream`, `stream_options`, `encoding_format`, a format, …"""
    since: int
    """Unix seconds by the worker's clock, for people to read."""
    until: int
    """When the worker forgets it, and asks the server again."""


class Pause(BaseModel):
    """A model whose jobs a worker leaves in their queues for now, since its server asked to wait."""

    model_config = ConfigDict(frozen=True)

    model: str
    reason: str
    """The server's words."""
    seconds: float
    """How long, from when this was written."""
    until: int
    """Unix seconds by the worker's clock, for people to read."""


class BackendLoad(BaseModel):
    """Load figures that a worker's inference server reports about itself, requests of other clients included."""

    model_config = ConfigDict(frozen=True)

    running: int
    """Requests that the server processes now."""
    waiting: int
    """Requests that wait inside the server."""
    kv_cache_usage: float | None = None
    """Used share of the KV cache, from 0 to 1; of several engines, the fullest one's."""


class WorkerPresence(BaseModel):
    """The value of `<prefix>workers/<id>`, under a lease: it vanishes with the worker."""

    model_config = ConfigDict(frozen=True)

    id: SubjectToken
    backend: str
    """The adapter's name: `openai`, `echo`, …"""
    host: str
    pid: int = 0
    version: str = ""
    slots: int = 1
    """How many jobs it runs at once."""
    busy: int = 0
    load: BackendLoad | None = None
    """Load figures of the backend; None where the backend does not report them."""
    models: tuple[ModelOffer, ...] = ()
    state: WorkerState = WorkerState.READY
    limitations: tuple[Limitation, ...] = ()
    pauses: tuple[Pause, ...] = ()
    problems: tuple[str, ...] = ()
    """Why the worker is unhealthy, or what a ready one does not serve: sentences for the operator."""


class CatalogEntry(BaseModel):
    """The value of `<prefix>models/<model>`, without a lease: a model that was ever served here."""

    model_config = ConfigDict(frozen=True)

    name: str
    capabilities: KnownCapabilities
    owned_by: str = "nexus"
    created: int = 0


class Alias(BaseModel):
    """The value of `<prefix>aliases/<alias>`: a name that stands for the first of its targets that is live."""

    model_config = ConfigDict(frozen=True)

    name: str
    targets: tuple[str, ...] = Field(min_length=1)
    """Models, in order of preference."""
    unsupported_parameters: Literal["refuse", "adapt"] | None = None
    """What becomes of parameters that a model's server lacks; None: as the worker does."""


class ServiceRecord(BaseModel):
    """The value of `<prefix>services/<name>`: an HTTP service that is served without knowing of Nexus."""

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str
    base_url: str
    metadata_url: str = ""
    """Empty: `<base_url>/v1/metadata`."""


class RegistrySnapshot(BaseModel):
    """Everything the registry knows at one moment."""

    model_config = ConfigDict(frozen=True)

    workers: dict[str, WorkerPresence] = Field(default_factory=dict)
    models: dict[str, CatalogEntry] = Field(default_factory=dict)
    aliases: dict[str, Alias] = Field(default_factory=dict)
    services: dict[str, ServiceRecord] = Field(default_factory=dict)
