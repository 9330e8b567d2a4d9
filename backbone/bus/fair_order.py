"""The order in which the waiting jobs of several owners start: weighted fair queueing in seconds of a slot. Pure: no clock, no bus.

Each owner has a turn, a point in virtual time (nanoseconds, integers: equal turns stay equal). The owner with the earliest turn is next; its turn then moves on by the seconds that
its job is expected to take, divided by its weight, and is corrected once the job has ended. An owner who begins to wait gets the
present as its turn: it is next or nearly so, and has saved nothing up while it did not wait.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

DEFAULT_SECONDS = 1.0
"""What a job is expected to take before any job of its queue has ended."""
NANO = 1_000_000_000
SMOOTHING = 0.2
"""The part of a new measurement in the expected seconds of an owner's jobs."""
MAX_CHARGES = 1024
"""Jobs of one owner that run at once and are corrected."""
MAX_IDLE_OWNERS = 4096
"""About so many owners without a waiting job are remembered, with their turns and times."""


@dataclass(slots=True)
class _Owner:
    """One owner's turn."""

    turn: int
    arrival: int
    """Orders owners with the same turn."""
    waiting: int = 0
    charges: deque[int] = field(default_factory=lambda: deque(maxlen=MAX_CHARGES))
    """What its jobs were charged that have not ended, oldest first."""
    seconds: float | None = None
    """What its jobs are expected to take; None: unknown."""


