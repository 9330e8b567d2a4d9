"""The newest log lines of a process, in memory: what a search by request id reads, without a log server."""

from __future__ import annotations

import os
import re
import threading
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

import orjson

PROMPT_LINE = b'"event":"request.prompt"'
"""Is in the lines that `LOG_PROMPTS` asks for, which stay on their host."""
LINE_OVERHEAD_BYTES = 48
"""Memory that a line takes beside its bytes."""


class LinesFound(NamedTuple):
    """What a search of a ring found."""

    lines: list[bytes]
    """Oldest first."""
    last: int
    """The number of the newest line that the process has logged. Lines are counted from 1."""
    oldest_at: str
    """The timestamp of the oldest line that the ring holds; empty: it holds none."""
    is_complete: bool
    """The ring has dropped no line since the process started."""
    has_more: bool
    """There are older lines that match, which the limits left out."""


class LogRing:
    """Holds the newest lines of a process up to a number of bytes. Threads may use it at once."""

    def __init__(self, max_bytes: int) -> None:
        """Create an empty ring. `max_bytes`: what it may take in memory; 0: it holds nothing."""
        self._max_bytes = max_bytes
        self._reset()
        os.register_at_fork(after_in_child=self._reset)  # a forked process does not answer for its parent

    def _reset(self) -> None:
        self._lines: deque[bytes] = deque()
        self._size = 0
        self._last = 0
        self._lock = threading.Lock()

    def extend(self, lines: Iterable[bytes], size: int) -> None:
        """Add lines of JSON, oldest first, which have `size` bytes together."""
        with self._lock:
            stored = self._lines
            before = len(stored)
            stored.extend(lines)
            added = len(stored) - before
            self._last += added
            size += self._size + added * LINE_OVERHEAD_BYTES
            while size > self._max_bytes and stored:
                size -= len(stored.popleft()) + LINE_OVERHEAD_BYTES
            self._size = size

    def find(self, texts: Iterable[bytes] = (), *, after: int = 0, limit: int, max_bytes: int) -> LinesFound:
        """Return the newest lines that contain one of `texts` (none: all lines) and were logged after line `after`."""
        with self._lock:
            stored, last = list(self._lines), self._last
        candidates = stored[max(0, len(stored) - max(0, last - after)) :]
        found: list[bytes] = []
        has_more = False
        for line in reversed(_containing(candidates, tuple(texts))):
            if PROMPT_LINE in line:
                continue
            max_bytes -= len(line) + 1
            if len(found) == limit or max_bytes < 0:
                has_more = True
                break
            found.append(line)
        found.reverse()
        oldest_at = _timestamp(stored[0]) if stored else ""
        return LinesFound(found, last, oldest_at, last == len(stored), has_more)


def _containing(lines: list[bytes], texts: tuple[bytes, ...]) -> list[bytes]:
    if not texts:
        return lines
    if len(texts) == 1:
        text = texts[0]
        return [line for line in lines if text in line]
    search = re.compile(b"|".join(map(re.escape, texts))).search
    return [line for line in lines if search(line)]


def _timestamp(line: bytes) -> str:
    return str(orjson.loads(line).get("timestamp", ""))
