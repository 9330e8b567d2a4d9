"""How free slots become jobs in hand. Jobs in hand and jobs asked for never exceed the slots.

Two ways to ask a queue, and each queue has its own (`workers.demand`):

- cold: a wake-up notification says that a job was stored; a free slot asks, without waiting, the queue whose turn it is. Of many idle
  workers, a few answer at once (`PullBackoff`). A gateway says, about once a second, which queues hold a job that nobody was
  woken for: they get a turn now and then, also beside queues that always hold one. Beside that a slow round asks some queues, those
  that were used last more often.
- hot: many jobs a second. A pull lingers there, for as many jobs as are likely to come in a moment, renewed when half used; the wake-up
  notifications of this queue are hushed.

No slot is idle beside a job that waits in a queue served here, for longer than a wake-up and LINGER_S; unless its server cannot hold the
job's model beside those in use (`workers.model_turns`). A queue whose model has waited long enough is asked for one job all the same: by its
age, that shows whether another worker serves the queue, or the models in use here have to give way. The job goes back meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

import structlog

from backbone.bus.bus import JobDelivery, Queue, WorkerBus
from schemas.jobs import Lane
from workers.demand import LINGER_S, TICK_S, Demand, share_of
from workers.model_turns import ModelTurns
from workers.pull_backoff import PullBackoff
from workers.queue_selector import RANK, QueueSelector

log = structlog.get_logger(__name__)

ROUND_S = 0.8
"""The slow round: a redelivered job waits at most this long for a free slot to find it, where there are few queues."""
ROUND_QUEUES = 48
"""As many are asked in one round; of more, those that were used last, and the others in turn."""
ROUND_RECENT = 32
BUSY_BELL_S = 0.004
"""A worker with all but one slot busy answers the bell this much later than an idle one, which so gets the job."""
COLD_BELL_S, COLD_BELL_MAX_S = 0.05, 1.0
"""A job whose model would have to be loaded is left so long to a worker that has it loaded; twice as long each time that one has taken it."""
SERVED_ELSEWHERE = 0.5
"""The oldest job of a queue that nobody else serves is older than this part of the time for which the queue has had jobs."""
RETRY_S = 0.25
AGAIN_TURN_S = 0.25
"""While other queues always hold a job, one of those that a gateway named is asked this often: a job that came back must not wait
until the others are empty.
"""


class Puller:
    """Keeps a worker's slots supplied."""

    def __init__(self, bus: WorkerBus, slots: int, loaded: Callable[[], frozenset[str]]) -> None:
        self._bus = bus
        self._turns: ModelTurns | None = None
        """Of a server that may be unable to hold all its models at once."""
        self._cold_bell_s: dict[Queue, float] = {}
        self._cold_asked: set[Queue] = set()
        """Queues that are asked after that time."""
        self._scouted: Queue | None = None
        """A queue that was asked though its model does not fit now."""
        self._slots = slots
        self._loaded = loaded
        self._book = QueueSelector()
        self._herd = PullBackoff()
        self._late: set[Queue] = set()
        self._queues: list[Queue] = []
        self._served: frozenset[Queue] = frozenset()
        self._flows: dict[Queue, Demand] = {}
        """Of the queues that were ever used."""
        self._hot: set[Queue] = set()
        self._active: set[Queue] = set()
        """Those that got a job since the last tick."""
        self._heard: set[Queue] = set()
        """Those of which a notification came since then."""
        self._recent: dict[Queue, None] = {}
        """Queues that got a job, the last one last."""
        self._asked_total = 0
        self._paused: dict[str, tuple[float, asyncio.TimerHandle]] = {}
        """Models whose queues are left alone, until when, and what ends it."""
        self._round: deque[Queue] = deque()
        self._next_in_round = 0
        self._again: dict[Queue, None] = {}
        """Queues that may hold a job that nobody was woken for, in the order in which they were named."""
        self._next_again = 0.0
        self._open = False
        self.busy = 0
        self._ticker: asyncio.Task[None] | None = None
        self._changes: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()

    @property
    def is_open(self) -> bool:
        """Whether jobs are asked for."""
        return self._open

    def take_turns(self, turns: ModelTurns | None) -> None:
        """From now on, let `turns` decide which models get jobs; None: all may at any time."""
        self._turns = turns

    async def serve(self, queues: list[Queue], slots: int | None = None) -> None:
        """Take jobs from these queues from now on, in place of the last ones; with `slots`, that many at once."""
        self._slots = slots or self._slots
        if queues != self._queues:
            self._queues, self._served = list(queues), frozenset(queues)
            self._book.serve(queues)
            self._flows = {queue: flow for queue, flow in self._flows.items() if queue in self._served}
            self._recent = {queue: None for queue in self._recent if queue in self._served}
            self._again = {queue: None for queue in self._again if queue in self._served}
            self._hot &= self._served
            await self._bus.serve(queues, self._on_bell, self._on_again)
            self._asked_total = sum(flow.asked for flow in self._flows.values())
        self._start_round()
        self._fill()

    def open(self) -> None:
        """Begin, or go on, to ask for jobs."""
        if self._open:
            return
        self._open = True
        if self._ticker is None:
            self._ticker = asyncio.create_task(self._tick())
        self._start_round()
        self._fill()

    def pause(self) -> None:
        """Ask for no more. Pulls already open may still bring jobs."""
        self._open = False

    def pause_model(self, model: str, seconds: float) -> None:
        """Ask for no job of the model for so long. Those that still come are given back."""
        until = self._loop.time() + seconds
        if model in self._paused:
            before, timer = self._paused[model]
            if before >= until:
                return
            timer.cancel()
        self._paused[model] = until, self._loop.call_at(until, self._resume, model)
        if self._turns is not None:
            self._turns.withdraw(model)

    def _resume(self, model: str) -> None:
        # The timer alone says when: by a loop whose clock counts milliseconds, it comes a moment before its time.
        del self._paused[model]
        self._start_round()
        self._fill()

    async def close(self) -> None:
        """Ask for no more; every job that was on its way has arrived when this returns."""
        self._open = False
        for _, timer in self._paused.values():
            timer.cancel()
        for task in (self._ticker, *self._changes):
            if task is not None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        self._ticker = None
        await self._bus.stop_pulling()
        self._flows.clear()
        self._queues, self._asked_total = [], 0

    def arrived(self, job: JobDelivery) -> bool:
        """A job has come. False when there is no slot for it: the caller gives it back."""
        queue, now = job.queue, self._loop.time()
        flow = self._flow(queue)
        if flow.asked > 0:
            flow.asked -= 1
            self._asked_total -= 1
            if self._turns is not None and not self._turns.free:
                self._unask(queue, 1)
        # Jobs that come again are not counted as pending, and a dead worker leaves several: look again at once.
        left = job.pending or int(job.delivery > 1)
        if not self._open or self.busy >= self._slots or queue.model in self._paused:
            self._book.rang(queue, now)
            return False
        turns = self._turns
        if turns is None or (turns.free and queue.model in turns.resident):
            pass
        elif not self._begin(turns, job, now):
            job.nak()  # at once: another worker may have its model loaded
            return False
        self.busy += 1
        flow.arrived += 1
        flow.vain = 0
        self._active.add(queue)
        self._herd.found(queue)
        self._book.took(queue, left, now)
        if flow.hot and not self._book.waits:
            self._renew(queue, flow, now)
        elif flow.hot or left:
            self._fill()
        return True

    def done(self, model: str = "") -> None:
        """A slot is free again; `model` is what its job was for."""
        self.busy -= 1
        if self._turns is not None and not self._turns.free:
            self._turns.leave(model)
        # With many free, the pulls that are open are renewed as they are used up: there is nothing to decide here.
        if self._book.waits or self._again or self._round or (self._hot and self._free <= self._slots // 4):
            self._fill()

    def refill(self) -> None:
        """Ask for jobs that may be taken now, since the server has loaded a model."""
        self._fill()

    # Wake-up notifications

    def _on_bell(self, queue: Queue) -> None:
        flow = self._flow(queue)
        if flow.hot and flow.asked:
            return  # the open pull brings it
        flow.rang = flow.asked > 0
        self._recent.pop(queue, None)
        self._recent[queue] = None
        cold = self._turns is not None and self._turns.is_cold(queue.model)
        if not cold:
            flow.heard += 1
            self._heard.add(queue)
        if self._free <= 0:
            self._book.rang(queue, self._loop.time())
            return
        if not self._herd.answers(queue) or cold:
            if queue not in self._late:
                self._late.add(queue)
                patience = self._herd.patience_s(queue)
                self._loop.call_later(
                    max(patience, self._cold_wait(queue)) if cold else patience, self._look_late, queue
                )
            return
        self._book.rang(queue, self._loop.time())
        if self.busy:
            self._loop.call_later(BUSY_BELL_S * self.busy / self._slots, self._fill)
        else:
            self._fill()

    def _look_late(self, queue: Queue) -> None:
        self._late.discard(queue)
        self._book.rang(queue, self._loop.time())
        self._fill()

    def _on_again(self, queue: Queue) -> None:
        """The queue may hold a job that nobody was woken for: no reason to hurry, nor to learn from a vain ask."""
        flow = self._flow(queue)
        if not flow.asked and self._loop.time() - flow.asked_at > RETRY_S and queue in self._served:
            self._again[queue] = None
            self._fill()

    # Deciding

    @property
    def _free(self) -> int:
        return self._slots - self.busy - self._asked_total

    def _flow(self, queue: Queue) -> Demand:
        flow = self._flows.get(queue)
        if flow is None:
            flow = Demand()
            if queue in self._served:
                self._flows[queue] = flow
        return flow

    def _fill(self) -> None:
        if not self._open or self._free <= 0:
            return
        now = self._loop.time()
        if self._again:
            self._fill_again(now)
        if self._book.waits:
            self._fill_waiting(now)
        for queue in self._hot:
            if self._free <= 0:
                return
            self._renew(queue, self._flows[queue], now)
        while self._round and self._free > 0:
            self._poll(self._round.popleft(), now)

    def _fill_again(self, now: float) -> None:
        """The queues that a gateway named: all of them where nothing else waits, or else one, now and then."""
        while self._again and self._free > 0 and (now >= self._next_again or not self._book.waits):
            queue = next(iter(self._again))
            del self._again[queue]
            self._next_again = now + AGAIN_TURN_S
            self._poll(queue, now)

    def _fill_waiting(self, now: float) -> None:
        """The queues that hold a job: in order, each its share of the slots, and the first at least one."""
        order = self._book.order(self._loaded(), now)
        if self._paused:
            order = [queue for queue in order if queue.model not in self._paused]
        if self._turns is not None and not self._turns.free:
            order = self._whose_turn(self._turns, order, now)
        for place, queue in enumerate(order):
            free = self._free
            if free <= 0:
                return
            flow = self._flow(queue)
            share = min(self._book.pending(queue), max(1, free // (len(order) - place)))
            # A pull that lingers may be joined by another; one that does not says by its end that nothing is left.
            if (not flow.asked or flow.lingers) and flow.asked < share:
                self._ask(queue, flow, share - flow.asked, now)

    def _renew(self, queue: Queue, flow: Demand, now: float) -> None:
        target = flow.target
        if len(self._hot) > 1:  # one promise for each comes first
            target = min(target, max(1, (self._slots - self.busy) // len(self._hot)))
        if flow.asked * 2 <= target - (target == 1) and (flow.lingers or not flow.asked):
            count = min(self._free, target - flow.asked)
            if count > 0:
                self._ask(queue, flow, count, now)

    def _poll(self, queue: Queue, now: float) -> None:
        flow = self._flow(queue)
        if queue in self._served and not flow.hot and not flow.asked:
            if self._turns is None or self._turns.admits(queue.model, self._wanted()):
                self._ask(queue, flow, 1, now)
            elif self._book.since(queue) is None:
                self._book.rang(queue, now)  # it may hold a job: its turn will come

    def _ask(self, queue: Queue, flow: Demand, count: int, now: float) -> None:
        if queue.model in self._paused:
            return
        if self._turns is not None and not self._turns.free:
            if not self._turns.admits(queue.model, self._wanted()):
                return
            self._turns.ask(queue.model, count)
        self._pull(queue, flow, count, now)

    def _pull(self, queue: Queue, flow: Demand, count: int, now: float) -> None:
        if not flow.asked:
            flow.lingers, flow.rang = flow.hot, False
        flow.asked += count
        flow.asked_at = now
        self._asked_total += count
        self._bus.pull(queue, count, LINGER_S if flow.lingers else 0.0, self._ended)

    def _ended(self, queue: Queue, unused: int) -> None:
        flow = self._flows.get(queue)
        if flow is None:
            return
        now = self._loop.time()
        unused = min(unused, flow.asked)
        flow.asked -= unused
        self._asked_total -= unused
        self._book.empty(queue)
        if self._turns is not None:
            self._unask(queue, unused)
            if queue in self._cold_asked and queue not in self._late:
                self._cold_asked.discard(queue)
                self._cold_bell_s[queue] = min(2 * self._cold_bell_s.get(queue, COLD_BELL_S), COLD_BELL_MAX_S)
            if queue.model == self._turns.next and queue.model not in self._wanted():
                self._turns.withdraw(queue.model)
        if not flow.lingers:
            self._herd.missed(queue)
            if flow.rang:
                self._book.rang(queue, now)
            flow.rang = False
        elif not flow.asked:
            # All that was promised ended in vain, or the queue is gone: to ask again at once would idle slots, or spin.
            flow.ran_out()
            if flow.hot:
                self._set_hot(queue, flow, hot=False)
            else:
                self._book.rang(queue, now)  # what came before the notifications did
        self._loop.call_soon(self._fill)

    # Turns of models

    def _wanted(self) -> frozenset[str]:
        """The models of which jobs are believed to wait."""
        if self._turns is None or self._turns.free:
            return frozenset()
        return self._book.models - self._paused.keys()

    def _whose_turn(self, turns: ModelTurns, order: list[Queue], now: float) -> list[Queue]:
        """Leave out the queues whose models do not fit now. One that has waited long enough is asked for one job all the same."""
        wanted = self._wanted()
        if self._scouted is not None and not self._flow(self._scouted).asked:
            self._scouted = None
        admitted = [queue for queue in order if turns.admits(queue.model, wanted)]
        if self._scouted is None and len(admitted) < len(order):
            for queue in order:
                if queue not in admitted and self._is_due(turns, queue, wanted, now):
                    flow = self._flow(queue)
                    if not flow.asked:
                        self._scouted = queue
                        self._pull(queue, flow, 1, now)
                        break
        return admitted

    def _is_due(self, turns: ModelTurns, queue: Queue, wanted: frozenset[str], now: float) -> bool:
        since = self._book.since(queue)
        if since is None or now - since < turns.patience_s(self._standing(queue)):
            return False
        return turns.may_claim(queue.model, wanted, now)

    def _standing(self, queue: Queue) -> int:
        """Below 0 where no job of another model waits in a lane as high, above 0 where one waits in a higher lane."""
        others = (RANK[lane] for lane, model in self._book.waiting_lanes() if model != queue.model)
        return RANK[queue.lane] - min(others, default=RANK[Lane.DEFAULT])

    def _cold_wait(self, queue: Queue) -> float:
        """How long to leave a job there to a worker that has its model loaded."""
        self._cold_asked.add(queue)
        return self._cold_bell_s.get(queue, COLD_BELL_S)

    def _has_waited(self, job: JobDelivery) -> bool:
        """Return whether no worker that has the job's model loaded was there to take it; otherwise look again later."""
        queue = job.queue
        left_s = self._cold_wait(queue) - job.age_s
        if left_s > BUSY_BELL_S:
            self._book.empty(queue)
            if queue not in self._late:
                self._late.add(queue)
                self._loop.call_later(left_s, self._look_late, queue)
            return False
        self._cold_asked.discard(queue)
        self._cold_bell_s.pop(queue, None)
        return True

    def _unask(self, queue: Queue, count: int) -> None:
        """Jobs that were asked for have come, or will not."""
        assert self._turns is not None
        if queue == self._scouted:
            self._scouted = None
        else:
            self._turns.leave(queue.model, count)

    def _begin(self, turns: ModelTurns, job: JobDelivery, now: float) -> bool:
        """A job has come: it begins, unless its model does not fit now. Then it goes back, and the others may have to give way."""
        queue, model = job.queue, job.queue.model
        wanted = self._wanted()
        if turns.admits(model, wanted):
            if turns.is_cold(model) and not self._has_waited(job):
                return False
            turns.begin(model, now)
            turns.ask(model)  # a job that begins the first load counts too
            return True
        self._book.rang(queue, now)
        since = self._book.since(queue)
        if since is not None and turns.may_claim(model, wanted, now):
            if job.age_s >= SERVED_ELSEWHERE * (now - since) and self._is_due(turns, queue, wanted, now):
                turns.claim(model, wanted)
                log.info("worker.model_turn_claimed", model=model, waited_s=round(now - since, 1))
                self._loop.call_soon(self._fill)
            else:
                self._book.restart(queue, now - job.age_s)
        return False

    # The clock

    async def _tick(self) -> None:
        next_round = self._loop.time() + ROUND_S
        while True:
            await asyncio.sleep(TICK_S)
            self._judge()
            if self._turns is not None and not self.busy and not self._asked_total:
                self._scouted = None
                self._turns.empty_hands()  # what was asked of a queue that is not served any more was not counted back
            if self._loop.time() >= next_round:
                next_round = self._loop.time() + ROUND_S
                self._start_round()
            self._fill()

    def _judge(self) -> None:
        """Which queues are hot."""
        active = self._active | self._hot
        share = share_of(self._slots, self.busy, max(len(active), len(self._book)))
        ticking = active | self._heard
        self._active, self._heard = set(), set()
        for queue in ticking:
            flow = self._flow(queue)
            hot = flow.tick(share)
            if hot is not flow.hot and queue in self._served:
                self._set_hot(queue, flow, hot=hot)

    def _set_hot(self, queue: Queue, flow: Demand, *, hot: bool) -> None:
        flow.hot = hot
        (self._hot.add if hot else self._hot.discard)(queue)
        self._change(self._hush(queue, flow))

    async def _hush(self, queue: Queue, flow: Demand) -> None:
        """A hot queue needs no notifications. One that is cold again is asked once more when they come."""
        await self._bus.set_muted(queue, muted=flow.hot)
        if not flow.hot:
            self._book.rang(queue, self._loop.time())
        self._fill()

    def _change(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)

    def _start_round(self) -> None:
        """What waits comes first; then what was used last; then the others in turn."""
        if len(self._queues) <= ROUND_QUEUES:
            chosen = self._queues
        else:
            recent = [queue for queue, _ in zip(reversed(self._recent), range(ROUND_RECENT), strict=False)]
            chosen = [*recent, *self._in_turn(ROUND_QUEUES - len(recent))]
        self._round = deque(dict.fromkeys(chosen))

    def _in_turn(self, count: int) -> list[Queue]:
        start = self._next_in_round
        self._next_in_round = (start + count) % len(self._queues)
        return [self._queues[(start + number) % len(self._queues)] for number in range(count)]
