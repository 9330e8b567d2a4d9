"""The streams and consumers of durable jobs: their configuration and creation."""

from __future__ import annotations

from typing import Any

from backbone.bus.job_log import Retention
from backbone.bus.nats.jetstream import NANO, ensure
from backbone.bus.nats.requests import JetStreamError, RequestInbox, call_api
from backbone.bus.subjects import (
    AUDIT_QUEUE,
    CLAIMS_BUCKET,
    CLAIMS_STREAM,
    CONTENT_KEYS_BUCKET,
    CONTENT_KEYS_STREAM,
    DEAD_LETTERS,
    DEAD_LETTERS_STREAM,
    EVENTS,
    EVENTS_STREAM,
    OUTCOMES,
    OUTCOMES_STREAM,
    SEALS_BUCKET,
    SEALS_STREAM,
    STORED_EVENTS,
    STORED_OUTCOMES,
    USAGE_QUEUE,
    work_queue_stream,
)
from schemas.errors import Unavailable

DUPLICATE_WINDOW_S = 120
"""A message id is stored once within this time."""
EVENTS_DUPLICATE_WINDOW_S = 1
"""Events carry no message id: readers drop duplicates."""
MAX_WORK_ITEMS = 1_000_000
MAX_ACK_PENDING = 100_000
MIN_SERVER_VERSION = "2.10"

Config = dict[str, Any]


def _stream(
    name: str, subjects: str, retention: Retention, max_age_s: float, window_s: float = DUPLICATE_WINDOW_S
) -> Config:
    window = min(window_s, max_age_s) if max_age_s else window_s
    return {
        "name": name,
        "subjects": [subjects],
        "retention": "limits",
        "storage": "file",
        "discard": "old",
        "max_age": int(max_age_s * NANO),
        "max_bytes": -1,
        "max_msgs": -1,
        "max_msgs_per_subject": -1,
        "max_msg_size": -1,
        "max_consumers": -1,
        "num_replicas": retention.replicas,
        "duplicate_window": int(window * NANO),
        "allow_direct": True,
    }


def events_stream(retention: Retention) -> Config:
    """Configure the stream of events: the oldest make room for new ones, and each is republished to its readers."""
    return _stream(EVENTS_STREAM, f"{EVENTS}.>", retention, retention.events_s, EVENTS_DUPLICATE_WINDOW_S) | {
        "description": "Nexus: events of durable jobs",
        "max_bytes": retention.max_event_bytes,
        "republish": {"src": f"{EVENTS}.>", "dest": f"{STORED_EVENTS}.>"},
    }


def outcomes_stream(retention: Retention) -> Config:
    """Configure the stream of outcomes: one message per subject, the first. A full stream refuses messages:
    `outcome_retention` deletes recorded outcomes before.
    """
    return _stream(OUTCOMES_STREAM, f"{OUTCOMES}.>", retention, retention.jobs_s) | {
        "description": "Nexus: how durable jobs ended",
        "discard": "new",
        "discard_new_per_subject": True,
        "max_msgs_per_subject": 1,
        "max_bytes": retention.max_outcome_bytes,
        "republish": {"src": f"{OUTCOMES}.>", "dest": f"{STORED_OUTCOMES}.>", "headers_only": True},
    }


def dead_letters_stream(retention: Retention) -> Config:
    """Configure the stream of dead letters; the oldest make room."""
    return _stream(DEAD_LETTERS_STREAM, f"{DEAD_LETTERS}.>", retention, retention.dead_letters_s) | {
        "description": "Nexus: jobs that failed for good, to be looked at",
        "max_bytes": retention.max_dead_letter_bytes,
    }


def claims_stream(retention: Retention) -> Config:
    """Configure the key-value bucket of the claims, as NATS's own clients do."""
    return _stream(CLAIMS_STREAM, f"$KV.{CLAIMS_BUCKET}.>", retention, retention.claims_s) | {
        "description": "Nexus: which job an idempotency key belongs to",
        "discard": "new",
        "max_msgs_per_subject": 1,
        "allow_rollup_hdrs": True,
        "deny_delete": True,
    }


