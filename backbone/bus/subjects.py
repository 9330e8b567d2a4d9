"""Names on the wire: subjects, streams, consumers. Model names are encoded so that no dot, star or space gets there."""

from __future__ import annotations

import base64
import re
from functools import lru_cache

from schemas.errors import InvalidRequest
from schemas.jobs import Capability, Lane

JOBS_STREAM = "NEXUS_JOBS"
JOBS = "nexus.jobs"
WAKEUPS = "nexus.bell"
QUEUE_HOLDS_JOBS = b"again"
"""What a gateway says there of a queue that holds jobs: NATS does not wake anybody when a job comes again."""
QUEUE_FREED = f"$JS.EVENT.ADVISORY.CONSUMER.DELETED.{JOBS_STREAM}"
"""Where NATS says that a queue's consumer was deleted."""
REPLIES = "nexus.reply"
WORKER_CONTROL = "nexus.control"
BROADCAST = "nexus.notice"
"""The prefix of the subjects on which gateways notify each other; the topic follows."""
BLOBS_BUCKET = "nexus-blobs"
BLOBS_STREAM = f"OBJ_{BLOBS_BUCKET}"
"""Bucket and stream of the object store; its layout is that of NATS's own clients and command line."""

EVENTS_STREAM = "NEXUS_EVENTS"
EVENTS = "nexus.events"
STORED_EVENTS = "nexus.told"
"""Where NATS repeats each event of a durable job once it is stored."""
OUTCOMES_STREAM = "NEXUS_DONE"
OUTCOMES = "nexus.done"
STORED_OUTCOMES = "nexus.ended"
"""Where NATS says, without repeating it, that a terminal word is stored."""
OUTCOME_CONSUMER = "recorder"
"""The consumer of terminal words that all gateways share."""
DEAD_LETTERS_STREAM = "NEXUS_DLQ"
DEAD_LETTERS = "nexus.dlq"
GATE_REQUESTS = "nexus.ask"
"""Where workers ask about durable jobs, and the queue group of the gateways, of which one answers."""
GATEWAY_GROUP = "gateways"
CLAIMS_BUCKET = "nexus-idempotency"
CLAIMS_STREAM = f"KV_{CLAIMS_BUCKET}"
"""Bucket and stream of the idempotency claims; the layout is that of NATS's own clients and command line."""
SEALS_BUCKET = "nexus-seals"
SEALS_STREAM = f"KV_{SEALS_BUCKET}"
"""Bucket and stream of the gateways' secret, which workers have no right to."""
SEAL_SECRET_SUBJECT = f"$KV.{SEALS_BUCKET}.secret"

MAX_ENCODED_MODEL_LENGTH = 200
"""Encoded model names are bounded: NATS keeps a folder per consumer, and file names end at 255 bytes."""

_PLAIN = re.compile(rb"[A-Za-z0-9-]+")
_ESCAPE = re.compile(r"_([0-9a-f]{2})")
_BLOB_NAME = re.compile(r"[0-9a-f]{32}")
_TOKEN = re.compile(r"[A-Za-z0-9_-]{1,200}")
_BACKLOG = re.compile(r"[a-z]{1,32}")
_WORD = r"[!-)+-\-/-=?-~]+"
"""Printable ASCII without `.`, `*` and `>`."""
_SUBJECT = re.compile(rf"{_WORD}(?:\.{_WORD})*".encode())
_PATTERN = re.compile(rf"(?:(?:\*|{_WORD})\.)*(?:\*|>|{_WORD})".encode())
_OWN = (b"nexus.", b"$")
"""Before every subject that Nexus or NATS itself gives a meaning to."""
_MAX_ADDRESS = 512
_TAKEN = frozenset({"jobs", "bell", "reply", "control", "events", "told", "done", "ended", "dlq", "ask"})


class InvalidSubject(ValueError):
    """This cannot be a subject in NATS: nothing was sent."""


def require_subject(subject: bytes) -> None:
    """Check a subject to publish to, or an address for the answer. Raises InvalidSubject.

    The subject becomes a word of a line of NATS's protocol: a blank in it, or the end of a line, would begin the next word or
    the next command. Empty tokens and wildcards mean something else to a server than to the sender.
    """
    if _SUBJECT.fullmatch(subject) is None:
        raise InvalidSubject(f"not a subject: {subject[:100]!r}")


def require_pattern(subject: bytes) -> None:
    """Check a subject to subscribe to, where whole tokens may be wildcards. Raises InvalidSubject."""
    if _PATTERN.fullmatch(subject) is None:
        raise InvalidSubject(f"not a subject to subscribe to: {subject[:100]!r}")


def is_reply_subject(reply: bytes) -> bool:
    """Report whether an answer may go to this subject, which the sender of a question chose.

    A gateway may publish where a worker may not: an answer must not become an order to a worker or a call of JetStream.
    """
    return len(reply) <= _MAX_ADDRESS and not reply.startswith(_OWN) and _SUBJECT.fullmatch(reply) is not None


