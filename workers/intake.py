"""How free slots become jobs in hand. Jobs in hand and jobs asked for never exceed the slots.

Two ways, by slots and queues (measured: DESIGN, section 7):

- careful: few slots over many queues. The bell says where a job was stored; a free slot asks, without waiting, the
  queue whose turn it is; a slow round over all queues finds what the bell does not tell (redeliveries). Of many
  idle workers, a few answer the bell at once (`Herd`).
- wide: many slots over few queues. Every queue has a lingering pull open: a few jobs for quiet queues, up to half of
  the slots for a busy one, renewed when half used.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable

from backbone.bus.base import Delivery, Queue, WorkerBus
from workers.herd import Herd
from workers.lanes import LaneBook

WIDE_SLOTS_PER_QUEUE = 4
LINGER_S = 10.0
ROUND_S = 0.8
"""The slow round: a redelivered job waits at most this long for a free slot to find it."""
BUSY_BELL_S = 0.004
"""A worker with all but one slot busy answers the bell this much later than an idle one, which so gets the job."""
RETRY_S = 0.25


class Intake:
    """Keeps a worker's slots supplied."""

    def __init__(self, bus: WorkerBus, slots: int, loaded: Callable[[], frozenset[str]]) -> None:
        self._bus = bus
        self._slots = slots
        self._loaded = loaded
        self._book = LaneBook()
        self._herd = Herd()
        self._late: set[Queue] = set()
        self._queues: list[Queue] = []
        self._asked: dict[Queue, int] = {}
        self._asked_total = 0
        self._hot: dict[Queue, float] = {}
        self._asked_at: dict[Queue, float] = {}
        self._not_before: dict[Queue, float] = {}
        self._paused: dict[str, float] = {}
        """Models whose queues are left alone, and until when."""
        self._round: deque[Queue] = deque()
        self._wide = False
        self._open = False
        self.busy = 0
        self._ticker: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()

    @property
    def wide(self) -> bool:
        """Whether lingering pulls are used."""
        return self._wide

    @property
    def is_open(self) -> bool:
        """Whether jobs are asked for."""
        return self._open

    async def serve(self, queues: list[Queue], slots: int | None = None) -> None:
        """Take jobs from these queues from now on, in place of the last ones; with `slots`, that many at once."""
        self._slots = slots or self._slots
        self._queues = list(queues)
        self._book.serve(queues)
        self._asked = {queue: self._asked.get(queue, 0) for queue in queues}
        self._wide = self._slots >= WIDE_SLOTS_PER_QUEUE * max(1, len(queues))
        await self._bus.serve(queues, None if self._wide else self._on_bell)
        self._asked_total = sum(self._asked.values())
        self._start_round()

    def open(self) -> None:
        """Begin, or go on, to ask for jobs."""
        if self._open:
            return
        self._open = True
        if self._ticker is None:
            self._ticker = asyncio.create_task(self._tick())
        self._start_round()
        self._fill()

    def pause_model(self, model: str, seconds: float) -> None:
        """Ask for no job of the model for so long. Those that still come are given back."""
        until = self._loop.time() + seconds
        if until > self._paused.get(model, 0.0):
            self._paused[model] = until
            self._loop.call_at(until, self._resume, model)

    def _resume(self, model: str) -> None:
        if self._paused.get(model, 0.0) <= self._loop.time():
            self._paused.pop(model, None)
            self._start_round()
            self._fill()

    def pause(self) -> None:
        """Ask for no more. Pulls already open may still bring jobs."""
        self._open = False

    async def close(self) -> None:
        """Ask for no more; every job that was on its way has arrived when this returns."""
        self._open = False
        if self._ticker is not None:
            self._ticker.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._ticker
            self._ticker = None
        await self._bus.stop_pulling()
        self._asked = dict.fromkeys(self._asked, 0)
        self._asked_total = 0

    def arrived(self, job: Delivery) -> bool:
        """A job has come. False when there is no slot for it: the caller gives it back."""
        queue, now = job.queue, self._loop.time()
        if self._asked.get(queue, 0) > 0:
            self._asked[queue] -= 1
            self._asked_total -= 1
        if not self._open or self.busy >= self._slots or queue.model in self._paused:
            return False
        self.busy += 1
        self._hot[queue] = now
        self._herd.found(queue)
        # Jobs that come again are not counted as pending, and a dead worker leaves several: look again at once.
        left = job.pending or int(job.delivery > 1)
        self._book.took(queue, left, now)
        if self._wide or left:
            self._fill()
        return True

    def done(self) -> None:
        """A slot is free again."""
        self.busy -= 1
        # With many free, the pulls that are open are renewed as they are used up: there is nothing to decide here.
        if not self._wide or self._free <= self._slots // 4:
            self._fill()

    # Deciding

    @property
    def _free(self) -> int:
        return self._slots - self.busy - self._asked_total

    def _on_bell(self, queue: Queue) -> None:
        if self._free <= 0:
            self._book.rang(queue, self._loop.time())
            return
        if not self._herd.answers(queue):
            if queue not in self._late:
                self._late.add(queue)
                self._loop.call_later(self._herd.patience_s(queue), self._look_late, queue)
            return
        self._book.rang(queue, self._loop.time())
        if self.busy:
            self._loop.call_later(BUSY_BELL_S * self.busy / self._slots, self._fill)
        else:
            self._fill()

    def _look_late(self, queue: Queue) -> None:
        self._late.discard(queue)
        if queue in self._asked:
            self._book.rang(queue, self._loop.time())
            self._fill()

    def _fill(self) -> None:
        if not self._open or self._free <= 0:
            return
        if self._wide:
            self._fill_wide()
        else:
            self._fill_careful()

    def _fill_careful(self) -> None:
        now = self._loop.time()
        for queue in self._book.order(self._loaded(), now):
            if self._free <= 0:
                return
            if not self._asked[queue] and queue.model not in self._paused:
                self._ask(queue, 1, 0.0)
        while self._round and self._free > 0:
            queue = self._round.popleft()
            if queue in self._asked and not self._asked[queue] and queue.model not in self._paused:
                self._ask(queue, 1, 0.0)

    def _fill_wide(self) -> None:
        now = self._loop.time()
        waiting = self._book.order(self._loaded(), now)
        for queue in [*waiting, *(q for q in self._queues if q not in waiting)]:
            free = self._free
            if free <= 0:
                return
            if now < self._not_before.get(queue, 0.0) or queue.model in self._paused:
                continue
            target = self._target(queue, now)
            if self._asked[queue] * 2 <= target - (target == 1):
                self._ask(queue, min(free, target - self._asked[queue]), LINGER_S)

    def _target(self, queue: Queue, now: float) -> int:
        hot = now - self._hot.get(queue, -LINGER_S) < LINGER_S / 2
        return max(1, self._slots // 2 if hot else self._slots // (4 * len(self._queues)))

    def _ask(self, queue: Queue, batch: int, wait_s: float) -> None:
        self._asked[queue] += batch
        self._asked_total += batch
        self._asked_at[queue] = self._loop.time()
        self._bus.pull(queue, batch, wait_s, self._ended)

    def _ended(self, queue: Queue, unused: int) -> None:
        asked = self._asked.get(queue)
        if asked is None:
            return
        unused = min(unused, asked)
        self._asked[queue] -= unused
        self._asked_total -= unused
        if not self._wide:
            self._book.empty(queue)
            self._herd.missed(queue)
        elif self._loop.time() - self._asked_at[queue] < RETRY_S:
            # An end at once means that the queue is not there yet; asking again at once would spin.
            self._not_before[queue] = self._loop.time() + RETRY_S
        self._loop.call_soon(self._fill)

    def _start_round(self) -> None:
        if not self._wide:
            order = {queue: i for i, queue in enumerate(self._book.order(self._loaded(), self._loop.time()))}
            self._round = deque(sorted(self._queues, key=lambda q: order.get(q, len(order))))

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(RETRY_S if self._wide else ROUND_S)
            self._start_round()
            self._fill()
