"""What each role may publish and subscribe to in NATS; everything else is refused.

`tests/deploy/test_permissions.py` compares it with what the code does. A wildcard of NATS stands for whole tokens: a worker's
consumers, named `<capability>_<lane>_<model>`, are listed one by one.

JetStream and the gateways live in the account NEXUS. JetStream sends a reply wherever the request wants it, with the server's
permissions: subject permissions alone do not contain a client that may call it. So each worker's user, and the monitor, has an
account of its own, which imports the subjects of its role and nothing else. nats-server maps a reply subject into NEXUS and
back: whatever subject a worker names, its reply ends in the worker's own account.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from backbone.bus.bus import Queue
from backbone.bus.nats.auth import INBOX
from backbone.bus.subjects import (
    BACKLOG,
    BACKLOG_NOTICES,
    BLOBS_BUCKET,
    BLOBS_STREAM,
    BROADCAST,
    CLAIMS_BUCKET,
    CONTENT_KEYS_BUCKET,
    DEAD_LETTERS,
    EVENTS,
    GATE_REQUESTS,
    JOBS,
    JOBS_STREAM,
    OUTCOMES,
    QUEUE_FREED,
    REPLIES,
    SEAL_SECRET_SUBJECT,
    STORED_EVENTS,
    STORED_OUTCOMES,
    STREAMS,
    WAKEUPS,
    WORK_QUEUES,
    WORKER_CONTROL,
    consumer_name,
    dead_letter_subject,
    encode_model,
)
from schemas.jobs import LANES, Capability

MAPPED_REPLIES = "_R_"
"""The prefix of the subjects under which nats-server hides a reply subject of another account."""
BLOBS_BY_GATEWAYS = (f"$O.{BLOBS_BUCKET}.C.*.*", f"$O.{BLOBS_BUCKET}.M.*")
OF_A_STREAM = ("CREATE", "UPDATE", "INFO", "PURGE", "MSG.GET", "MSG.DELETE")
OF_A_CONSUMER = ("CONSUMER.DURABLE.CREATE", "CONSUMER.INFO", "CONSUMER.MSG.NEXT")


PULL = f"$JS.API.CONSUMER.MSG.NEXT.{JOBS_STREAM}."
"""The prefix of a pull request; the consumer follows. Only pulls have replies of several messages."""
REPLY_ROUTE_S = 15
"""Seconds for which nats-server keeps the reply route after the request, or after the last message of the reply.

It is longer than a worker's longest pull (`workers.demand.LINGER_S`; 10 s in earlier versions), or jobs would be lost on their
way until `ack_wait`, and longer than a slow disk takes to confirm. It is not much longer: each pull leaves a route of 0.7 KB
behind.
"""


@dataclass(frozen=True, slots=True)
class NatsPermissions:
    """Subjects, with wildcards, that a role may use; all others are refused."""

    publish: tuple[str, ...]
    subscribe: tuple[str, ...]

    @property
    def services(self) -> tuple[str, ...]:
        """The services that an account of this role imports: its messages go to NEXUS, the replies come back."""
        return self.publish

    @property
    def streams(self) -> tuple[str, ...]:
        """The streams that an account of this role imports: messages of NEXUS. Inboxes are within its own account."""
        return tuple(subject for subject in self.subscribe if not subject.startswith(f"{INBOX}."))


@dataclass(frozen=True, slots=True)
class AccountExports:
    """What the account NEXUS exports. The operator's configuration says which account imports what."""

    services: tuple[str, ...]
    streams: tuple[str, ...]


def queues_for(models: Iterable[str], capabilities: Iterable[Capability]) -> list[Queue]:
    """Return every lane of these models and capabilities."""
    wanted = list(capabilities)
    return [Queue(capability, lane, model) for model in models for capability in wanted for lane in LANES]


def blobs_by(worker: str) -> tuple[str, ...]:
    """Return the subjects that the worker of this name (`*`: any) writes: chunks and metadata."""
    return (f"$O.{BLOBS_BUCKET}.C.{worker}.*.*", f"$O.{BLOBS_BUCKET}.M.{worker}.*")


def worker_account(user: str) -> str:
    """Return the name of the account of a worker's user."""
    return f"WORKER-{user}"


def account_exports() -> AccountExports:
    """Return the exports for the accounts of all workers and of the monitor."""
    worker = worker_permissions(INBOX, workers=("*",), queues=None)
    monitor = monitor_permissions(INBOX)
    return AccountExports(_each((*worker.services, *monitor.services)), _each((*worker.streams, *monitor.streams)))


