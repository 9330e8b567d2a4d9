"""Define the question for the newest log lines of a process, and its answer. Only gateways ask.

An answer is one message: JSON `LogAnswer`, and a line for each log line found: a JSON object with `event`, `level` and `timestamp`.
"""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from schemas.names import Subject

MAX_LINES = 2000
MAX_ANSWER_BYTES = 256 * 1024
"""Bytes of lines in one answer."""
LogText = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]


class ProcessKind(StrEnum):
    """The kind of a process that answers."""

    GATEWAY = "gateway"
    WORKER = "worker"


class LogQuery(BaseModel):
    """A question for log lines."""

    model_config = ConfigDict(frozen=True)

    texts: tuple[LogText, ...] = Field(default=(), max_length=16)
    """Ids, one of which a line must contain. None: all lines."""
    after: int = Field(default=0, ge=0)
    """Only lines after the one with this number; see `LogAnswer.last`."""
    limit: int = Field(default=MAX_LINES, ge=1, le=MAX_LINES)
    """The most lines; older ones are left out."""
    max_bytes: int = Field(default=MAX_ANSWER_BYTES, ge=0, le=MAX_ANSWER_BYTES)


class LogRequest(LogQuery):
    """A question to all gateways, with the subject for the answers."""

    reply: Subject


class LogAnswer(BaseModel):
    """What a process says of the lines that it found."""

    model_config = ConfigDict(frozen=True)

    id: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,200}$")]
    """The worker's id, or the gateway's name in its log lines."""
    kind: ProcessKind
    last: int = Field(ge=0)
    """The number of the newest line of the process; a later question begins after it."""
    oldest_at: Annotated[str, StringConstraints(max_length=40)] = ""
    """When the oldest line was logged that the process still has, by the clock of its host."""
    is_complete: bool
    """The process still has every line since its start."""
    has_more: bool
    """There are older lines, which the limits left out."""

    def encode(self, lines: list[bytes]) -> bytes:
        """Return the message."""
        return b"\n".join((self.model_dump_json().encode(), *lines))

    @classmethod
    def decode(cls, message: bytes) -> tuple[LogAnswer, list[dict[str, Any]]]:
        """Return the parts of a message. Raises ValueError.

        A worker may send anything: lines that are no objects are left out.
        """
        if len(message) > 2 * MAX_ANSWER_BYTES:
            raise ValueError("The answer is too large.")
        head, *lines = message.split(b"\n")
        return cls.model_validate_json(head), [line for line in map(_parse, lines[:MAX_LINES]) if line is not None]


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
