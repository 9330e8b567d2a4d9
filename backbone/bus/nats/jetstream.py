"""The jobs stream and the bucket of blobs: their configuration, their creation, and their state."""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from backbone.bus.bus import Queue, QueueDepth, StorageUsage, StreamUsage
from backbone.bus.nats.requests import (
    CONSUMER_NOT_FOUND,
    INSUFFICIENT_STORAGE,
    NO_MESSAGE,
    STREAM_NAME_IN_USE,
    STREAM_NOT_FOUND,
    JetStreamError,
    RequestInbox,
    call_api,
)
from backbone.bus.nats.stream_reader import StreamReader
from backbone.bus.subjects import (
    BACKLOG,
    BACKLOG_NOTICES,
    BACKLOG_STREAM,
    BLOBS_BUCKET,
    BLOBS_STREAM,
    DEAD_LETTERS_STREAM,
    FIRST_BACKLOG_SEQ,
    JOBS,
    JOBS_STREAM,
    OUTCOME_CONSUMER,
    OUTCOMES_STREAM,
    STREAMS,
    WAKEUPS,
    consumer_name,
    decode_model,
    parse_backlog_subject,
    parse_consumer_name,
    parse_job_subject,
    stream_of_job,
)
from backbone.retry import Backoff
from schemas.errors import Unavailable

NANO = 1_000_000_000
SETUP_BACKOFF = Backoff(initial_s=0.5)
"""Between attempts to set streams up again after a reconnect."""
DUPLICATE_WINDOW_S = 30
"""A submit is repeated for at most 10 s; a longer window costs NATS memory for every job in it."""
MAX_SINGLE_READS = 32
"""Above this number of queues with jobs, all consumers are listed instead."""
FIXED_MAX_CONSUMERS = "can not change MaxConsumers"


@dataclass(frozen=True, slots=True)
class JobsStreamConfig:
    """The limits of the jobs stream."""

    max_jobs: int = 100_000
    max_per_queue: int = 10_000
    max_bytes: int = 4 * 1024**3
    replicas: int = 1
    max_queues: int = 12_000
    """Without it, nats-server applies its own default, 1,000 from 2.15 on."""

    def config(self) -> dict[str, Any]:
        """Return the stream's configuration in terms of the JetStream API."""
        return self._config(JOBS_STREAM, JOBS, notify=WAKEUPS) | {
            "retention": "workqueue",
            "max_consumers": self.max_queues,
        }

    def backlog_config(self) -> dict[str, Any]:
        """Return the configuration of the stream of backlogs, in which no consumer takes jobs."""
        return self._config(BACKLOG_STREAM, BACKLOG, notify=BACKLOG_NOTICES) | {
            "description": "Nexus: jobs that wait for their owner's turn",
            "retention": "limits",
            "first_seq": FIRST_BACKLOG_SEQ,
        }

    def _config(self, name: str, prefix: str, *, notify: str) -> dict[str, Any]:
        """Return what both streams of waiting jobs have. `notify`: where the headers of each stored job are published."""
        return {
            "name": name,
            "subjects": [f"{prefix}.>"],
            "storage": "file",
            "discard": "new",
            "discard_new_per_subject": True,
            "max_msgs": self.max_jobs,
            "max_msgs_per_subject": self.max_per_queue,
            "max_bytes": self.max_bytes,
            "max_age": 0,
            "max_msg_size": -1,
            "num_replicas": self.replicas,
            "duplicate_window": DUPLICATE_WINDOW_S * NANO,
            "republish": {"src": f"{prefix}.>", "dest": f"{notify}.>", "headers_only": True},
            "allow_direct": True,
        }


@dataclass(frozen=True, slots=True)
class BlobBucketConfig:
    """The limits of the object store for blobs."""

    max_bytes: int = 4 * 1024**3
    replicas: int = 1
    max_age_s: int = 7 * 24 * 3600
    """The maximum lifetime of a blob; a blob with a longer one is deleted after this time."""

    def config(self) -> dict[str, Any]:
        """Return the configuration of the bucket's stream in terms of the JetStream API."""
        return {
            "name": BLOBS_STREAM,
            "subjects": [f"$O.{BLOBS_BUCKET}.C.>", f"$O.{BLOBS_BUCKET}.M.>"],
            "description": "Nexus: bodies and answers too large for a message",
            "retention": "limits",
            "storage": "file",
            "discard": "new",
            "max_bytes": self.max_bytes,
            "max_age": self.max_age_s * NANO,
            "num_replicas": self.replicas,
            # Rollup headers would let any writer empty the bucket: this limit drops overwritten messages instead.
            "max_msgs_per_subject": 1,
            "allow_rollup_hdrs": False,
            "allow_direct": True,
            "allow_msg_ttl": True,
        }


