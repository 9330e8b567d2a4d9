"""Slow rounds over the queues, for jobs of which no notification came. Pure: no clock, no bus."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from backbone.bus.bus import Queue

ROUND_QUEUES = 48
"""The most queues of one round. Of more, it takes the ones that were used last, and the others in turn."""
RECENT_QUEUES = 32


class PollRounds:
    """Chooses the queues of each round."""

    def __init__(self) -> None:
        self._queues: Sequence[Queue] = ()
        self._recent: dict[Queue, None] = {}
        """Queues of which a notification came, the last one last."""
        self._next = 0

    def serve(self, queues: Sequence[Queue], served: frozenset[Queue]) -> None:
        """Set the queues to poll."""
        self._queues = queues
        self._recent = {queue: None for queue in self._recent if queue in served}

    def record_use(self, queue: Queue) -> None:
        """Note that the queue has got a job."""
        self._recent.pop(queue, None)
        self._recent[queue] = None

    def next_round(self) -> deque[Queue]:
        """Return the queues of the next round: those that were used last, then others in turn."""
        chosen = self._queues
        if len(chosen) > ROUND_QUEUES:
            recent = [queue for queue, _ in zip(reversed(self._recent), range(RECENT_QUEUES), strict=False)]
            chosen = [*recent, *self._take_next(ROUND_QUEUES - len(recent))]
        return deque(dict.fromkeys(chosen))

    def _take_next(self, count: int) -> list[Queue]:
        start = self._next
        self._next = (start + count) % len(self._queues)
        return [self._queues[(start + number) % len(self._queues)] for number in range(count)]
