"""Against the thundering herd: of many idle workers that hear one bell, a few ask for the job at once, not all.

Every ask costs NATS about 80 µs; with a thousand idle workers on one model, each job would cost it 80 ms. No worker knows how many
others there are, but each sees how often somebody was quicker: it answers the bell with a chance that falls with every ask in
vain and rises with every job. A job that it leaves to the others it asks for a little later, in case they left it, too, or were
busy: a worker that is farther away, and always comes second, must be there when the nearer one has its hands full.
"""

from __future__ import annotations

import random

from backbone.bus.bus import Queue

FALL = 0.8
RISE = 2.44
"""As many ask as keeps the two in balance: at most ln 2.44 ÷ -ln 0.8 + 1 = 5, and of two or three that are equally near, all."""
LEAST, MOST = 1 / 32, 8.0
"""Above 1 a worker answers always, and needs several asks in vain before it does not: few that are equally near never come to it.
Of more than some hundred idle workers, one in 32 asks."""
LATE_S = 0.004
"""Over its chance, how much later a worker asks for a job that it left to the others: 8 ms where it answers every second bell,
at most `LATE_S / LEAST`."""


class PullBackoff:
    """This worker's chance to answer the bell of each queue."""

    def __init__(self) -> None:
        self._chances: dict[Queue, float] = {}
        self._answered: set[Queue] = set()
        self._left: set[Queue] = set()

    def answers(self, queue: Queue) -> bool:
        """Whether to ask for the job that was stored there now."""
        chance = self._chance(queue)
        answers = chance >= 1.0 or random.random() < chance
        (self._answered if answers else self._left).add(queue)
        return answers

    def patience_s(self, queue: Queue) -> float:
        """How long to leave a job there to the others."""
        return LATE_S / min(1.0, self._chance(queue))

    def found(self, queue: Queue) -> None:
        """A job came from there."""
        if queue in self._left:  # and the others left it, too
            self._set(queue, MOST)
        elif queue in self._answered:
            self._set(queue, self._chance(queue) * RISE)

    def missed(self, queue: Queue) -> None:
        """Nothing was there."""
        if queue in self._answered:
            self._set(queue, self._chance(queue) * FALL)
        self._left.discard(queue)

    def _chance(self, queue: Queue) -> float:
        return self._chances.get(queue, MOST)

    def _set(self, queue: Queue, chance: float) -> None:
        self._chances[queue] = min(MOST, max(LEAST, chance))
        self._answered.discard(queue)
        self._left.discard(queue)