async def ensure_stream(inbox: RequestInbox, stream: JobsStreamConfig) -> None:
    """Create the jobs stream and the stream of backlogs, or update their configuration. Raises Unavailable, also for a server that is too old."""
    await ensure(inbox, stream.config(), ("republish", "discard_new_per_subject", "max_msgs_per_subject"), "2.10")
    await ensure(inbox, stream.backlog_config(), ("republish", "discard_new_per_subject", "first_seq"), "2.10")


async def ensure_bucket(inbox: RequestInbox, bucket: BlobBucketConfig) -> None:
    """Create the bucket of blobs, or update its configuration. Raises Unavailable, also for a server that is too old."""
    await ensure(inbox, bucket.config(), ("allow_msg_ttl",), "2.11")


async def ensure(inbox: RequestInbox, config: dict[str, Any], needed: tuple[str, ...], version: str) -> dict[str, Any]:
    """Create a stream, or update its configuration, and return JetStream's response. Raises Unavailable, also when the server
    has ignored a field of `needed`.
    """
    name = config["name"]
    try:
        try:
            answer = await call_api(inbox, f"STREAM.CREATE.{name}", config)
        except JetStreamError as error:
            if error.code not in {STREAM_NAME_IN_USE, INSUFFICIENT_STORAGE}:
                raise
            answer = await _update(inbox, config, error)
    except JetStreamError as error:
        raise Unavailable(f"NATS cannot create the stream {name}: {error}") from error
    stored_config = answer["config"]
    # Older servers silently ignore unknown fields.
    for key in needed:
        if stored_config.get(key) != config[key]:
            raise Unavailable(f"this nats-server is too old: it ignored '{key}'. Upgrade it to {version} or newer")
    return answer


async def _update(inbox: RequestInbox, config: dict[str, Any], refused: JetStreamError) -> dict[str, Any]:
    """Update a stream. `refused` is raised if the stream does not exist: it says why the stream could not be created."""
    subject = f"STREAM.UPDATE.{config['name']}"
    try:
        try:
            return await call_api(inbox, subject, config)
        except JetStreamError as error:
            if FIXED_MAX_CONSUMERS not in str(error):
                raise
            # Servers before 2.14 cannot change this limit; they apply no default either, so that the old value may stay.
            there = await call_api(inbox, f"STREAM.INFO.{config['name']}")
            return await call_api(inbox, subject, config | {"max_consumers": there["config"]["max_consumers"]})
    except JetStreamError as error:
        raise (refused if error.code == STREAM_NOT_FOUND else error) from error


async def holds_job(inbox: RequestInbox, seq: int, message_id: bytes) -> bool:
    """Return whether NATS holds this very job under its sequence: after a loss of data its sequence belongs to another one. Raises
    Unavailable.
    """
    return await read_job(inbox, seq, message_id) is not None


async def read_job(inbox: RequestInbox, seq: int, message_id: bytes) -> bytes | None:
    """Return the message of a job under its sequence; None: the sequence is that of another one, or of none. Raises Unavailable."""
    try:
        answer = await call_api(inbox, f"STREAM.MSG.GET.{stream_of_job(seq)}", {"seq": seq})
    except JetStreamError as error:
        if error.code in {NO_MESSAGE, STREAM_NOT_FOUND}:
            return None
        raise Unavailable(f"NATS: {error}") from error
    headers = base64.b64decode(answer["message"].get("hdrs", ""))
    # A message that has replaced another one has the other's sequence behind its id.
    is_same = b": %b\r\n" % message_id in headers or b": %b." % message_id in headers
    return base64.b64decode(answer["message"].get("data", "")) if is_same else None


async def find_job(jobs: StreamReader, subject: str, message_id: bytes) -> int | None:
    """Return the sequence of a job near the head of its queue; None: it is not there. Raises Unavailable."""
    messages, _ = await jobs.batch(1, subject)
    ids = ((message.seq, message.header(b"Nats-Msg-Id") or b"") for message in messages)
    return next((seq for seq, found in ids if found == message_id or found.startswith(message_id + b".")), None)


async def read_depths(
    inbox: RequestInbox, on_missing: Callable[[Queue], None], *, jobs: str = ">", backlogs: str = ">"
) -> list[QueueDepth]:
    """Return the depth of every queue that holds a job; `on_missing` gets the queues without a consumer. Raises Unavailable.

    `jobs`, `backlogs`: the subjects of the queues, and of their backlogs.
    """
    try:
        queued, backlogged = await asyncio.gather(
            read_subjects(inbox, JOBS_STREAM, jobs), read_subjects(inbox, BACKLOG_STREAM, backlogs)
        )
        in_backlogs: Counter[Queue] = Counter()
        for subject, count in backlogged.items():
            if (parts := parse_backlog_subject(subject)) is not None:
                in_backlogs[Queue(*parts[:3])] += count
        stored = {queue: count for subject, count in queued.items() if (queue := _queue_of(subject)) is not None}
        queues = list(dict.fromkeys((*stored, *in_backlogs)))
        consumers = await _read_consumers(inbox, queues)
    except JetStreamError as error:
        raise Unavailable(f"NATS: {error}") from error
    for queue in queues:
        if queue not in consumers:
            on_missing(queue)
    return [_depth(queue, stored.get(queue, 0), in_backlogs[queue], consumers.get(queue)) for queue in queues]


