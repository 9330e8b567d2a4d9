"""Names in NATS: subjects, streams and consumers. Model names are encoded, so that no dot, star or blank gets into a subject."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import lru_cache

from schemas.errors import InvalidRequest
from schemas.jobs import Capability, Lane

JOBS_STREAM = "NEXUS_JOBS"
JOBS = "nexus.jobs"
BACKLOG_STREAM = "NEXUS_BACKLOG"
BACKLOG = "nexus.backlog"
"""The prefix of the subjects on which jobs wait until their owner's turn. The rest is that of the queue's subject, and the owner."""
BACKLOG_NOTICES = "nexus.backlogged"
"""NATS publishes here, without the payload, when a job is stored in a backlog."""
FIRST_BACKLOG_SEQ = 1 << 52
"""Sequences tell in which stream a job waits: those of the jobs stream stay below. They are exact in JSON's numbers."""
BACKLOG_TOKENS = 6
"""Tokens of a backlog's subject."""
WAKEUPS = "nexus.bell"
QUEUE_HOLDS_JOBS = b"again"
"""The message on a wake-up subject of a queue that holds jobs: NATS itself sends none when a job is delivered again."""
QUEUE_FREED = f"$JS.EVENT.ADVISORY.CONSUMER.DELETED.{JOBS_STREAM}"
"""NATS publishes here when a queue's consumer is deleted."""
REPLIES = "nexus.reply"
WORKER_CONTROL = "nexus.control"
BROADCAST = "nexus.notice"
"""The prefix of the subjects on which gateways notify each other; the topic follows."""
BLOBS_BUCKET = "nexus-blobs"
BLOBS_STREAM = f"OBJ_{BLOBS_BUCKET}"
"""Bucket and stream of the object store, in the layout of NATS's own clients and command line."""

EVENTS_STREAM = "NEXUS_EVENTS"
EVENTS = "nexus.events"
STORED_EVENTS = "nexus.told"
"""NATS republishes each event of a durable job here once it is stored."""
OUTCOMES_STREAM = "NEXUS_DONE"
OUTCOMES = "nexus.done"
STORED_OUTCOMES = "nexus.ended"
"""NATS publishes here, without the payload, when an outcome is stored."""
OUTCOME_CONSUMER = "recorder"
"""The consumer of outcomes that all gateways share."""
DEAD_LETTERS_STREAM = "NEXUS_DLQ"
DEAD_LETTERS = "nexus.dlq"
GATE_REQUESTS = "nexus.ask"
"""Subject of the workers' gate requests, and the queue group of the gateways, one of which answers each."""
GATEWAY_GROUP = "gateways"
CLAIMS_BUCKET = "nexus-idempotency"
CLAIMS_STREAM = f"KV_{CLAIMS_BUCKET}"
"""Bucket and stream of the idempotency claims, in the layout of NATS's own clients and command line."""
SEALS_BUCKET = "nexus-seals"
SEALS_STREAM = f"KV_{SEALS_BUCKET}"
"""Bucket and stream of the gateways' secret. Workers have no permission to read it."""
CONTENT_KEYS_BUCKET = "nexus-content-keys"
CONTENT_KEYS_STREAM = f"KV_{CONTENT_KEYS_BUCKET}"
"""Bucket and stream of the content keys of jobs. Workers have no permission to read it."""
SEAL_SECRET_SUBJECT = f"$KV.{SEALS_BUCKET}.secret"

MAX_ENCODED_MODEL_LENGTH = 200
"""Encoded model names are bounded: NATS keeps a folder per consumer, and file names end at 255 bytes."""

_PLAIN = re.compile(rb"[A-Za-z0-9-]+")
_ESCAPE = re.compile(r"_([0-9a-f]{2})")
_BLOB_NAME = re.compile(r"[0-9a-f]{32}")
_TOKEN = re.compile(r"[A-Za-z0-9_-]{1,200}")
_WORK_QUEUE_NAME = re.compile(r"[a-z]{1,32}")
_WORD = r"[!-)+-\-/-=?-~]+"
"""Printable ASCII without `.`, `*` and `>`."""
_SUBJECT = re.compile(rf"{_WORD}(?:\.{_WORD})*".encode())
_PATTERN = re.compile(rf"(?:(?:\*|{_WORD})\.)*(?:\*|>|{_WORD})".encode())
_RESERVED_PREFIXES = (b"nexus.", b"$")
"""The prefixes of all subjects to which Nexus or NATS itself gives a meaning."""
_MAX_REPLY_SUBJECT_LENGTH = 512
_RESERVED_NAMES = frozenset(
    {"jobs", "bell", "reply", "control", "events", "told", "backlog", "backlogged", "done", "ended", "dlq", "ask"}
)


