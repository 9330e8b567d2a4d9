"""Making the jobs stream and its consumers, and reading them."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import nats.errors
import orjson
from nats.aio.client import Client

from backbone.bus.bus import Queue, QueueDepth, StorageUsage, StreamUsage
from backbone.bus.outage import nats_unavailable
from backbone.bus.subjects import (
    BLOBS_BUCKET,
    BLOBS_STREAM,
    JOBS,
    JOBS_STREAM,
    OUTCOME_CONSUMER,
    OUTCOMES_STREAM,
    STREAMS,
    WAKEUPS,
    consumer_name,
    parse_job_subject,
)
from schemas.errors import Unavailable

API = "$JS.API"
NANO = 1_000_000_000
DUPLICATE_WINDOW_S = 30
"""A submit is repeated for at most 10 s; a longer window costs NATS memory for every job in it."""
STREAM_NOT_FOUND = 10059
CONSUMER_NOT_FOUND = 10014
NO_MESSAGE = 10037
STREAM_NAME_IN_USE = 10058
NO_ROOM = 10047
"""Also said of a stream that is there: nats-server looks for room for a new one before it looks whether it is new."""
FIXED_MAX_CONSUMERS = "can not change MaxConsumers"


@dataclass(frozen=True, slots=True)
class JobsStreamConfig:
    """The bounds of the jobs stream."""

    max_jobs: int = 100_000
    max_per_queue: int = 10_000
    max_bytes: int = 4 * 1024**3
    replicas: int = 1
    max_queues: int = 12_000
    """nats-server takes its own default, 1,000 from 2.15 on, for a stream that does not say."""

    def config(self) -> dict[str, Any]:
        """The stream's configuration, in the JetStream API's terms."""
        return {
            "name": JOBS_STREAM,
            "subjects": [f"{JOBS}.>"],
            "retention": "workqueue",
            "storage": "file",
            "discard": "new",
            "discard_new_per_subject": True,
            "max_msgs": self.max_jobs,
            "max_msgs_per_subject": self.max_per_queue,
            "max_bytes": self.max_bytes,
            "max_age": 0,
            "max_msg_size": -1,
            "max_consumers": self.max_queues,
            "num_replicas": self.replicas,
            "duplicate_window": DUPLICATE_WINDOW_S * NANO,
            "republish": {"src": f"{JOBS}.>", "dest": f"{WAKEUPS}.>", "headers_only": True},
            "allow_direct": True,
        }


@dataclass(frozen=True, slots=True)
class BlobBucketConfig:
    """The bounds of the object store for blobs."""

    max_bytes: int = 4 * 1024**3
    replicas: int = 1
    max_age_s: int = 7 * 24 * 3600
    """Nothing is older than this, whatever lifetime it was given."""

    def config(self) -> dict[str, Any]:
        """Its stream's configuration, in the JetStream API's terms."""
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
            # Whoever may write there could empty all of it by one header: what is written over goes by this instead.
            "max_msgs_per_subject": 1,
            "allow_rollup_hdrs": False,
            "allow_direct": True,
            "allow_msg_ttl": True,
        }


class ApiError(Exception):
    """JetStream answered with an error."""

    def __init__(self, error: dict[str, Any]) -> None:
        super().__init__(error.get("description", "unknown error"))
        self.code = int(error.get("err_code", 0))


async def request(client: Client, subject: str, body: Any = None, timeout_s: float = 2.0) -> dict[str, Any]:
    """One call of the JetStream API. Raises ApiError, and Unavailable: at once where there is no connection."""
    if not client.is_connected:
        raise nats_unavailable()
    cancelled = _cancellations()
    try:
        message = await client.request(
            f"{API}.{subject}", orjson.dumps(body) if body is not None else b"", timeout=timeout_s
        )
    except (nats.errors.Error, OSError, TimeoutError, asyncio.InvalidStateError) as error:
        raise Unavailable("NATS JetStream does not answer") from error
    if _cancellations() > cancelled:
        raise asyncio.CancelledError  # Python 3.11's `wait_for` drops it where the answer comes in the same moment
    answer: dict[str, Any] = orjson.loads(message.data)
    if "error" in answer:
        raise ApiError(answer["error"])
    return answer


def _cancellations() -> int:
    task = asyncio.current_task()
    return task.cancelling() if task is not None else 0


async def ensure_stream(client: Client, stream: JobsStreamConfig) -> None:
    """Make the jobs stream, or bring it to this configuration. Raises Unavailable, also for a server too old for it."""
    await ensure(client, stream.config(), ("republish", "discard_new_per_subject", "max_msgs_per_subject"), "2.10")


async def ensure_bucket(client: Client, bucket: BlobBucketConfig) -> None:
    """The same for the bucket of the blobs."""
    await ensure(client, bucket.config(), ("allow_msg_ttl",), "2.11")


async def ensure(client: Client, config: dict[str, Any], needed: tuple[str, ...], version: str) -> dict[str, Any]:
    """Make a stream, or bring it to this configuration; what JetStream says about it. Raises Unavailable, also when the
    server did not take what is `needed`.
    """
    name = config["name"]
    try:
        try:
            answer = await request(client, f"STREAM.CREATE.{name}", config)
        except ApiError as error:
            if error.code not in {STREAM_NAME_IN_USE, NO_ROOM}:
                raise
            answer = await _update(client, config, error)
    except ApiError as error:
        raise Unavailable(f"NATS refuses the stream {name}: {error}") from error
    kept = answer["config"]
    # Older servers silently ignore what they do not know.
    for key in needed:
        if kept.get(key) != config[key]:
            raise Unavailable(f"this nats-server is too old: it did not take '{key}'. Nexus needs {version} or newer")
    return answer


async def _update(client: Client, config: dict[str, Any], refused: ApiError) -> dict[str, Any]:
    """Change a stream; `refused` is why it could not be made, for one that is not there."""
    subject = f"STREAM.UPDATE.{config['name']}"
    try:
        try:
            return await request(client, subject, config)
        except ApiError as error:
            if FIXED_MAX_CONSUMERS not in str(error):
                raise
            # Servers before 2.14 cannot change this bound. They know no default either, so that the old one may stay.
            there = await request(client, f"STREAM.INFO.{config['name']}")
            return await request(client, subject, config | {"max_consumers": there["config"]["max_consumers"]})
    except ApiError as error:
        raise (refused if error.code == STREAM_NOT_FOUND else error) from error


async def holds_job(client: Client, seq: int, message_id: bytes) -> bool:
    """Whether the jobs stream holds this very job; after a loss of data its sequence is another one's. Raises Unavailable."""
    try:
        answer = await request(client, f"STREAM.MSG.GET.{JOBS_STREAM}", {"seq": seq})
    except ApiError as error:
        if error.code in {NO_MESSAGE, STREAM_NOT_FOUND}:
            return False
        raise Unavailable(f"NATS: {error}") from error
    headers = base64.b64decode(answer["message"].get("hdrs", ""))
    return b": %b\r\n" % message_id in headers