@lru_cache(maxsize=4096)
def encode_model(model: str) -> str:
    """`model` as one token of `[A-Za-z0-9_-]`: every other byte of its UTF-8 form becomes `_` and two hex digits.

    Raises InvalidRequest for an empty name and for one that is too long once encoded.
    """
    raw = model.encode("utf-8", "surrogatepass")
    token = "".join(chr(b) if _PLAIN.fullmatch(bytes((b,))) else f"_{b:02x}" for b in raw)
    if not token or len(token) > MAX_ENCODED_MODEL_LENGTH:
        raise InvalidRequest("this model name is empty or too long", param="model")
    return token


def decode_model(token: str) -> str:
    """Inverse of `encode_model`."""
    raw = _ESCAPE.sub(lambda m: chr(int(m[1], 16)), token).encode("latin-1")
    return raw.decode("utf-8", "surrogatepass")


@lru_cache(maxsize=8192)
def job_subject(capability: Capability, lane: Lane, model: str) -> str:
    """Where a job for `model` is published."""
    return f"{JOBS}.{capability}.{lane}.{encode_model(model)}"


@lru_cache(maxsize=8192)
def consumer_name(capability: Capability, lane: Lane, model: str) -> str:
    """The durable consumer of one job subject."""
    return f"{capability}_{lane}_{encode_model(model)}"


def parse_job_subject(subject: str) -> tuple[Capability, Lane, str]:
    """Inverse of `job_subject` (bell subjects have the same tail). Raises ValueError."""
    capability, lane, token = subject.split(".")[2:]
    return Capability(capability), Lane(lane), decode_model(token)


def parse_consumer_name(name: str) -> tuple[Capability, Lane, str]:
    """Inverse of `consumer_name`. Raises ValueError."""
    capability, lane, token = name.split("_", 2)
    return Capability(capability), Lane(lane), decode_model(token)


def is_blob_path(path: str) -> bool:
    """Whether a blob may be there: nothing else gets into a subject, where `>` would mean every blob.

    A gateway's is its name; a worker's is below the worker's own name, so that rights keep workers from each other's.
    """
    writer, dot, name = path.rpartition(".")
    return _BLOB_NAME.fullmatch(name) is not None and (not dot or is_token(writer))


def blob_chunk(path: str, number: int) -> str:
    """Where one part of a blob is. Each has a subject of its own, so that a worker reads by subject, never by sequence."""
    return f"$O.{BLOBS_BUCKET}.C.{path}.{number}"


def blob_chunks(path: str) -> str:
    """All parts of a blob. Its description names them so, too, for NATS's own clients."""
    return f"$O.{BLOBS_BUCKET}.C.{blob_nuid(path)}"


def blob_nuid(path: str) -> str:
    """What stands for a blob in the subject of its parts."""
    return f"{path}.*"


def blob_meta(path: str) -> str:
    """Where a blob is described."""
    writer, dot, name = path.rpartition(".")
    return f"$O.{BLOBS_BUCKET}.M.{writer}{dot}{base64.urlsafe_b64encode(name.encode()).decode()}"


def is_token(name: str) -> bool:
    """Whether `name` can be one token of a subject: ids of jobs, of items, names of claims."""
    return _TOKEN.fullmatch(name) is not None


def require_token(name: str) -> str:
    """`name`, where it is a token. Raises ValueError: what comes from callers is checked before."""
    if not is_token(name):
        raise ValueError(f"not a token of a subject: {name!r}")
    return name


def dead_letter_subject(capability: Capability, model: str) -> str:
    """Where a dead letter is published."""
    return f"{DEAD_LETTERS}.{capability}.{encode_model(model)}"


def claim_subject(name: str) -> str:
    """Where a claim is."""
    return f"$KV.{CLAIMS_BUCKET}.{require_token(name)}"


def work_queue_stream(name: str) -> str:
    """The stream of a backlog. Raises ValueError for a name that cannot be one."""
    if not _BACKLOG.fullmatch(name) or name in _TAKEN:
        raise ValueError(f"no backlog can be called {name!r}")
    return f"NEXUS_{name.upper()}"


def work_item_subject(name: str, item_id: str) -> str:
    """Where an item of a backlog is published."""
    return f"nexus.{name}.{require_token(item_id)}"


WORK_QUEUES = ("hooks", "batches")
STREAMS = (
    JOBS_STREAM,
    EVENTS_STREAM,
    OUTCOMES_STREAM,
    DEAD_LETTERS_STREAM,
    *(work_queue_stream(name) for name in WORK_QUEUES),
    CLAIMS_STREAM,
    SEALS_STREAM,
    BLOBS_STREAM,
)
"""All of Nexus's."""
