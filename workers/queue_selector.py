"""The choice of the queue that a free slot pulls next. Pure decisions: no clock, no bus.

Rules, in order:
1. A queue that has waited AGING_S, or was passed over AGING_JOBS times, comes first, the longest waiting of them leading: priority
   never starves the lower lanes, nor a loaded model the others.
2. The higher lane.
3. The model that the backend holds in memory: loading another one costs seconds.
4. The queue that has waited longest.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from backbone.bus.bus import Queue
from schemas.jobs import LANES, Lane

AGING_JOBS = 8
AGING_S = 30.0

LANE_RANK = {lane: rank for rank, lane in enumerate(LANES)}
"""0 is the highest lane."""


@dataclass(slots=True)
class _QueueBacklog:
    """This worker's knowledge of one queue's waiting jobs."""

    pending: int = 0
    since: float = 0.0
    passed_over: int = 0


class QueueSelector:
    """Knows which queues are believed to hold jobs, and ranks them. Its cost depends on those queues, not on all that are served."""

    def __init__(self) -> None:
        self._served: frozenset[Queue] = frozenset()
        self._waiting: dict[Queue, _QueueBacklog] = {}
        """The queues with a backlog, and no others."""

    def __len__(self) -> int:
        """Return how many queues are believed to hold a job."""
        return len(self._waiting)

    @property
    def has_waiting(self) -> bool:
        """Whether any queue is believed to hold a job."""
        return bool(self._waiting)

    def serve(self, queues: Iterable[Queue]) -> None:
        """Set the queues that are served, and forget all others."""
        self._served = frozenset(queues)
        self._waiting = {queue: backlog for queue, backlog in self._waiting.items() if queue in self._served}

    def record_notification(self, queue: Queue, now: float) -> None:
        """Note that a job was stored in the queue."""
        if queue not in self._served:
            return
        backlog = self._waiting.get(queue)
        if backlog is None:
            self._waiting[queue] = _QueueBacklog(1, now)
        else:
            backlog.pending += 1

    def record_empty(self, queue: Queue) -> None:
        """Note that the queue holds no job."""
        self._waiting.pop(queue, None)

    def record_job(self, queue: Queue, remaining: int, now: float) -> None:
        """Note that a job was taken, with `remaining` jobs behind it: the other waiting queues were passed over."""
        if queue not in self._served:
            return
        if remaining:
            self._waiting[queue] = _QueueBacklog(remaining, now)
        else:
            self._waiting.pop(queue, None)
        for other, backlog in self._waiting.items():
            if other != queue:
                backlog.passed_over += 1

    @property
    def waiting_models(self) -> frozenset[str]:
        """The models of which a job is believed to wait."""
        return frozenset(queue.model for queue in self._waiting)

    def waiting_lanes(self) -> list[tuple[Lane, str]]:
        """Return the lane and the model of each queue that is believed to hold a job."""
        return [(queue.lane, queue.model) for queue in self._waiting]

    def waiting_since(self, queue: Queue) -> float | None:
        """Return since when a job is believed to wait in the queue; None where none is."""
        backlog = self._waiting.get(queue)
        return backlog.since if backlog else None

    def set_waiting_since(self, queue: Queue, since: float) -> None:
        """Correct the time since when the oldest job of the queue waits."""
        backlog = self._waiting.get(queue)
        if backlog is not None:
            backlog.since = since

    def pending(self, queue: Queue) -> int:
        """Return how many jobs are believed to wait in the queue."""
        backlog = self._waiting.get(queue)
        return backlog.pending if backlog else 0

    def rank_queues(self, loaded: frozenset[str], now: float) -> list[Queue]:
        """Return the queues that are believed to hold a job, best first."""

        def key(item: tuple[Queue, _QueueBacklog]) -> tuple[int, float, int, bool, float]:
            queue, backlog = item
            if backlog.passed_over >= AGING_JOBS or now - backlog.since >= AGING_S:
                return (0, backlog.since, 0, False, 0.0)
            return (1, 0.0, LANE_RANK[queue.lane], queue.model not in loaded, backlog.since)

        return [queue for queue, _ in sorted(self._waiting.items(), key=key)]
