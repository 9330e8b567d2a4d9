"""Backoff against a thundering herd: of many idle workers that a notification wakes, only a few pull the job at once.

Every pull costs NATS about 80 µs; with a thousand idle workers on one model, each job would cost it 80 ms. No worker knows how many
others exist, but each sees how often another one was quicker: it pulls with a probability that falls with every pull in vain and rises
with every job. A job that it leaves to the others it pulls a little later, in case all left it or were busy: a worker that is farther
away, and always comes second, must be available when the nearer one is fully occupied.
"""

from __future__ import annotations

import random

from backbone.bus.bus import Queue

DECREASE_FACTOR = 0.8
INCREASE_FACTOR = 2.44
"""The two factors balance when at most ln 2.44 ÷ -ln 0.8 + 1 = 5 workers pull, and all of two or three that are equally near."""
MIN_PROBABILITY, MAX_PROBABILITY = 1 / 32, 8.0
"""Above 1 a worker always pulls, and needs several pulls in vain before it does not: a few equally near workers never get there.
Of more than about a hundred idle workers, one in 32 pulls."""
DEFERRAL_S = 0.004
"""Divided by the probability, how much later a worker pulls a job that it left to the others: 8 ms where it answers every second
notification, at most `DEFERRAL_S / MIN_PROBABILITY`."""


class PullBackoff:
    """Decides, for each queue, whether this worker reacts to a wake-up notification at once."""

    def __init__(self) -> None:
        self._probabilities: dict[Queue, float] = {}
        self._pulled: set[Queue] = set()
        self._deferred: set[Queue] = set()

    def should_pull(self, queue: Queue) -> bool:
        """Return whether to pull the job that was stored in the queue now."""
        probability = self._probability(queue)
        pulls = probability >= 1.0 or random.random() < probability
        (self._pulled if pulls else self._deferred).add(queue)
        return pulls

    def deferral_s(self, queue: Queue) -> float:
        """Return how long to leave a job in the queue to the other workers."""
        return DEFERRAL_S / min(1.0, self._probability(queue))

    def record_job(self, queue: Queue) -> None:
        """Note that a pull brought a job."""
        if queue in self._deferred:  # and the other workers left it as well
            self._set(queue, MAX_PROBABILITY)
        elif queue in self._pulled:
            self._set(queue, self._probability(queue) * INCREASE_FACTOR)

    def record_empty(self, queue: Queue) -> None:
        """Note that a pull found the queue empty."""
        if queue in self._pulled:
            self._set(queue, self._probability(queue) * DECREASE_FACTOR)
        self._deferred.discard(queue)

    def _probability(self, queue: Queue) -> float:
        return self._probabilities.get(queue, MAX_PROBABILITY)

    def _set(self, queue: Queue, probability: float) -> None:
        self._probabilities[queue] = min(MAX_PROBABILITY, max(MIN_PROBABILITY, probability))
        self._pulled.discard(queue)
        self._deferred.discard(queue)
