"""Define the registry's records: workers and operators write them, the gateway reads them."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from schemas.jobs import Capability
from schemas.names import SubjectToken

_KNOWN = frozenset(Capability)


def _skip_unknown(capabilities: Any) -> Any:
    """Drop the capabilities that only a newer Nexus knows. The worker's other capabilities still count."""
    return [one for one in capabilities if one in _KNOWN] if isinstance(capabilities, list) else capabilities


KnownCapabilities = Annotated[tuple[Capability, ...], BeforeValidator(_skip_unknown)]


class ModelOffer(BaseModel):
    """One model that a worker serves."""

    model_config = ConfigDict(frozen=True)

    name: str
    capabilities: KnownCapabilities
    loaded: bool | None = None
    """Whether the backend has the model in memory. None: the backend does not report it."""
    loading: bool = False
    """Whether the backend is loading it now."""
    context_length: int | None = None
    """Tokens that a request may use, for the model as it is loaded, when the backend reports it."""
    owned_by: str = "nexus"
    created: int = 0
    """Unix seconds, when the backend reports it, else 0."""
    voices: tuple[str, ...] = ()
    """The voices of a speech model."""
    embedding_length: int | None = None
    """The length of an embedding."""
    descriptor: str = ""
    """The digest of the model's descriptor among those of its worker; empty: the endpoints' usual parameters."""


class WorkerState(StrEnum):
    """Whether a worker pulls jobs."""

    READY = "ready"
    UNHEALTHY = "unhealthy"
    """The worker's backend does not answer."""
    DRAINING = "draining"


class Limitation(BaseModel):
    """A feature that a model's server lacks, as a probe of the worker has shown."""

    model_config = ConfigDict(frozen=True)

    model: str
    feature: str
    """`stream`, `stream_options`, `encoding_format`, a format, …"""
    since: int
    """Unix seconds by the worker's clock, for people to read."""
    until: int
    """The time at which the worker forgets the limitation and probes the server again."""


class Pause(BaseModel):
    """A model whose jobs a worker leaves in their queues for now, because its server asked to wait."""

    model_config = ConfigDict(frozen=True)

    model: str
    reason: str
    """The server's message."""
    seconds: float
    """The duration, from the time at which this was written."""
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
    """The value of `<prefix>workers/<id>`. It is under a lease and vanishes with the worker."""

    model_config = ConfigDict(frozen=True)

    id: SubjectToken
    backend: str
    """The adapter's name: `openai`, `echo`, …"""
    host: str
    pid: int = 0
    version: str = ""
    slots: int = 1
    """The number of jobs that the worker runs at the same time."""
    busy: int = 0
    load: BackendLoad | None = None
    """Load figures of the backend; None where the backend does not report them."""
    models: tuple[ModelOffer, ...] = ()
    state: WorkerState = WorkerState.READY
    limitations: tuple[Limitation, ...] = ()
    pauses: tuple[Pause, ...] = ()
    problems: tuple[str, ...] = ()
    """Why the worker is unhealthy, or what a ready worker does not serve: sentences for the operator."""


class CatalogEntry(BaseModel):
    """The value of `<prefix>models/<model>`, without a lease: a model that a worker has served."""

    model_config = ConfigDict(frozen=True)

    name: str
    capabilities: KnownCapabilities
    owned_by: str = "nexus"
    created: int = 0


class Alias(BaseModel):
    """The value of `<prefix>aliases/<alias>`: a name for the first of its targets that has a live worker."""

    model_config = ConfigDict(frozen=True)

    name: str
    targets: tuple[str, ...] = Field(min_length=1)
    """Models, in the order of preference."""
    unsupported_parameters: Literal["refuse", "adapt"] | None = None
    """The policy for parameters that a model's server lacks. None: the worker's own policy."""


class ModelHold(BaseModel):
    """The value of `<prefix>holds/<model>`: workers take none of the model's waiting jobs until an operator releases them."""

    model_config = ConfigDict(frozen=True)

    model: str
    since: int
    """Unix seconds."""
    reason: str = ""
    """The operator's words, for other operators and for callers."""


class ServiceRecord(BaseModel):
    """The value of `<prefix>services/<name>`: an HTTP service that workers serve without its knowledge of Nexus."""

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str
    base_url: str
    metadata_url: str = ""
    """Empty: `<base_url>/v1/metadata`."""


class RegistrySnapshot(BaseModel):
    """The state of the registry at one moment."""

    model_config = ConfigDict(frozen=True)

    workers: dict[str, WorkerPresence] = Field(default_factory=dict)
    models: dict[str, CatalogEntry] = Field(default_factory=dict)
    aliases: dict[str, Alias] = Field(default_factory=dict)
    services: dict[str, ServiceRecord] = Field(default_factory=dict)
    holds: dict[str, ModelHold] = Field(default_factory=dict)
    """By model."""
    descriptors: dict[str, bytes] = Field(default_factory=dict)
    """By worker, the JSON of an object that holds each of its descriptors as a text, by digest. Unread: `schemas.descriptors` parses it."""
