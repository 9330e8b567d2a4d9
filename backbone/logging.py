"""Structured logs on standard output: sentences on a terminal, else one JSON object per line."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import sys
import threading
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Literal

import orjson
import structlog

from backbone.log_ring import LogRing
from backbone.terminal_log import TerminalRenderer, is_terminal
from schemas.logs import LogAnswer, LogQuery, ProcessKind

FLUSH_INTERVAL_S = 0.1
"""Lines below `warning` are written together at this interval: a write per line would cost more than the line."""
FLUSH_BYTES = 16 * 1024


class BufferedLogger:
    """A structlog logger that writes JSON lines to standard output, many at a time; warnings and worse at once."""

    def __init__(self, ring: LogRing) -> None:
        """Create a logger. `ring`: receives the lines too, when they are written."""
        self._ring = ring
        self._reset()
        # A forked process has neither its parent's threads nor the right to its parent's lines.
        os.register_at_fork(after_in_child=self._reset)
        atexit.register(self.flush)

    def _reset(self) -> None:
        self._lines: list[bytes] = []
        self._size = 0
        self._lock = threading.Lock()
        self._flush_due = threading.Event()
        self._has_thread = False

    def msg(self, line: bytes) -> None:
        """Buffer one line."""
        with self._lock:
            self._lines.append(line)
            self._size += len(line)
            full = self._size > FLUSH_BYTES
        if full:
            self.flush()
        elif not self._flush_due.is_set():
            self._flush_due.set()
            if not self._has_thread:
                self._has_thread = True
                threading.Thread(target=self._flush_when_due, name="log-writer", daemon=True).start()

    debug = info = msg

    def urgent(self, line: bytes) -> None:
        """Write one line now, and the buffered ones before it."""
        self.msg(line)
        self.flush()

    warning = warn = error = critical = exception = fatal = urgent

    def flush(self) -> None:
        """Write the buffered lines."""
        with self._lock:
            lines, size, self._lines, self._size = self._lines, self._size, [], 0
            if lines:
                self._ring.extend(lines, size)
                # The reader of the output may be gone; requests must not fail by that.
                with contextlib.suppress(OSError, ValueError):
                    sys.stdout.buffer.write(b"\n".join((*lines, b"")))
                    sys.stdout.buffer.flush()

    def _flush_when_due(self) -> None:
        never = threading.Event()
        while True:
            self._flush_due.wait()
            never.wait(FLUSH_INTERVAL_S)
            self._flush_due.clear()
            self.flush()


_ring = LogRing(0)
"""The newest lines of this process."""
_flush: Callable[[], None] = lambda: None  # noqa: E731
"""Moves lines that are buffered into the ring."""
_lines: BufferedLogger | None = None
"""Takes the lines of `log_info`; None: structlog does, for a terminal, or because such lines are not wanted."""


def log_info(event: str, fields: Mapping[str, Any]) -> None:
    """Write one line of level `info`, as `structlog.get_logger().info(event, **fields)` does, at a quarter of its cost.

    For the lines that each request or attempt writes.
    """
    lines = _lines
    if lines is None:
        _structlog.info(event, **fields)
        return
    now = datetime.now(UTC).isoformat().replace("+00:00", "Z")
    line = {**fields, "event": event, "level": "info", "timestamp": now}
    for name, value in structlog.contextvars.get_contextvars().items():
        line.setdefault(name, value)
    lines.msg(orjson.dumps(line, default=str))


_structlog = structlog.get_logger(__name__)


def answer_log_query(query: LogQuery, kind: ProcessKind, process: str) -> bytes:
    """Return the answer of this process, in the form of `schemas.logs.LogAnswer`. `process`: the id of a worker, or a gateway's name."""
    _flush()
    found = _ring.find(
        [text.encode() for text in query.texts], after=query.after, limit=query.limit, max_bytes=query.max_bytes
    )
    answer = LogAnswer(
        id=process,
        kind=kind,
        last=found.last,
        oldest_at=found.oldest_at,
        is_complete=found.is_complete,
        has_more=found.has_more,
    )
    return answer.encode(found.lines)


def _dumps(event: Any, **_: Any) -> bytes:
    return orjson.dumps(event, default=str)


def _keep_line(_logger: Any, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Add a line to the ring that is not written by `BufferedLogger`."""
    now = datetime.now(UTC).isoformat().replace("+00:00", "Z")
    line = _dumps({**event, "timestamp": now})
    _ring.extend([line], len(line))
    return event


def configure_logging(log_format: Literal["auto", "json", "console"], level: str, *, ring_bytes: int = 0) -> None:
    """Configure structlog, and format the records of `logging` the same way. Call it once, at startup.

    `auto`: `console` on a terminal, else `json`. `ring_bytes`: memory for the newest lines, which `answer_log_query` searches.
    """
    console = log_format == "console" or (log_format == "auto" and is_terminal())
    number = getattr(logging, level.upper())
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False)
        if console
        else structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    renderer: structlog.typing.Processor = (
        TerminalRenderer(colors=is_terminal()) if console else structlog.processors.JSONRenderer(_dumps)
    )
    global _lines, _ring, _flush  # noqa: PLW0603 - a process has one standard output
    _ring = LogRing(ring_bytes)
    output = None if console else BufferedLogger(_ring)
    _lines = output if number <= logging.INFO else None
    _flush = output.flush if output is not None else lambda: None
    structlog.configure(
        processors=[*shared, *([_keep_line] if console else []), renderer],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.PrintLoggerFactory() if output is None else lambda *_: output,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stdout)
    formatter_renderer = (
        renderer if console else structlog.processors.JSONRenderer(lambda event, **_: _dumps(event).decode())
    )
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, _keep_line, formatter_renderer],
            foreign_pre_chain=shared,
        )
    )
    # asyncio logs this for each TLS connection whose peer closes it.
    handler.addFilter(lambda record: "eof_received() has no effect" not in record.getMessage())
    logging.basicConfig(handlers=[handler], level=max(number, logging.WARNING), force=True)
