"""Hold the events that NATS has not stored yet, in memory that outlives the process.

The journal is a set of segments: memory-mapped files of a fixed size. What was copied into one survives a kill of the process,
since the pages belong to the kernel; it does not survive a loss of the machine. Each file is locked by its process: a file
without a lock belongs to a dead process, and the next gateway with the same folder takes its events over.

A segment holds lines, and zeros behind them. Its first line names the batch, so that a batch that is sent again folds.
Without a folder the segments are anonymous memory.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from backbone.ids import new_token

SEGMENT_BYTES = 256 * 1024
"""A batch is at most this large, less than a message of NATS may be."""
MAX_SEGMENTS = 256
"""64 MiB: about 160,000 events."""
SUFFIX = ".usage"


class EventBatch(NamedTuple):
    """Events to be stored in one message."""

    id: str
    lines: bytes


class Segment:
    """One part of the journal."""

    def __init__(self, path: Path | None) -> None:
        """Map a new file; None: anonymous memory. Raises OSError."""
        self.path = path
        self._fd = -1
        if path is not None:
            made = path.with_suffix(
                ""
            )  # it gets its name once it is locked, lest another gateway takes it for an orphan
            self._fd = os.open(made, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.write(self._fd, bytes(SEGMENT_BYTES))  # a full disk is noticed here, not by a signal at the first access
            made.rename(path)
        self._map = mmap.mmap(self._fd, SEGMENT_BYTES)
        self._head = self._end = 0
        self.batch_id = ""

    def open(self) -> None:
        """Begin a batch."""
        self.batch_id = new_token()
        line = self.batch_id.encode() + b"\n"
        self._map[: len(line)] = line
        self._head = self._end = len(line)

    @property
    def is_empty(self) -> bool:
        """Whether the batch has no events."""
        return self._end == self._head

    def append(self, line: bytes) -> bool:
        """Write an event down. False: the segment has no room for it."""
        end = self._end
        new_end = end + len(line)
        if new_end > SEGMENT_BYTES:
            return False
        self._map[end:new_end] = line
        self._end = new_end
        return True

    def batch(self) -> EventBatch:
        """Return the events."""
        return EventBatch(self.batch_id, self._map[self._head : self._end])

    def clear(self) -> None:
        """Forget the events."""
        self._map[: self._end] = bytes(self._end)
        self._head = self._end = 0

    def close(self) -> None:
        """Unmap, and remove the file unless it holds events."""
        empty = self.is_empty
        self._map.close()
        if self._fd >= 0:
            if empty and self.path is not None:
                self.path.unlink(missing_ok=True)
            os.close(self._fd)


class UsageJournal:
    """The segments of one process. One is written to; the others wait until NATS has stored them, or are free."""

    def __init__(self, folder: Path | None, suffix: str = SUFFIX) -> None:
        """`folder`: for the files; None: the journal does not outlive the process. `suffix`: of the files. Raises OSError."""
        self._folder = folder
        self._suffix = suffix
        if folder is not None:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._count = 0
        self._free: list[Segment] = []
        self._current = self._make()
        self.append = self._current.append
        """Write an event down. False: the segment is full; call `rotate`. An attribute, since each request calls it."""

    def _make(self) -> Segment:
        path = None if self._folder is None else self._folder / f"{new_token()}{self._suffix}"
        segment = Segment(path)
        self._count += 1
        segment.open()
        return segment

    @property
    def has_events(self) -> bool:
        """Whether the segment that is written to holds events."""
        return not self._current.is_empty

    def rotate(self) -> Segment | None:
        """Begin another segment, and return the last one. None: there is no other. Its owner calls `release`. Raises OSError."""
        if self._free:
            following = self._free.pop()
            following.open()
        elif self._count < MAX_SEGMENTS:
            following = self._make()
        else:
            return None
        filled, self._current = self._current, following
        self.append = following.append
        return filled

    def release(self, segment: Segment) -> None:
        """Forget the events of a segment, which NATS has stored."""
        segment.clear()
        self._free.append(segment)

    def close(self) -> None:
        """Close the files. Those that hold events stay, for the next gateway."""
        for segment in (*self._free, self._current):
            segment.close()

    def orphans(self) -> Iterator[Path]:
        """Yield the files that dead processes have left, each locked by this process until the next one is asked for."""
        if self._folder is None:
            return
        for path in sorted(self._folder.glob(f"*{self._suffix}")):
            try:
                fd = os.open(path, os.O_RDONLY)
            except OSError:
                continue
            try:
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    yield path
            finally:
                os.close(fd)


def read_orphan(path: Path) -> EventBatch | None:
    """Return the events in a dead process's file; None: there are none. The last line may be incomplete. Raises OSError."""
    data = path.read_bytes()[:SEGMENT_BYTES]
    head, _, rest = data.partition(b"\n")
    lines = rest.partition(b"\0")[0]
    lines = lines[: lines.rfind(b"\n") + 1]
    if not lines or not head.isalnum():  # a head of zeros: the process died while it forgot stored events
        return None
    return EventBatch(head.decode(), lines)