def worker_permissions(inbox: str, *, workers: Iterable[str], queues: Iterable[Queue] | None) -> NatsPermissions:
    """Return the permissions of the processes called `workers` (`*`: any name) that serve these queues. None: all queues."""
    names = tuple(workers)
    if queues is None:
        pulls: tuple[str, ...] = (f"$JS.API.CONSUMER.MSG.NEXT.{JOBS_STREAM}.*", f"$JS.ACK.{JOBS_STREAM}.>")
        dead_letters: tuple[str, ...] = (f"{DEAD_LETTERS}.*.*",)
        wakeups: tuple[str, ...] = (f"{WAKEUPS}.*.*.*",)
    else:
        # Jobs that manage a worker's models (pull, load, unload) have a queue of their own.
        own = queues_for((f"worker:{name}" for name in names if name != "*"), (Capability.MODELS,))
        given = [*queues, *own]
        consumers = [consumer_name(*queue) for queue in given]
        pulls = (
            *(f"$JS.API.CONSUMER.MSG.NEXT.{JOBS_STREAM}.{consumer}" for consumer in consumers),
            *(f"$JS.ACK.{JOBS_STREAM}.{consumer}.>" for consumer in consumers),
        )
        dead_letters = _each(dead_letter_subject(queue.capability, queue.model) for queue in given)
        wakeups = _each(f"{WAKEUPS}.{queue.capability}.*.{encode_model(queue.model)}" for queue in given)
    own_blobs = _each(subject for name in names for subject in blobs_by(name))
    return NatsPermissions(
        publish=(
            *pulls,
            f"{REPLIES}.*.*",
            f"{GATE_REQUESTS}.*",
            f"{EVENTS}.*",
            f"{OUTCOMES}.*",
            *dead_letters,
            *own_blobs,
            *(f"$JS.API.DIRECT.GET.{BLOBS_STREAM}.{subject}" for subject in (*BLOBS_BY_GATEWAYS, *own_blobs)),
        ),
        subscribe=(f"{inbox}.>", *(f"{WORKER_CONTROL}.{name}" for name in names), *wakeups),
    )


def gateway_permissions(inbox: str) -> NatsPermissions:
    """Return a gateway's permissions: it owns the streams and their consumers, and deletes no stream."""
    streams = (f"$JS.API.STREAM.{verb}.{stream}" for stream in STREAMS for verb in OF_A_STREAM)
    reads = (f"$JS.API.DIRECT.GET.{stream}{rest}" for stream in STREAMS for rest in ("", ".>"))
    consumers = (f"$JS.API.{verb}.{stream}.*" for stream in STREAMS for verb in OF_A_CONSUMER)
    return NatsPermissions(
        publish=(
            f"{JOBS}.*.*.*",
            f"{BACKLOG}.*.*.*.*",
            f"{EVENTS}.*",
            f"{OUTCOMES}.*",
            f"{DEAD_LETTERS}.*.*",
            f"{WORKER_CONTROL}.*",
            f"{BROADCAST}.*",
            *(f"nexus.{name}.*" for name in WORK_QUEUES),
            f"$KV.{CLAIMS_BUCKET}.*",
            SEAL_SECRET_SUBJECT,
            f"$KV.{CONTENT_KEYS_BUCKET}.*",
            *BLOBS_BY_GATEWAYS,
            f"{REPLIES}.*.*",  # to the gateway of a job that moves from a backlog into its queue
            f"{INBOX}.>",  # replies to workers in this account
            f"{MAPPED_REPLIES}.>",  # and in accounts of their own
            f"{WAKEUPS}.*.*.*",  # a job is delivered again
            *streams,
            *reads,
            *consumers,
            *(f"$JS.API.CONSUMER.{verb}.{JOBS_STREAM}" for verb in ("NAMES", "LIST")),
            *(f"$JS.API.CONSUMER.{verb}.{JOBS_STREAM}.*" for verb in ("DELETE", "PAUSE")),
            *(f"$JS.ACK.{stream}.>" for stream in STREAMS),
        ),
        subscribe=(
            f"{inbox}.>",
            f"{REPLIES}.*.*",
            f"{GATE_REQUESTS}.*",
            f"{STORED_EVENTS}.*",
            f"{STORED_OUTCOMES}.*",
            f"{BROADCAST}.*",
            f"{QUEUE_FREED}.*",
            f"{BACKLOG_NOTICES}.*.*.*.*",
        ),
    )


def monitor_permissions(inbox: str) -> NatsPermissions:
    """Return the monitor's permissions: it reads the states of streams and consumers, and no message."""
    return NatsPermissions(
        publish=(
            "$JS.API.INFO",
            "$JS.API.STREAM.NAMES",
            "$JS.API.STREAM.LIST",
            "$JS.API.STREAM.INFO.*",
            "$JS.API.CONSUMER.NAMES.*",
            "$JS.API.CONSUMER.LIST.*",
            "$JS.API.CONSUMER.INFO.*.*",
        ),
        subscribe=(f"{inbox}.>",),
    )


def _each(subjects: Iterable[str]) -> tuple[str, ...]:
    """Return each subject once, in order."""
    return tuple(dict.fromkeys(subjects))