def _depth(queue: Queue, stored: int, backlogged: int, consumer: dict[str, Any] | None) -> QueueDepth:
    running = min(stored, consumer["num_ack_pending"]) if consumer is not None else 0
    next_seq = consumer["delivered"]["stream_seq"] + 1 if consumer is not None else 1
    return QueueDepth(queue, stored - running + backlogged, running, backlogged, next_seq)


async def _read_consumers(inbox: RequestInbox, queues: list[Queue]) -> dict[Queue, dict[str, Any]]:
    """Return NATS's description of the consumers of these queues that have one. Raises Unavailable, JetStreamError."""
    if len(queues) > MAX_SINGLE_READS:
        return await _list_consumers(inbox)
    found = await asyncio.gather(*(_read_consumer(inbox, queue) for queue in queues))
    return {queue: info for queue, info in zip(queues, found, strict=True) if info is not None}


async def _read_consumer(inbox: RequestInbox, queue: Queue) -> dict[str, Any] | None:
    try:
        return await call_api(inbox, f"CONSUMER.INFO.{JOBS_STREAM}.{consumer_name(*queue)}")
    except JetStreamError as error:
        if error.code == CONSUMER_NOT_FOUND:
            return None
        raise


async def _list_consumers(inbox: RequestInbox) -> dict[Queue, dict[str, Any]]:
    """Return NATS's description of all consumers: a few large answers cost less than one for each queue."""
    found: dict[Queue, dict[str, Any]] = {}
    offset, total = 0, 1
    while offset < total:
        page = await call_api(inbox, f"CONSUMER.LIST.{JOBS_STREAM}", {"offset": offset})
        infos, total = page.get("consumers") or [], page["total"]
        if not infos:
            break
        offset += len(infos)
        for info in infos:
            with contextlib.suppress(ValueError):  # a consumer of somebody else
                found[Queue(*parse_consumer_name(info["name"]))] = info
    return found


async def read_dead_letter_counts(inbox: RequestInbox) -> dict[str, int]:
    """Return how many dead letters each model has that has any. Raises Unavailable."""
    try:
        subjects = await read_subjects(inbox, DEAD_LETTERS_STREAM)
    except JetStreamError as error:
        if error.code == STREAM_NOT_FOUND:
            return {}
        raise Unavailable(f"NATS: {error}") from error
    counts: Counter[str] = Counter()
    for subject, count in subjects.items():
        counts[decode_model(subject.rpartition(".")[2])] += count
    return counts


async def read_subjects(inbox: RequestInbox, stream: str, subject: str = ">") -> dict[str, int]:
    """Return how many messages each subject of a stream holds. Raises Unavailable, JetStreamError."""
    found: dict[str, int] = {}
    while True:
        info = await call_api(inbox, f"STREAM.INFO.{stream}", {"subjects_filter": subject, "offset": len(found)})
        page = info["state"].get("subjects") or {}
        found |= page
        if not page or len(found) >= info.get("total", 0):
            return found


def _queue_of(subject: str) -> Queue | None:
    """Return the queue of a job subject; None for a subject that no gateway made."""
    try:
        return Queue(*parse_job_subject(subject))
    except ValueError:
        return None


async def read_storage(inbox: RequestInbox) -> StorageUsage:
    """Return the size of every stream that exists. Raises Unavailable."""
    usages = await asyncio.gather(*(_stream_usage(inbox, stream) for stream in STREAMS))
    return StorageUsage(tuple(usage for usage in usages if usage is not None), await _unrecorded(inbox))


async def _stream_usage(inbox: RequestInbox, stream: str) -> StreamUsage | None:
    try:
        info = await call_api(inbox, f"STREAM.INFO.{stream}")
    except JetStreamError as error:
        if error.code == STREAM_NOT_FOUND:
            return None
        raise Unavailable(f"NATS: {error}") from error
    state, most = info["state"], info["config"]["max_bytes"]
    return StreamUsage(stream, state["messages"], state["bytes"], most if most > 0 else None)


async def _unrecorded(inbox: RequestInbox) -> int:
    try:
        info = await call_api(inbox, f"CONSUMER.INFO.{OUTCOMES_STREAM}.{OUTCOME_CONSUMER}")
    except JetStreamError as error:
        if error.code in {STREAM_NOT_FOUND, CONSUMER_NOT_FOUND}:
            return 0
        raise Unavailable(f"NATS: {error}") from error
    return int(info["num_pending"]) + int(info["num_ack_pending"])