class InvalidSubject(ValueError):
    """The text cannot be a subject in NATS; nothing was sent."""


def require_subject(subject: bytes) -> None:
    """Check a subject to publish to, or a reply subject. Raises InvalidSubject.

    A subject becomes part of a line of NATS's protocol: a blank or a line end in it would begin the next word or command. Empty
    tokens and wildcards mean something else to a server than to the sender.
    """
    if _SUBJECT.fullmatch(subject) is None:
        raise InvalidSubject(f"invalid NATS subject: {subject[:100]!r}")


def require_pattern(subject: bytes) -> None:
    """Check a subject to subscribe to, in which whole tokens may be wildcards. Raises InvalidSubject."""
    if _PATTERN.fullmatch(subject) is None:
        raise InvalidSubject(f"invalid NATS subject for a subscription: {subject[:100]!r}")


def is_reply_subject(reply: bytes) -> bool:
    """Return whether a reply may be sent to this subject, which the requester chose.

    A gateway may publish where a worker may not: a reply must not become a control message to a worker or a call of JetStream.
    """
    return (
        len(reply) <= _MAX_REPLY_SUBJECT_LENGTH
        and not reply.startswith(_RESERVED_PREFIXES)
        and _SUBJECT.fullmatch(reply) is not None
    )


def is_gateway_reply(reply: str) -> bool:
    """Return whether this is a reply subject of a gateway."""
    head, _, rest = reply.partition(f"{REPLIES}.")
    return not head and len(tokens := rest.split(".")) == 2 and all(map(is_token, tokens))


@lru_cache(maxsize=4096)
def encode_model(model: str) -> str:
    """Encode `model` as one token of `[A-Za-z0-9_-]`: every other byte of its UTF-8 form becomes `_` and two hex digits.

    Raises InvalidRequest for an empty name, and for one that is too long once it is encoded.
    """
    raw = model.encode("utf-8", "surrogatepass")
    token = "".join(chr(b) if _PLAIN.fullmatch(bytes((b,))) else f"_{b:02x}" for b in raw)
    if not token or len(token) > MAX_ENCODED_MODEL_LENGTH:
        raise InvalidRequest("The model name is empty or too long. Use 1 to 200 characters.", param="model")
    return token


@lru_cache(maxsize=4096)
def encode_owner(owner: str) -> str:
    """Encode an owner as one token, as `encode_model` does. An owner whose token would be too long gets a digest instead."""
    try:
        return encode_model(owner)
    except InvalidRequest:
        return hashlib.sha256(owner.encode("utf-8", "surrogatepass")).hexdigest()


def decode_model(token: str) -> str:
    """Decode a token of `encode_model`."""
    raw = _ESCAPE.sub(lambda m: chr(int(m[1], 16)), token).encode("latin-1")
    return raw.decode("utf-8", "surrogatepass")


@lru_cache(maxsize=8192)
def job_subject(capability: Capability, lane: Lane, model: str) -> str:
    """Return the subject of the jobs for `model`."""
    return f"{JOBS}.{capability}.{lane}.{encode_model(model)}"


@lru_cache(maxsize=8192)
def consumer_name(capability: Capability, lane: Lane, model: str) -> str:
    """Return the name of the durable consumer of one job subject."""
    return f"{capability}_{lane}_{encode_model(model)}"


def backlog_subject(capability: Capability, lane: Lane, model: str, owner: str) -> str:
    """Return the subject of the jobs of one owner that wait until the owner's turn; no consumer takes them from there."""
    return f"{backlog_prefix(capability, lane, model)}.{encode_owner(owner)}"


def backlog_prefix(capability: Capability, lane: Lane, model: str) -> str:
    """Return the part of a backlog's subjects before the owner."""
    return f"{BACKLOG}.{capability}.{lane}.{encode_model(model)}"


