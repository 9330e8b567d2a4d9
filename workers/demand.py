"""How fast jobs come on one queue, and how many slots it may be promised for that. Pure: no clock, no bus.

cold ──HOT_RATE, in two ticks together──► hot ──a promise ran out in vain, or too few slots──► cold

The rate is that of the jobs that came here, or of the notifications where others were quicker: a worker beside a hot one would else get
nothing but what that one leaves.

A cold queue is asked without waiting, when a wake-up notification says that it holds a job: that promises no slot to anybody. A hot
queue has a pull open that lingers: cheaper for each job, but a slot that is promised to it is idle until a job comes. So it is promised as
many as are likely to come within LINGER_S, and for no longer.
"""

from __future__ import annotations

from dataclasses import dataclass

TICK_S = 0.25
HOT_RATE = 40.0
"""Jobs per second: below, wake-up notifications cost less than what they save."""
LINGER_S = 0.25
HOT_SLOTS = 8
"""A worker with fewer never lingers: one promise would be too large a share of them."""
MAX_DEAF_TICKS = 128
SLOTS_PER_QUEUE = 4
"""With fewer for each queue in use, none lingers."""


@dataclass(slots=True)
class Demand:
    """What an intake knows of one queue."""

    asked: int = 0
    """Jobs that were asked for and have neither come nor been denied."""
    lingers: bool = False
    """Those were asked for by pulls that linger."""
    asked_at: float = 0.0
    rang: bool = False
    """A job was stored while the queue was being asked."""
    hot: bool = False
    target: int = 1
    """Jobs to have asked for, while it is hot."""
    arrived: int = 0
    """Since the last tick."""
    heard: int = 0
    """Wake-up notifications since the last tick."""
    deaf_ticks: int = 0
    """For so long, they do not make it hot."""
    vain: int = 0
    """Promises in a row that ran out without any job. Each doubles the time for which it is deaf: of a thousand idle workers few linger."""
    fast: bool = False
    """HOT_RATE was reached before the last tick. One burst is not enough: the promises made for it would idle slots."""

    def tick(self, share: int) -> bool:
        """Count what has come since the last tick; return whether the queue is hot from now on.

        `share`: the slots that it may be promised at most; 0: it may not linger.
        """
        rate, heard = self.arrived / TICK_S, self.heard / TICK_S
        self.arrived = self.heard = 0
        if self.deaf_ticks:
            self.deaf_ticks -= 1
            heard = 0.0
        before, self.fast = self.fast, max(rate, heard) >= HOT_RATE
        self.target = max(1, min(share, round(rate * LINGER_S)))
        return share > 0 and (self.hot or (before and self.fast))

    def ran_out(self) -> None:
        """Cool down: a promise ended without a job."""
        self.deaf_ticks = min(MAX_DEAF_TICKS, 1 << min(self.vain, 8))
        self.vain += 1


def share_of(slots: int, busy: int, active: int) -> int:
    """Return how many slots one of `active` queues may be promised: half of all, divided among them; 0: none may linger.

    Several queues need more free slots than there are of them: otherwise the promises of some idle what the others wait for.
    """
    if slots < HOT_SLOTS or active * SLOTS_PER_QUEUE > slots:
        return 0
    if active > 1 and slots - busy < max(active, slots // 8):
        return 0
    return slots // (2 * max(1, active))
