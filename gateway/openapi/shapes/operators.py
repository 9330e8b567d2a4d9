"""The response bodies of routes for models, aliases, services, workers, queues, keys and readiness."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from gateway.openapi.shapes.jobs import AttemptDetail, JobFields
from schemas.budgets import BudgetPeriod, BudgetUnit
from schemas.jobs import Capability, JobStatus, Lane
from schemas.keys import LaneName, Retain, Scope
from schemas.presence import WorkerPresence, WorkerState


class ModelObject(BaseModel):
    """A model, or an alias for one."""

    model_config = ConfigDict(title="Model")

    id: str
    object: Literal["model"]
    created: int
    """Unix seconds. 0 if the inference server does not report it."""
    owned_by: str
    capabilities: list[Capability]
    """The capabilities that the model serves."""
    context_length: int | None = None
    """The maximum number of tokens of prompt and response together, if the inference server reports it."""
    embedding_length: int | None = None
    """The number of dimensions of an embedding."""
    voices: list[str] | None = None
    alias_for: list[str] | None = None
    """For an alias: its target models, in order of preference."""
    resolves_to: str | None = None
    """For an alias: the target that currently serves its requests. Null if no target is live."""


class CatalogWorker(BaseModel):
    """A worker that offers the model."""

    id: str
    backend: str
    """The adapter's name."""
    state: WorkerState
    slots: int
    """The jobs that the worker runs at once, of all its models."""
    load: Literal["loaded", "loading", "cold"] | None = None
    """Missing if the inference server does not report it."""


class CatalogEndpoint(BaseModel):
    """What requests to an endpoint may hold."""

    content_type: Literal["application/json", "multipart/form-data"]
    parameters: dict[str, Any]
    """The JSON Schema (2020-12) of the body. Of a form, a property with `contentMediaType` is a file, base64 in the example."""
    example: dict[str, Any]
    """A first request that works."""


class Modalities(BaseModel):
    """The kinds of content."""

    input: list[str]
    """`text`, `image`, `audio`."""
    output: list[str]
    """`text`, `image`, `audio`, `embedding`, `score`."""


class CatalogSummary(BaseModel):
    """A model or an alias, with its state."""

    model_config = ConfigDict(title="CatalogSummary")

    id: str
    object: Literal["catalog.model"]
    created: int
    owned_by: str
    capabilities: list[Capability]
    state: Literal["loaded", "loading", "cold", "ready", "held", "paused", "offline"]
    """`ready`: a worker serves the model, and does not report whether it is loaded. `held`: an operator holds its jobs. `paused`: all its servers asked to wait. `offline`: no worker serves it."""
    workers: list[CatalogWorker]
    """The workers that offer the model, or the model that an alias resolves to."""
    slots: int
    """Of all ready workers."""
    limitations: list[str]
    """Features that a server lacks, by its worker's own probes."""
    modalities: Modalities | None = None
    context_length: int | None = None
    embedding_length: int | None = None
    voices: list[str] | None = None
    alias_for: list[str] | None = None
    resolves_to: str | None = None
    differing: list[str] | None = None
    """Parameters that differ between workers: they are left out, or in their narrower form."""
    problems: list[str] | None = None
    """For keys with `admin:read`: workers whose description of the model is invalid."""


class CatalogItem(CatalogSummary):
    """A model or an alias, with its parameters."""

    model_config = ConfigDict(title="CatalogItem")

    endpoints: dict[str, CatalogEndpoint]
    """By path."""


class CatalogListEntry(CatalogSummary):
    """A model or an alias, with a reference to its parameters."""

    model_config = ConfigDict(title="CatalogListEntry")

    descriptor: str | None = None
    """The key of its parameters in `descriptors`."""


class CatalogList(BaseModel):
    """The models and aliases, and their parameters. Models with the same parameters share one descriptor."""

    object: Literal["list"]
    data: list[CatalogListEntry]
    descriptors: dict[str, dict[str, CatalogEndpoint]]
    """Endpoints by path, by the digest of the descriptor."""


class ModelList(BaseModel):
    """The live models and the aliases that resolve to them."""

    object: Literal["list"]
    data: list[ModelObject]


class Voice(BaseModel):
    """A voice."""

    id: str
    name: str


class VoiceList(BaseModel):
    """The voices of all live speech models."""

    voices: list[Voice]


class SpeechModel(BaseModel):
    """A speech model."""

    id: str
    name: str
    object: Literal["model"]


class SpeechModelList(BaseModel):
    """The speech models, in OpenAI's form (`data`) and in the form that Open WebUI reads (`models`)."""

    object: Literal["list"]
    data: list[SpeechModel]
    models: list[SpeechModel]


class ModelAlias(BaseModel):
    """An alternative model name that resolves to the first live model among its targets."""

    id: str
    object: Literal["alias"]
    targets: list[str]
    """Model names, in order of preference."""
    resolves_to: str | None
    """The target that currently serves requests. Null if no target is live."""
    unsupported_parameters: Literal["refuse", "adapt"] | None = None
    """How to treat request parameters that the inference server does not support. Absent: the worker's own setting applies."""