async def read_depths(client: Client, on_missing: Callable[[Queue], None]) -> list[QueueDepth]:
    """Every queue that holds a job; `on_missing` gets those that have no consumer. Raises Unavailable."""
    subjects: dict[str, int] = {}
    try:
        while True:
            body = {"subjects_filter": f"{JOBS}.>", "offset": len(subjects)}
            info = await request(client, f"STREAM.INFO.{JOBS_STREAM}", body)
            page = info["state"].get("subjects") or {}
            subjects |= page
            if not page or len(subjects) >= info.get("total", 0):
                break
        queues = {subject: queue for subject in subjects if (queue := _queue_of(subject)) is not None}
        depths = (_depth(client, queue, subjects[s], on_missing) for s, queue in queues.items())
        return list(await asyncio.gather(*depths))
    except ApiError as error:
        raise Unavailable(f"NATS: {error}") from error


def _queue_of(subject: str) -> Queue | None:
    """Return the queue of a job subject; None for a subject that no gateway made."""
    try:
        return Queue(*parse_job_subject(subject))
    except ValueError:
        return None


async def _depth(client: Client, queue: Queue, stored: int, on_missing: Callable[[Queue], None]) -> QueueDepth:
    running = 0
    try:
        info = await request(client, f"CONSUMER.INFO.{JOBS_STREAM}.{consumer_name(*queue)}")
        running = min(stored, info["num_ack_pending"])
    except ApiError as error:
        if error.code == CONSUMER_NOT_FOUND:
            on_missing(queue)
    return QueueDepth(queue, stored - running, running)


async def read_storage(client: Client) -> StorageUsage:
    """Every stream that exists. Raises Unavailable."""
    rooms = await asyncio.gather(*(_room(client, stream) for stream in STREAMS))
    return StorageUsage(tuple(room for room in rooms if room is not None), await _unrecorded(client))


async def _room(client: Client, stream: str) -> StreamUsage | None:
    try:
        info = await request(client, f"STREAM.INFO.{stream}")
    except ApiError as error:
        if error.code == STREAM_NOT_FOUND:
            return None
        raise Unavailable(f"NATS: {error}") from error
    state, most = info["state"], info["config"]["max_bytes"]
    return StreamUsage(stream, state["messages"], state["bytes"], most if most > 0 else None)


async def _unrecorded(client: Client) -> int:
    try:
        info = await request(client, f"CONSUMER.INFO.{OUTCOMES_STREAM}.{OUTCOME_CONSUMER}")
    except ApiError as error:
        if error.code in {STREAM_NOT_FOUND, CONSUMER_NOT_FOUND}:
            return 0
        raise Unavailable(f"NATS: {error}") from error
    return int(info["num_pending"]) + int(info["num_ack_pending"])