def stream_of_job(seq: int) -> str:
    """Return the stream in which a job with this sequence waits."""
    return BACKLOG_STREAM if seq >= FIRST_BACKLOG_SEQ else JOBS_STREAM


@lru_cache(maxsize=8192)
def parse_backlog_subject(subject: str) -> tuple[Capability, Lane, str, str] | None:
    """Return the parts of a backlog's subject, or of the subject of its notifications; None for any other subject."""
    tokens = subject.split(".")
    if len(tokens) != BACKLOG_TOKENS:
        return None
    try:
        return Capability(tokens[2]), Lane(tokens[3]), decode_model(tokens[4]), decode_model(tokens[5])
    except ValueError:
        return None


def parse_job_subject(subject: str) -> tuple[Capability, Lane, str]:
    """Return the parts of a job subject or a wake-up subject. Raises ValueError."""
    capability, lane, token = subject.split(".")[2:]
    return Capability(capability), Lane(lane), decode_model(token)


def parse_consumer_name(name: str) -> tuple[Capability, Lane, str]:
    """Return the parts of a consumer's name. Raises ValueError."""
    capability, lane, token = name.split("_", 2)
    return Capability(capability), Lane(lane), decode_model(token)


def is_blob_path(path: str) -> bool:
    """Return whether a blob may have this path. Nothing else gets into a subject, where `>` would mean every blob.

    The path of a gateway's blob is its name; that of a worker's blob begins with the worker's name, so that permissions keep
    workers apart.
    """
    writer, dot, name = path.rpartition(".")
    return _BLOB_NAME.fullmatch(name) is not None and (not dot or is_token(writer))


def blob_chunk(path: str, number: int) -> str:
    """Return the subject of one chunk of a blob. Each chunk has its own subject, so that a worker reads by subject, never by
    sequence.
    """
    return f"$O.{BLOBS_BUCKET}.C.{path}.{number}"


def blob_chunks(path: str) -> str:
    """Return the subject of all chunks of a blob, as NATS's own clients name it."""
    return f"$O.{BLOBS_BUCKET}.C.{blob_nuid(path)}"


def blob_nuid(path: str) -> str:
    """Return the part of the chunks' subjects that identifies the blob."""
    return f"{path}.*"


def blob_meta(path: str) -> str:
    """Return the subject of a blob's metadata."""
    writer, dot, name = path.rpartition(".")
    return f"$O.{BLOBS_BUCKET}.M.{writer}{dot}{base64.urlsafe_b64encode(name.encode()).decode()}"


def is_token(name: str) -> bool:
    """Return whether `name` can be one token of a subject: an id of a job or an item, or the name of a claim."""
    return _TOKEN.fullmatch(name) is not None


def require_token(name: str) -> str:
    """Return `name` if it is a token. Raises ValueError; callers' input is checked before."""
    if not is_token(name):
        raise ValueError(f"not a valid token of a subject: {name!r}")
    return name


def dead_letter_subject(capability: Capability, model: str) -> str:
    """Return the subject of a dead letter."""
    return f"{DEAD_LETTERS}.{capability}.{encode_model(model)}"


def claim_subject(name: str) -> str:
    """Return the subject of a claim."""
    return f"$KV.{CLAIMS_BUCKET}.{require_token(name)}"


def work_queue_stream(name: str) -> str:
    """Return the stream of a work queue. Raises ValueError for an invalid name."""
    if not _WORK_QUEUE_NAME.fullmatch(name) or name in _RESERVED_NAMES:
        raise ValueError(f"invalid name of a work queue: {name!r}")
    return f"NEXUS_{name.upper()}"


def work_item_subject(name: str, item_id: str) -> str:
    """Return the subject of a work item."""
    return f"nexus.{name}.{require_token(item_id)}"


USAGE_QUEUE = "usage"
AUDIT_QUEUE = "audit"
WORK_QUEUES = ("hooks", "batches", USAGE_QUEUE, AUDIT_QUEUE)
STREAMS = (
    BACKLOG_STREAM,
    JOBS_STREAM,
    EVENTS_STREAM,
    OUTCOMES_STREAM,
    DEAD_LETTERS_STREAM,
    *(work_queue_stream(name) for name in WORK_QUEUES),
    CLAIMS_STREAM,
    SEALS_STREAM,
    CONTENT_KEYS_STREAM,
    BLOBS_STREAM,
)
"""All streams of Nexus."""
