"""Which queue a free slot should look at next. Pure decisions: no clock, no bus.

Rules, in order:
1. A queue that has waited AGED_S, or has been passed over AGED_JOBS times by jobs that went before it, comes first,
   the longest waiting of them leading: priority never starves the lower lanes, nor a loaded model the others.
2. The higher lane.
3. The model that the backend holds in memory: a swap costs seconds.
4. The one that has waited longest.
"""

from __future__ import annotations

from dataclasses import dataclass

from backbone.bus.base import Queue
from schemas.jobs import LANES

AGED_JOBS = 8
AGED_S = 30.0

_RANK = {lane: rank for rank, lane in enumerate(LANES)}


@dataclass(slots=True)
class _Waiting:
    """What this worker knows about one queue's backlog."""

    pending: int = 0
    since: float = 0.0
    passed: int = 0


class LaneBook:
    """What is known to wait, and whose turn it is."""

    def __init__(self) -> None:
        self._waiting: dict[Queue, _Waiting] = {}

    def serve(self, queues: list[Queue]) -> None:
        """Know exactly these queues."""
        self._waiting = {queue: self._waiting.get(queue, _Waiting()) for queue in queues}

    def rang(self, queue: Queue, now: float) -> None:
        """A job was stored."""
        self._set(queue, self.pending(queue) + 1, now)

    def empty(self, queue: Queue) -> None:
        """Nothing waits there."""
        if queue in self._waiting:
            self._waiting[queue] = _Waiting()

    def took(self, queue: Queue, left: int, now: float) -> None:
        """A job was taken, and `left` remain behind it: the queues that would have come later were passed over."""
        mine = self._waiting.get(queue)
        if mine is None:
            return
        for other, waiting in self._waiting.items():
            if other != queue and waiting.pending:
                waiting.passed += 1
        self._waiting[queue] = _Waiting(left, now, 0)

    def pending(self, queue: Queue) -> int:
        """Jobs believed to wait."""
        waiting = self._waiting.get(queue)
        return waiting.pending if waiting else 0

    def order(self, loaded: frozenset[str], now: float) -> list[Queue]:
        """The queues believed to hold a job, best first."""

        def key(item: tuple[Queue, _Waiting]) -> tuple[int, float, int, bool, float]:
            queue, waiting = item
            aged = waiting.passed >= AGED_JOBS or now - waiting.since >= AGED_S
            if aged:
                return (0, waiting.since, 0, False, 0.0)
            return (1, 0.0, _RANK[queue.lane], queue.model not in loaded, waiting.since)

        return [queue for queue, _ in sorted(((q, w) for q, w in self._waiting.items() if w.pending), key=key)]

    def _set(self, queue: Queue, pending: int, now: float) -> None:
        waiting = self._waiting.get(queue)
        if waiting is None:
            return
        if not waiting.pending:
            waiting.since, waiting.passed = now, 0
        waiting.pending = pending