class AliasList(BaseModel):
    """All aliases."""

    object: Literal["list"]
    data: list[ModelAlias]


class AliasDeleted(BaseModel):
    """Confirmation that an alias was deleted."""

    id: str
    object: Literal["alias"]
    deleted: Literal[True]


class Service(BaseModel):
    """A registered HTTP service, with the fields of its registration."""

    id: str
    object: Literal["service"]
    name: str
    base_url: str
    metadata_url: str
    """The URL of the service's metadata. Empty: `<base_url>/v1/metadata`."""
    state: WorkerState | None
    """The state of the worker that serves it. Null while no worker serves it."""


class ServiceList(BaseModel):
    """All registered services."""

    object: Literal["list"]
    data: list[Service]


class ServiceDeleted(BaseModel):
    """Confirmation that a service's record was deleted. The service itself keeps running."""

    id: str
    object: Literal["service"]
    deleted: Literal[True]


class WorkerList(BaseModel):
    """All connected workers."""

    object: Literal["list"]
    data: list[WorkerPresence]


class WorkerDraining(BaseModel):
    """Confirmation that a worker drains: it finishes its jobs, accepts no new jobs and stops."""

    id: str
    state: Literal["draining"]


class QueueState(BaseModel):
    """A queue that holds at least one job."""

    capability: Capability
    lane: Lane
    model: str
    depth: int
    """The number of waiting jobs."""
    in_progress: int
    """The number of running jobs."""


class QueueList(BaseModel):
    """All queues that hold at least one job."""

    object: Literal["list"]
    data: list[QueueState]


class BudgetLimit(BaseModel):
    """A budget of a key or a team."""

    unit: BudgetUnit
    """What is counted: tokens, seconds of workers' slots, or cost by the price list."""
    amount: float
    """Tokens, seconds, or units of the price list's currency."""
    period: BudgetPeriod
    """The calendar period in UTC after which the budget renews; a week begins on Monday."""
    warn_at: float | None
    """The share of the amount at which a warning is sent. Null: none is."""


class BudgetUsage(BudgetLimit):
    """A budget in its present period. `spent`, `reserved` and `left` add up to `amount`, unless more was spent."""

    object: Literal["budget"]
    holder: Literal["key", "team"]
    holder_id: str
    """The id of the key or the team."""
    currency: str | None
    """Of a budget of cost: the price list's currency."""
    spent: float
    """What finished requests have used, failed ones included."""
    reserved: float
    """The estimates of open requests and jobs, and what gateways have taken ahead of need."""
    left: float
    """What is neither spent nor reserved."""
    starts_at: int
    """The beginning of the period, in Unix seconds."""
    renews_at: int
    """The end of the period, in Unix seconds."""


class BudgetList(BaseModel):
    """A page of budgets."""

    object: Literal["list"]
    data: list[BudgetUsage]
    has_more: bool
    next_after: str | None
    """The `after` of the next page."""


class LimitValues(BaseModel):
    """The limits of a key or a team."""

    models: list[str] | None
    """Patterns of the model names that requests may use: `*` stands for any text, `?` for one character."""
    lanes: list[LaneName] | None
    """The lanes that requests may use."""
    requests_per_minute: int | None
    """Requests in any 60 seconds, over all gateways."""
    tokens_per_minute: int | None
    """Tokens of prompts and answers in any 60 seconds, over all gateways."""
    max_open: int | None
    """The maximum number of open requests, at each gateway process."""
    max_queued: int | None
    """The maximum number of waiting jobs."""
    max_running: int | None
    """The maximum number of running jobs."""
    max_stored_bytes: int | None
    """The maximum number of bytes of stored files."""
    max_pending_bytes: int | None
    """The maximum number of bytes of stored request bodies over 512 KiB, of requests and jobs that have not ended."""
    max_result_bytes: int | None
    """The maximum number of bytes of stored results of jobs. Above it, the oldest are deleted."""
    max_batches: int | None
    """The maximum number of unfinished batches."""
    max_webhooks: int | None
    """The maximum number of webhooks that each gateway process sends at the same time."""
    networks: list[str] | None
    """Addresses and CIDR ranges from which requests may come."""
    retain: Retain | None
    """`none`: nothing is kept of requests and answers once the answer was delivered."""
    budgets: list[BudgetLimit] | None
    """How much may be used in a day, a week or a month."""
    budget_webhook: str | None
    """The URL that receives `budget.warning` and `budget.exhausted`."""


