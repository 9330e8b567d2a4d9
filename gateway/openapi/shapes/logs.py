"""The response bodies of the routes of logs."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from schemas.logs import ProcessKind


class LogLine(BaseModel):
    """One log line of a gateway or a worker."""

    object: Literal["log_line"]
    process: str
    """The worker's id, or the gateway's name."""
    kind: ProcessKind
    timestamp: str
    """ISO 8601 in UTC, by the clock of the process's host."""
    level: str
    event: str
    """A key such as `request.finished`, or the text of a library's line."""
    fields: dict[str, Any]


class LogProcess(BaseModel):
    """A process that was asked."""

    id: str
    kind: ProcessKind
    answered: bool
    """False: it did not answer within two seconds, and its lines are missing."""
    lines: int
    oldest_at: str | None
    """How far back the process's lines reach; null: it has none."""
    is_complete: bool | None
    """The process has every line since its start."""
    has_more: bool | None
    """Older lines of the process were left out."""


class LogLineList(BaseModel):
    """The log lines that were found, oldest first."""

    object: Literal["list"]
    data: list[LogLine]
    has_more: bool
    """Older lines were left out."""
    processes: list[LogProcess]


class WorkerLogLines(BaseModel):
    """The newest log lines of one worker, oldest first."""

    object: Literal["list"]
    data: list[LogLine]
    has_more: bool
    """Older lines were left out."""
