"""A job's events as a caller puts them together, and everything in them that the promises forbid."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, field
from typing import Any

TERMINAL = {"job.completed", "job.failed", "job.cancelled", "job.expired"}


@dataclass
class View:
    """Feed it every event in the order in which they came, over all connections."""

    last: str = ""
    """For `Last-Event-ID`."""
    chunks: list[str] = field(default_factory=list)
    """`data` of the chunks of the newest attempt."""
    starts: int = 0
    """Attempts of the newest run."""
    end: str = ""
    """The terminal event."""
    record: dict[str, Any] = field(default_factory=dict)
    """What the terminal event says."""
    faults: list[str] = field(default_factory=list)
    """What must not have been."""
    _attempt: tuple[int, int] | None = None
    _seq: int = 0
    _run: int = 1

    def take(self, kind: str, event_id: str, data: str) -> None:
        """One event."""
        run, delivery, seq = map(int, event_id.split("-"))
        where = f"{kind} {event_id} after {self.last or 'nothing'}"
        if self.end:
            self.faults.append(f"{where}, behind the end")
        if kind == "job.queued":
            if self._attempt is not None and run <= self._run:
                self.faults.append(f"{where}: queued again")
            self._run, self._attempt, self.starts = run, None, 0
        elif kind in {"job.started", "job.restarted"}:
            self._start(kind, (run, delivery), where)
        elif kind in {"job.chunk", "job.progress"}:
            self._piece(kind, (run, delivery), seq, data, where)
        elif kind in TERMINAL:
            self.end, self.record = kind, json.loads(data)
            if kind == "job.completed" and (run, delivery, seq) != (*(self._attempt or (0, 0)), self._seq + 1):
                self.faults.append(f"{where}: a gap before the end")
        else:
            self.faults.append(f"{where}: an event that there is not")
        self.last = event_id

    def _start(self, kind: str, attempt: tuple[int, int], where: str) -> None:
        if attempt[0] > self._run:  # the worker was quicker than the event that says that it is queued again
            self._run, self._attempt, self.starts = attempt[0], None, 0
        if (kind == "job.started") != (self.starts == 0 and self._run == 1):
            self.faults.append(f"{where}: {self.starts} attempts before it")
        self._attempt, self._seq, self.chunks = attempt, 0, []
        self.starts += 1

    def _piece(self, kind: str, attempt: tuple[int, int], seq: int, data: str, where: str) -> None:
        if attempt != self._attempt:
            self.faults.append(f"{where}: of another attempt than {self._attempt}")
        if seq != self._seq + 1:
            self.faults.append(f"{where}: the next one is {self._seq + 1}")
        self._seq = seq
        if kind == "job.chunk":
            self.chunks.append(data)

    def adopt(self, event_id: str, data: str) -> None:
        """An event of a stream that names its events and says nothing about attempts: the first one tells which it is."""
        if self._attempt is None:
            run, delivery, _ = map(int, event_id.split("-"))
            self._attempt, self._seq, self.starts = (run, delivery), 0, 1
        self.take("job.chunk", event_id, data)

    def answer(self) -> bytes:
        """The whole answer, of the chunks."""
        if self.chunks and self.chunks[0].startswith('{"b64"'):
            return b"".join(base64.b64decode(json.loads(chunk)["b64"]) for chunk in self.chunks)
        return "".join(f"data: {chunk}\n\n" for chunk in [*self.chunks, "[DONE]"]).encode()


@dataclass
class Frames:
    """Lines of server-sent events into events: (event, id, data)."""

    _event: str = ""
    _id: str = ""
    _data: list[str] = field(default_factory=list)

    def line(self, line: str) -> tuple[str, str, str] | None:
        """An event, where this line ends one."""
        if line:
            name, _, value = line.partition(": ")
            if name == "event":
                self._event = value
            elif name == "id":
                self._id = value
            elif name == "data":
                self._data.append(value)
            return None
        if not self._data:
            return None
        told = (self._event, self._id, "\n".join(self._data))
        self._event, self._id, self._data = "", "", []
        return told