class TeamObject(LimitValues):
    """A team: the owner of jobs, files, batches and responses. Null limits: the defaults of the settings apply."""

    model_config = ConfigDict(title="Team")

    id: str
    """The `owner` of the team's keys."""
    object: Literal["team"]
    effective_limits: LimitValues
    """The limits that hold: the team's own, and the defaults for the others. Null: no limit."""
    weight: int
    """The team's share of a queue, beside the weights of the other teams whose jobs wait there."""
    created_at: int
    """Unix seconds."""
    expires_at: int | None
    """The time at which all keys of the team end, in Unix seconds. Null: never."""
    budget_usage: list[BudgetUsage] | None = None
    """What is spent and left of its budgets. Only `GET /v1/teams/{team_id}` returns it."""
    webhook_secret: str | None = None
    """The secret that signs `budget_webhook`. Store it now: only the response to the request that sets the URL contains it."""


class TeamList(BaseModel):
    """All teams."""

    object: Literal["list"]
    data: list[TeamObject]


class TeamDeleted(BaseModel):
    """Confirmation that a team was deleted."""

    id: str
    object: Literal["team"]
    deleted: Literal[True]


class TeamJob(BaseModel):
    """The state of a job, for operators."""

    id: str
    object: Literal["job"]
    team: str
    key: str | None
    """The id of the API key, or of the person in a session, that submitted the job. Null: the bootstrap key."""
    request_id: str | None
    endpoint: str
    capability: Capability
    model: str
    service_tier: Lane
    status: JobStatus
    created_at: int
    """Unix seconds."""
    queued_at: int
    """The time at which the job began to wait for its latest run."""
    started_at: int | None
    finished_at: int | None
    expires_at: int | None
    run: int
    """Counts the runs of the job: retries begin new ones."""
    attempts: int
    queue_position: int | None
    eta_seconds: float | None
    progress: float | None
    worker: str | None
    usage: dict[str, Any] | None
    """The number of tokens, as the inference server reported it."""
    error_code: str | None
    """The code of the error of a failed job."""
    attempts_detail: list[AttemptDetail] | None = None
    """The newest attempts of all runs, at most 16, the oldest first."""
    adapted: list[str] | None = None
    """Parameters that were replaced by their nearest equivalents."""
    batch: str | None = None
    """The id of the batch that the job is a line of."""


class TeamJobList(BaseModel):
    """A page of jobs, newest first, or in the order that the query asks for. With `fields`, jobs hold only those."""

    object: Literal["list"]
    data: list[TeamJob | JobFields]
    first_id: str | None
    last_id: str | None
    has_more: bool
    next_after: str | None
    """The parameter `after` of the next page. Null: there is none."""


class Key(LimitValues):
    """An API key, without the key itself. Null limits: the key has no limit of its own, and its team's apply."""

    id: str
    object: Literal["api_key"]
    name: str
    owner: str
    """The team: the owner of the key's jobs, files, batches and responses. Keys of one team share them."""
    person: str | None
    """Id of the person who made the key. Null: it was made with a key."""
    scopes: list[Scope]
    created_at: int
    """Unix seconds."""
    expires_at: int | None
    """Unix seconds. Null: the key never expires."""
    last_used_at: int | None
    """The time of the last request, about a minute late, in Unix seconds. Null: not known."""
    replaced_until: int | None
    """The time until which the key that the last rotation replaced is valid, in Unix seconds. Null: it was never rotated."""
    status: Literal["active", "expired"]
    hint: str
    """The key's last four characters."""
    budget_usage: list[BudgetUsage] | None = None
    """What is spent and left of its own budgets. Only `GET /v1/keys/{key_id}` returns it."""


class RotatedKey(Key):
    """A rotated API key. Store `key` now: no other response contains it."""

    key: str
    """The key itself. Send it as `Authorization: Bearer KEY`."""


class CreatedKey(RotatedKey):
    """A new API key. Store `key` and `webhook_secret` now: no other response contains them."""

    webhook_secret: str
    """The secret that signs the webhooks of this key's jobs."""


class KeyList(BaseModel):
    """All keys that are not revoked, newest first."""

    object: Literal["list"]
    data: list[Key]


class KeyDeleted(BaseModel):
    """Confirmation that a key was revoked."""

    id: str
    object: Literal["api_key"]
    deleted: Literal[True]
    cancelled_jobs: int | None = None
    """With `jobs=cancel`: the number of unfinished jobs that were cancelled."""


class Health(BaseModel):
    """Confirmation that the process runs."""

    status: Literal["ok"]


class PartReadiness(BaseModel):
    """The state of one server that the gateway depends on."""

    ok: bool
    ms: float | None = None
    """The round-trip time in milliseconds."""
    error: str | None = None


class ReadinessState(BaseModel):
    """The readiness of this gateway."""

    status: Literal["ready", "degraded", "unavailable", "leaving"]
    """`degraded`: synchronous requests work, but another function does not. `leaving`: the gateway shuts down."""
    parts: dict[str, PartReadiness] | None = Field(default=None, examples=[{"nats": {"ok": True, "ms": 0.4}}])
    """The state of each server that the gateway depends on. Only operators receive it."""
