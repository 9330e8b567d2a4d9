"""Against the thundering herd: of many idle workers that hear one bell, a few ask for the job at once, not all.

Every ask costs NATS about 80 µs; with a thousand idle workers on one model, each job would cost it 80 ms. No worker knows how many
others there are, but each sees how often somebody was quicker: it answers the bell with a chance that falls with every ask in
vain and rises with every job. A job that it leaves to the others it asks for a little later, in case they left it, too, or were
busy: a worker that is farther away, and always comes second, must be there when the nearer one has its hands full.
"""

from __future__ import annotations

import random

from backbone.bus.base import Queue

FALL = 0.8
RISE = 2.44
"""As many ask as keeps the two in balance: at most ln 2.44 ÷ -ln 0.8 + 1 = 5, and all of them where there are two or three."""
LEAST, MOST = 1 / 32, 8.0
"""Above 1 a worker answers always, and needs several asks in vain before it does not: among few workers that never comes to it."""
LATE_S = 0.004
"""How much later a worker asks that answers every second bell; the rarer it answers, the later, up to `LATE_S / LEAST`."""


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

    def patience_s(self, queue: Queue) -> float:
        """How long to leave a job there to the others."""
        return LATE_S / min(1.0, self._chances.get(queue, MOST))

    def found(self, queue: Queue) -> None:
        """A job came from there."""
        if queue in self._left:  # and the others left it, too
            self._set(queue, MOST / LEAST)
        elif queue in self._answered:
            self._set(queue, RISE)

    def missed(self, queue: Queue) -> None:
        """Nothing was there."""
        if queue in self._answered:
            self._set(queue, FALL)
        self._left.discard(queue)

    def _set(self, queue: Queue, factor: float) -> None:
        self._chances[queue] = min(MOST, max(LEAST, self._chances.get(queue, MOST) * factor))
        self._answered.discard(queue)
        self._left.discard(queue)