def seals_stream(retention: Retention) -> Config:
    """Configure the key-value bucket of the gateways' secret. It has no maximum age: what it seals must not outlive it."""
    return _stream(SEALS_STREAM, f"$KV.{SEALS_BUCKET}.>", retention, 0) | {
        "description": "Nexus: the secret by which gateways know their own",
        "discard": "new",
        "max_msgs_per_subject": 1,
        "allow_rollup_hdrs": True,
        "deny_delete": True,
    }


def content_keys_stream(retention: Retention) -> Config:
    """Configure the key-value bucket of jobs' content keys. Its messages can be deleted, each with its bytes."""
    longest_s = retention.jobs_s + retention.dead_letters_s
    return _stream(CONTENT_KEYS_STREAM, f"$KV.{CONTENT_KEYS_BUCKET}.>", retention, longest_s) | {
        "description": "Nexus: the keys of what is stored of jobs",
        "discard": "new",
        "max_msgs_per_subject": 1,
        "allow_rollup_hdrs": True,
    }


async def ensure_content_keys(inbox: RequestInbox, retention: Retention) -> None:
    """Create the bucket of content keys. Raises Unavailable."""
    await ensure(inbox, content_keys_stream(retention), ("allow_direct", "max_msgs_per_subject"), MIN_SERVER_VERSION)


def work_queue_config(name: str, retention: Retention) -> Config:
    """Configure a work queue of the gateways. Those of events are bounded, as their consumers may be away for long."""
    max_bytes = {USAGE_QUEUE: retention.max_usage_bytes, AUDIT_QUEUE: retention.max_audit_bytes}.get(name, -1)
    bounded = max_bytes >= 0
    max_age_s = retention.usage_s if name == USAGE_QUEUE else 0
    return _stream(work_queue_stream(name), f"nexus.{name}.*", retention, max_age_s) | {
        "max_bytes": max_bytes,
        "description": f"Nexus: work of the gateways: {name}",
        "retention": "workqueue",
        "discard": "new",
        "max_msgs": -1 if bounded else MAX_WORK_ITEMS,
    }


async def ensure_job_streams(inbox: RequestInbox, retention: Retention) -> str:
    """Create all streams but the work queues, and return when the stream of events was first created, by NATS's clock. Raises
    Unavailable.
    """
    info = await ensure(inbox, events_stream(retention), ("republish", "allow_direct"), MIN_SERVER_VERSION)
    needed = ("republish", "discard_new_per_subject", "max_msgs_per_subject", "allow_direct")
    await ensure(inbox, outcomes_stream(retention), needed, MIN_SERVER_VERSION)
    await ensure(inbox, dead_letters_stream(retention), ("allow_direct",), MIN_SERVER_VERSION)
    await ensure(inbox, claims_stream(retention), ("allow_direct", "max_msgs_per_subject"), MIN_SERVER_VERSION)
    await ensure(inbox, seals_stream(retention), ("allow_direct", "max_msgs_per_subject"), MIN_SERVER_VERSION)
    return str(info["created"])


async def ensure_pull_consumer(inbox: RequestInbox, stream: str, consumer: str, ack_wait_s: float) -> None:
    """Create the consumer that all gateways share, or update its `ack_wait_s`. Raises Unavailable.

    It has as many replicas as its stream by default: a backup of three replicas can be restored into one.
    """
    config = {
        "durable_name": consumer,
        "ack_policy": "explicit",
        "ack_wait": int(ack_wait_s * NANO),
        "max_deliver": -1,
        "max_ack_pending": MAX_ACK_PENDING,
        "deliver_policy": "all",
        "replay_policy": "instant",
        "num_replicas": 0,
    }
    try:
        await call_api(inbox, f"CONSUMER.DURABLE.CREATE.{stream}.{consumer}", {"stream_name": stream, "config": config})
    except JetStreamError as error:
        raise Unavailable(f"NATS cannot create the consumer {consumer} of {stream}: {error}") from error


async def ensure_work_queue(inbox: RequestInbox, name: str, retention: Retention) -> None:
    """Create the stream of a work queue. Raises Unavailable."""
    await ensure(inbox, work_queue_config(name, retention), (), MIN_SERVER_VERSION)