class FairOrder:
    """Knows which owners wait, and who is next. Its cost depends on the owners that wait, not on those that exist."""

    def __init__(self, weight_of: Callable[[str], float] = lambda _: 1.0) -> None:
        """`weight_of` returns the weight of an owner, above 0."""
        self._weight_of = weight_of
        self._owners: dict[str, _Owner] = {}
        self._heap: list[tuple[int, int, str]] = []
        """(turn, arrival, owner): entries that differ from the owner's present turn are outdated."""
        self._present = 0
        self._arrivals = itertools.count()
        self._seconds: float | None = None
        self._max_owners = MAX_IDLE_OWNERS
        self.total = 0
        """The number of waiting jobs."""

    @property
    def mean_seconds(self) -> float | None:
        """What the jobs of all owners took lately; None: no job has ended."""
        return self._seconds

    def waiting(self, owner: str) -> int:
        """Return how many jobs of the owner wait."""
        known = self._owners.get(owner)
        return known.waiting if known else 0

    @property
    def owners(self) -> list[str]:
        """The owners with a waiting job."""
        return [name for name, owner in self._owners.items() if owner.waiting]

    def set_waiting(self, owner: str, count: int) -> None:
        """Set how many jobs of the owner wait."""
        known = self._owners.get(owner)
        if known is None:
            if not count:
                return
            self._drop_idle_owners()
            known = self._owners[owner] = _Owner(self._present, next(self._arrivals))
        began = count and not known.waiting
        self.total += count - known.waiting
        known.waiting = count
        if began:
            known.turn = max(known.turn, self._present)
            known.arrival = next(self._arrivals)
            self._push(owner, known)

    def add_waiting(self, owner: str) -> None:
        """Note one more waiting job of the owner."""
        self.set_waiting(owner, self.waiting(owner) + 1)

    def take(self) -> str | None:
        """Return the owner whose oldest job starts next, and charge the job to it. None: no job waits."""
        while self._heap:
            turn, arrival, name = heapq.heappop(self._heap)
            owner = self._owners.get(name)
            if owner is None or not owner.waiting or (turn, arrival) != (owner.turn, owner.arrival):
                continue
            self._present = max(self._present, turn)
            owner.waiting -= 1
            self.total -= 1
            owner.charges.append(self._cost(name, owner))
            owner.turn += owner.charges[-1]
            if owner.waiting:
                self._push(name, owner)
            return name
        return None

    def refund(self, owner: str) -> None:
        """Undo the charge of a `take` that found no job."""
        known = self._owners.get(owner)
        if known is not None and known.charges:
            self._move(owner, known, known.turn - known.charges.pop())

    def record_use(self, owner: str, seconds: float) -> None:
        """Correct the charge of a job that has ended after `seconds` in a slot. A job that was not charged only shows what the
        owner's jobs take.
        """
        known = self._owners.get(owner)
        if known is not None:
            if known.charges:
                used = round(seconds * NANO / self._weight_of(owner))
                self._move(owner, known, known.turn + used - known.charges.popleft())
            known.seconds = seconds if known.seconds is None else known.seconds + SMOOTHING * (seconds - known.seconds)
        self._seconds = seconds if self._seconds is None else self._seconds + SMOOTHING * (seconds - self._seconds)

    def position(self, owner: str, index: int, counts: Mapping[str, int] | None = None) -> int:
        """Return how many waiting jobs start before the owner's waiting job number `index`, counted from 0.

        `counts`: how many jobs of each owner wait; None: as many as are known here.
        """
        known = self._owners.get(owner) or _Owner(self._present, 0)
        turn = known.turn + index * self._cost(owner, known)
        counts = self.snapshot() if counts is None else counts
        return index + sum(
            self._count_before(name, count, turn, known.arrival) for name, count in counts.items() if name != owner
        )

    def upcoming(self, counts: Mapping[str, int], skipped: Mapping[str, int]) -> Iterator[str]:
        """Yield the owner of each waiting job, in the order in which they start as far as is known now.

        `counts`: how many jobs of each owner are to be ordered. `skipped`: how many jobs of an owner wait before those.
        """
        heap = []
        for number, name in enumerate(counts):
            owner = self._owners.get(name) or _Owner(self._present, 1 << 62)
            turn = owner.turn + skipped.get(name, 0) * self._cost(name, owner)
            heap.append((turn, owner.arrival, number, name, self._cost(name, owner), counts[name]))
        heapq.heapify(heap)
        while heap:
            turn, arrival, number, name, cost, count = heapq.heappop(heap)
            if not count:
                continue
            yield name
            heapq.heappush(heap, (turn + cost, arrival, number, name, cost, count - 1))

    def _count_before(self, name: str, count: int, turn: int, arrival: int) -> int:
        other = self._owners.get(name) or _Owner(self._present, arrival + 1)
        if turn < other.turn:
            return 0
        started, rest = divmod(turn - other.turn, self._cost(name, other))
        return min(count, started + (rest > 0 or other.arrival < arrival))

    def snapshot(self) -> Mapping[str, int]:
        """Return how many jobs of each owner wait."""
        return {name: owner.waiting for name, owner in self._owners.items() if owner.waiting}

    def _expected(self, owner: _Owner) -> float:
        known = owner.seconds if owner.seconds is not None else self._seconds
        return known if known is not None else DEFAULT_SECONDS

    def _cost(self, name: str, owner: _Owner) -> int:
        return max(1, round(self._expected(owner) * NANO / self._weight_of(name)))

    def _move(self, name: str, owner: _Owner, turn: int) -> None:
        owner.turn = turn
        if owner.waiting:
            self._push(name, owner)

    def _push(self, name: str, owner: _Owner) -> None:
        heapq.heappush(self._heap, (owner.turn, owner.arrival, name))
        if len(self._heap) > 4 * len(self._owners) + 64:
            self._heap = [(one.turn, one.arrival, key) for key, one in self._owners.items() if one.waiting]
            heapq.heapify(self._heap)

    def _drop_idle_owners(self) -> None:
        """Forget half of the idle owners, those that owe least, once there are many."""
        if len(self._owners) < self._max_owners:
            return
        idle = sorted((owner.turn, name) for name, owner in self._owners.items() if not owner.waiting)
        for _, name in idle[: len(idle) // 2]:
            del self._owners[name]
        self._max_owners = len(self._owners) + MAX_IDLE_OWNERS // 2
