"""Which queue a free slot should look at next. Pure decisions: no clock, no bus.

Rules, in order:
1. A queue that has waited AGED_S, or has been passed over AGED_JOBS times by jobs that went before it, comes first,
   the longest waiting of them leading: priority never starves the lower lanes, nor a loaded model the others.
2. The higher lane.
3. The model that the backend holds in memory: a swap costs seconds.
4. The one that has waited longest.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from backbone.bus.bus import Queue
from schemas.jobs import LANES, Lane

AGED_JOBS = 8
AGED_S = 30.0

RANK = {lane: rank for rank, lane in enumerate(LANES)}
"""0 is the highest lane."""


@dataclass(slots=True)
class _QueueBacklog:
    """What this worker knows about one queue's backlog."""

    pending: int = 0
    since: float = 0.0
    passed: int = 0


class QueueSelector:
    """What is known to wait, and whose turn it is. What it costs depends on the queues that hold a job, not on those served."""

    def __init__(self) -> None:
        self._served: frozenset[Queue] = frozenset()
        self._waiting: dict[Queue, _QueueBacklog] = {}
        """Those with a backlog, and no others."""

    def __len__(self) -> int:
        """How many queues are believed to hold a job."""
        return len(self._waiting)

    @property
    def waits(self) -> bool:
        """Whether a job is believed to wait anywhere."""
        return bool(self._waiting)

    def serve(self, queues: Iterable[Queue]) -> None:
        """Know exactly these queues."""
        self._served = frozenset(queues)
        self._waiting = {queue: waiting for queue, waiting in self._waiting.items() if queue in self._served}

    def rang(self, queue: Queue, now: float) -> None:
        """A job was stored."""
        if queue not in self._served:
            return
        waiting = self._waiting.get(queue)
        if waiting is None:
            self._waiting[queue] = _QueueBacklog(1, now)
        else:
            waiting.pending += 1

    def empty(self, queue: Queue) -> None:
        """Nothing waits there."""
        self._waiting.pop(queue, None)

    def took(self, queue: Queue, left: int, now: float) -> None:
        """A job was taken, and `left` remain behind it: the queues that would have come later were passed over."""
        if queue not in self._served:
            return
        if left:
            self._waiting[queue] = _QueueBacklog(left, now)
        else:
            self._waiting.pop(queue, None)
        for other, waiting in self._waiting.items():
            if other != queue:
                waiting.passed += 1

    @property
    def models(self) -> frozenset[str]:
        """The models of which a job is believed to wait."""
        return frozenset(queue.model for queue in self._waiting)

    def waiting_lanes(self) -> list[tuple[Lane, str]]:
        """Return the lane and the model of each queue that is believed to hold a job."""
        return [(queue.lane, queue.model) for queue in self._waiting]

    def since(self, queue: Queue) -> float | None:
        """Return since when a job is believed to wait there; None: none is."""
        waiting = self._waiting.get(queue)
        return waiting.since if waiting else None

    def restart(self, queue: Queue, since: float) -> None:
        """The oldest job there has waited since then."""
        waiting = self._waiting.get(queue)
        if waiting is not None:
            waiting.since = since

    def pending(self, queue: Queue) -> int:
        """Jobs believed to wait."""
        waiting = self._waiting.get(queue)
        return waiting.pending if waiting else 0

    def order(self, loaded: frozenset[str], now: float) -> list[Queue]:
        """The queues believed to hold a job, best first."""

        def key(item: tuple[Queue, _QueueBacklog]) -> tuple[int, float, int, bool, float]:
            queue, waiting = item
            aged = waiting.passed >= AGED_JOBS or now - waiting.since >= AGED_S
            if aged:
                return (0, waiting.since, 0, False, 0.0)
            return (1, 0.0, RANK[queue.lane], queue.model not in loaded, waiting.since)

        return [queue for queue, _ in sorted(self._waiting.items(), key=key)]
