"""The demand for one queue's jobs, and whether a worker keeps a pull open there. Pure: no clock, no bus.

cold ──HOT_RATE in two consecutive ticks──► hot ──a pull ended without any job, or too few slots──► cold

The rate counts the jobs that came to this worker, or the wake-up notifications where other workers were quicker: a worker beside a
hot one would otherwise get only the jobs that the other one leaves.

A cold queue is pulled without waiting, when a wake-up notification says that it holds a job: that reserves no slot. A hot queue has
a pull open that lingers. It costs less per job, but a slot that is reserved for it is idle until a job comes. Therefore it reserves as
many slots as jobs are likely to come within LINGER_S, and for no longer.
"""

from __future__ import annotations

from dataclasses import dataclass

TICK_S = 0.25
HOT_RATE = 40.0
"""Jobs per second: below this rate, wake-up notifications cost less than a lingering pull."""
LINGER_S = 0.25
MIN_SLOTS_TO_LINGER = 8
"""A worker with fewer slots never lingers: one reserved slot would be too large a share of them."""
MAX_IGNORED_TICKS = 128
MIN_SLOTS_PER_QUEUE = 4
"""With fewer slots for each queue in use, no pull lingers."""


@dataclass(slots=True)
class Demand:
    """A puller's state of one queue."""

    outstanding: int = 0
    """Jobs that were requested and have neither come nor been denied."""
    lingers: bool = False
    """The outstanding jobs were requested by pulls that linger."""
    last_pull: float = 0.0
    """When the queue was pulled last."""
    notified: bool = False
    """A job was stored while the queue was being pulled."""
    hot: bool = False
    target: int = 1
    """How many jobs to have outstanding while the queue is hot."""
    arrivals: int = 0
    """Jobs since the last tick."""
    notifications: int = 0
    """Wake-up notifications since the last tick."""
    ignored_ticks: int = 0
    """Ticks during which notifications do not make the queue hot."""
    empty_pulls: int = 0
    """Lingering pulls in a row that ended without any job. Each doubles `ignored_ticks`: of a thousand idle workers few linger."""
    was_fast: bool = False
    """HOT_RATE was reached before the last tick. One burst is not enough: the slots reserved for it would be idle."""

    def tick(self, max_outstanding: int) -> bool:
        """Count the jobs since the last tick; return whether the queue is hot from now on.

        `max_outstanding`: the most slots that may be reserved for the queue; 0: its pulls may not linger.
        """
        rate, notification_rate = self.arrivals / TICK_S, self.notifications / TICK_S
        self.arrivals = self.notifications = 0
        if self.ignored_ticks:
            self.ignored_ticks -= 1
            notification_rate = 0.0
        was_fast, self.was_fast = self.was_fast, max(rate, notification_rate) >= HOT_RATE
        self.target = max(1, min(max_outstanding, round(rate * LINGER_S)))
        return max_outstanding > 0 and (self.hot or (was_fast and self.was_fast))

    def cool_down(self) -> None:
        """Note that a lingering pull ended without a job."""
        self.ignored_ticks = min(MAX_IGNORED_TICKS, 1 << min(self.empty_pulls, 8))
        self.empty_pulls += 1


def slots_per_queue(slots: int, busy: int, active: int) -> int:
    """Return how many slots may be reserved for one of `active` queues: half of all slots, divided among them; 0 where none may.

    Several queues need more free slots than there are queues: otherwise the slots reserved for some keep the others waiting.
    """
    if slots < MIN_SLOTS_TO_LINGER or active * MIN_SLOTS_PER_QUEUE > slots:
        return 0
    if active > 1 and slots - busy < max(active, slots // 8):
        return 0
    return slots // (2 * max(1, active))
