"""The response bodies of the routes that show what happens now."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from schemas.jobs import Capability
from schemas.keys import LaneName
from schemas.presence import WorkerPresence


class LaneCounts(BaseModel):
    """Waiting jobs by lane."""

    priority: int
    default: int
    flex: int


class ModelActivity(BaseModel):
    """What happens with one model."""

    model: str
    state: Literal["ready", "paused", "held", "unhealthy", "unserved"]
    """`ready`: a worker takes its jobs. `paused`: the servers of all its workers asked to wait. `held`: an operator holds its waiting jobs. `unhealthy`: its workers' servers do not
    answer. `unserved`: it has no worker."""
    capabilities: list[Capability]
    waiting: LaneCounts
    running: int
    """The number of jobs that workers hold."""
    slots: int
    """The number of jobs that its ready workers run at once. A worker with several models counts for each of them."""
    oldest_queued_at: int | None
    """When the job was stored that has waited longest, in Unix seconds."""
    eta_seconds: float | None
    """The seconds until a new job of the default lane would end, by what jobs took lately. Null if unknown."""
    tokens_per_second: float
    """Completion tokens of the answers that ended in the last minute, divided by 60."""
    errors: int
    """Requests that ended with a status of 500 or more, and jobs that failed or expired, in the last five minutes."""
    dead_letters: int
    workers: int
    """The number of ready workers."""
    loaded: bool | None
    """Whether a server has it in memory. Null if none reports that."""
    loading: bool
    """Whether a server loads it now."""


class AttentionItem(BaseModel):
    """Something that needs an operator."""

    kind: Literal["server_away", "jobs_without_worker", "queue_held", "dead_letters", "stream_full", "worker_unhealthy"]
    severity: Literal["critical", "warning"]
    subject: str
    """The name of the server, model, stream or worker."""
    message: str
    action: str
    """What to do."""
    count: int | None
    """The number of jobs concerned, if it is about jobs."""


class Overview(BaseModel):
    """What happens now, over all gateways."""

    object: Literal["overview"]
    at: float
    """When it was computed, in Unix seconds."""
    stale_since: float | None
    """Since when NATS does not answer, in Unix seconds: the rows are the last known ones. Null while it does."""
    gateways: int
    """The number of gateway processes that have reported lately."""
    attention: list[AttentionItem]
    """The most urgent first."""
    models: list[ModelActivity]
    """Sorted by name."""


class QueueHoldState(BaseModel):
    """Whether the waiting jobs of a model are held."""

    model: str
    object: Literal["queue"]
    is_held: bool
    held_since: int | None
    """Unix seconds."""
    reason: str


class QueuedJobEntry(BaseModel):
    """A job in a queue."""

    id: str
    object: Literal["queued_job"]
    kind: Literal["job", "request"]
    """`request`: its caller waits on an open connection, and it has no record."""
    team: str
    lane: LaneName
    capability: Capability
    endpoint: str
    model: str
    """The name in the request: the model or an alias for it."""
    batch: str | None
    queued_at: int
    """When it was stored in the queue, in Unix seconds; a job that moved to its owner's turn was stored again then."""
    size_bytes: int
    """The size of the request's body."""
    eta_seconds: float | None
    """The seconds until it ends, by what jobs took lately. Null if unknown."""


class WaitingJobEntry(QueuedJobEntry):
    """A job that waits."""

    queue_position: int
    """How many jobs of the model start before it, over all lanes."""


class RunningJobEntry(QueuedJobEntry):
    """A job that a worker has. What is null is not known; of a request, only the gateway of its caller knows it."""

    worker: str | None
    attempts: int | None
    started_at: int | None
    """When the newest attempt began, in Unix seconds."""
    progress: float | None
    """From 0 to 1, if the inference server reports it."""


class QueuedJobList(BaseModel):
    """A page of the jobs that wait for a model, and the jobs that run."""

    object: Literal["list"]
    model: str
    is_held: bool
    held_since: int | None
    reason: str
    total: int
    """The number of waiting jobs."""
    data: list[WaitingJobEntry]
    """In the order in which they will start."""
    running: list[RunningJobEntry]
    """Up to 100; on the first page only."""
    has_more: bool
    next: str | None
    """The cursor of the next page. Null if there is none, or if the pages so far hold jobs of more than 500 teams."""


class HostWorker(WorkerPresence):
    """A worker of a host, as it announced itself last."""

    gone_at: int | None
    """When it vanished, in Unix seconds. Null while it is there."""


class Host(BaseModel):
    """A host with its workers."""

    host: str
    object: Literal["host"]
    gone_at: int | None
    """When its last worker vanished, in Unix seconds. Null while one is there."""
    slots: int
    busy: int
    workers: list[HostWorker]


class HostList(BaseModel):
    """The hosts by name. What vanished is listed for 15 minutes, by each gateway process that has seen it."""

    object: Literal["list"]
    data: list[Host]


class ModelStatus(BaseModel):
    """The public state of a model."""

    model: str
    state: Literal["up", "paused", "down"]
    is_loaded: bool | None
    """Whether a server has it in memory. Null if none reports that."""
    expected_wait: Literal["short", "minutes", "long"] | None
    """How long a new job takes, its wait included: up to 30 s, up to 5 minutes, or longer. Null if unknown."""


class PublicStatusObject(BaseModel):
    """The public status."""

    object: Literal["status"]
    at: int
    """When it was computed, in Unix seconds."""
    state: Literal["up", "degraded", "down"]
    models: list[ModelStatus]
