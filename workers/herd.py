"""Against the thundering herd: of many idle workers that hear one bell, three to five ask for the job, not all.

Every ask costs NATS about 80 µs; with a thousand idle workers on one model, each job would cost it 80 ms. No worker knows how many
others there are, but each sees how often somebody was quicker: it answers the bell with a chance that falls with every ask in
vain and rises with every job. Where nobody answers, the slow round of whoever looks first finds the job: with many workers, at once.
"""

from __future__ import annotations

import random

from backbone.bus.base import Queue

FALL = 0.8
RISE = 2.44
"""As many ask as keeps the two in balance: at most ln 2.44 ÷ -ln 0.8 + 1 = 5, and all of them where there are two or three."""
LEAST, MOST = 1 / 1024, 8.0
"""Above 1 a worker answers always, and needs several asks in vain before it does not: among few workers that never comes to it."""


class Herd:
    """This worker's chance to answer the bell of each queue."""

    def __init__(self) -> None:
        self._chances: dict[Queue, float] = {}
        self._answered: set[Queue] = set()
        self._left: set[Queue] = set()

    def answers(self, queue: Queue) -> bool:
        """Whether to ask for the job that was stored there now."""
        chance = self._chances.get(queue, MOST)
        answers = chance >= 1.0 or random.random() < chance
        (self._answered if answers else self._left).add(queue)
        return answers

    def found(self, queue: Queue) -> None:
        """A job came from there."""
        if queue in self._answered or queue in self._left:
            # One that was left to the others, and that they left too: there are fewer of them than this one thought.
            self._set(queue, RISE if queue in self._answered else 2 * RISE)

    def missed(self, queue: Queue) -> None:
        """Nothing was there."""
        if queue in self._answered:
            self._set(queue, FALL)
        self._left.discard(queue)

    def _set(self, queue: Queue, factor: float) -> None:
        self._chances[queue] = min(MOST, max(LEAST, self._chances.get(queue, MOST) * factor))
        self._answered.discard(queue)
        self._left.discard(queue)
