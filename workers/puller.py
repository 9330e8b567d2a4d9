"""Pulling jobs for a worker's free slots. Running and requested jobs never exceed the slots.

A queue is pulled in one of two ways, depending on its demand (`workers.demand`):

- cold: a wake-up notification says that a job was stored; a free slot pulls, without waiting, the queue whose turn it is. Of many idle
  workers, only a few react at once (`PullBackoff`). About once a second, a gateway names queues with a job of which no notification came:
  these get a turn now and then, even beside queues that always hold a job. In addition, a slow round pulls some queues, those that
  were used last more often.
- hot: many jobs a second. A pull lingers there, for as many jobs as are likely to come in a moment, and is renewed when half used; the
  queue's notifications are muted.

No slot stays idle while a job waits in a queue that is served here, for longer than a wake-up and LINGER_S, unless the server cannot hold
the job's model beside those in use (`workers.model_admission`).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

import structlog

from backbone.bus.bus import JobDelivery, Queue, WorkerBus
from workers.demand import LINGER_S, TICK_S, Demand, slots_per_queue
from workers.model_admission import ModelAdmission
from workers.model_turns import ModelTurns
from workers.poll_rounds import PollRounds
from workers.pull_backoff import PullBackoff
from workers.queue_selector import QueueSelector

log = structlog.get_logger(__name__)

POLL_ROUND_S = 0.8
"""The interval of the slow rounds: a redelivered job waits at most this long for a free slot, where there are few queues."""
BUSY_WAKE_DELAY_S = 0.004
"""How much later a worker with all but one slot busy reacts to a notification than an idle worker, which so gets the job."""
BACKLOG_RETRY_S = 0.25
"""A queue that was pulled more recently is not pulled because a gateway names it."""
BACKLOG_TURN_S = 0.25
"""While other queues always hold a job, one of those that a gateway named is pulled at this interval: a redelivered job must not wait
until the others are empty.
"""


class Puller:
    """Keeps a worker's slots supplied with jobs."""

    def __init__(self, bus: WorkerBus, slots: int, loaded: Callable[[], frozenset[str]]) -> None:
        self._bus = bus
        self._turns: ModelTurns | None = None
        """Set for a server that may be unable to hold all its models at once."""
        self._admission: ModelAdmission | None = None
        """Set as long as `_turns` is."""
        self._last_admission: ModelAdmission | None = None
        self._slots = slots
        self._loaded = loaded
        self._selector = QueueSelector()
        self._backoff = PullBackoff()
        self._rounds = PollRounds()
        self._deferred: set[Queue] = set()
        """Queues that a timer will pull."""
        self._queues: list[Queue] = []
        self._served: frozenset[Queue] = frozenset()
        self._demands: dict[Queue, Demand] = {}
        """The demand for each queue that was ever used."""
        self._hot: set[Queue] = set()
        self._active: set[Queue] = set()
        """Queues that got a job since the last tick."""
        self._notified: set[Queue] = set()
        """Queues of which a notification came since the last tick."""
        self._outstanding = 0
        self._paused: dict[str, tuple[float, asyncio.TimerHandle]] = {}
        """Models whose queues are not pulled: the end of the pause, and the timer that ends it."""
        self._round: deque[Queue] = deque()
        self._backlog: dict[Queue, None] = {}
        """Queues that may hold a job of which no notification came, in the order in which they were named."""
        self._next_backlog_turn = 0.0
        self._open = False
        self.busy = 0
        self._ticker: asyncio.Task[None] | None = None
        self._background: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()

    @property
    def is_open(self) -> bool:
        """Whether jobs are requested."""
        return self._open

    def set_model_turns(self, turns: ModelTurns | None) -> None:
        """Let `turns` decide from now on which models get jobs; None: all may at any time."""
        if turns is not None and (self._last_admission is None or self._last_admission.turns is not turns):
            self._last_admission = ModelAdmission(turns, self._selector)
        self._turns = turns
        self._admission = self._last_admission if turns is not None else None

    async def serve(self, queues: list[Queue], slots: int | None = None) -> None:
        """Take jobs from these queues from now on, in place of the last ones; with `slots`, that many at once."""
        self._slots = slots or self._slots
        if queues != self._queues:
            self._queues, self._served = list(queues), frozenset(queues)
            self._selector.serve(queues)
            self._rounds.serve(self._queues, self._served)
            self._demands = {queue: demand for queue, demand in self._demands.items() if queue in self._served}
            self._backlog = {queue: None for queue in self._backlog if queue in self._served}
            self._hot &= self._served
            await self._bus.serve(queues, self._on_notification, self._on_backlog)
            self._outstanding = sum(demand.outstanding for demand in self._demands.values())
        self._start_round()
        self._fill()

    def open(self) -> None:
        """Start or resume requesting jobs."""
        if self._open:
            return
        self._open = True
        if self._ticker is None:
            self._ticker = asyncio.create_task(self._tick())
        self._start_round()
        self._fill()

    def pause(self) -> None:
        """Request no more jobs. Open pulls may still bring some."""
        self._open = False

    def pause_model(self, model: str, seconds: float) -> None:
        """Request no job of the model for so long. Jobs that still come go back."""
        until = self._loop.time() + seconds
        if model in self._paused:
            before, timer = self._paused[model]
            if before >= until:
                return
            timer.cancel()
        self._paused[model] = until, self._loop.call_at(until, self._resume_model, model)
        if self._turns is not None:
            self._turns.cancel_claim(model)

    def _resume_model(self, model: str) -> None:
        # The timer alone decides: on a loop whose clock counts milliseconds, it fires a moment before its time.
        del self._paused[model]
        self._start_round()
        self._fill()

    async def close(self) -> None:
        """Request no more jobs; every job that was on its way has arrived when this returns."""
        self._open = False
        for _, timer in self._paused.values():
            timer.cancel()
        for task in (self._ticker, *self._background):
            if task is not None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        self._ticker = None
        await self._bus.stop_pulling()
        self._demands.clear()
        self._queues, self._outstanding = [], 0

    def accept(self, job: JobDelivery) -> bool:
        """Assign a slot to a job that has come; return False where there is none, and the caller must nak the job."""
        queue, now = job.queue, self._loop.time()
        demand = self._demand(queue)
        turns, admission = self._turns, self._admission
        if demand.outstanding > 0:
            demand.outstanding -= 1
            self._outstanding -= 1
            if turns is not None and not turns.unrestricted:
                assert admission is not None
                admission.record_end(queue, 1)
        # Redelivered jobs are not counted as pending, and a dead worker leaves several: look again at once.
        remaining = job.pending or int(job.delivery > 1)
        if not self._open or self.busy >= self._slots or queue.model in self._paused:
            self._selector.record_notification(queue, now)
            return False
        if admission is None or turns is None or (turns.unrestricted and queue.model in turns.resident_models):
            pass
        elif not self._admit(admission, job, now):
            job.nak()  # at once: another worker may have its model loaded
            return False
        self.busy += 1
        demand.arrivals += 1
        demand.empty_pulls = 0
        self._active.add(queue)
        self._backoff.record_job(queue)
        self._selector.record_job(queue, remaining, now)
        if demand.hot and not self._selector.has_waiting:
            self._renew(queue, demand, now)
        elif demand.hot or remaining:
            self._fill()
        return True

    def release(self, model: str = "") -> None:
        """Free the slot of a job that has ended; `model` is the job's."""
        self.busy -= 1
        if self._turns is not None and not self._turns.unrestricted:
            self._turns.record_end(model)
        # With many slots free, the open pulls are renewed as they are used up: there is nothing to decide here.
        if self._selector.has_waiting or self._backlog or self._round or (self._hot and self._free <= self._slots // 4):
            self._fill()

    def refill(self) -> None:
        """Request jobs that may be taken now, after the server has loaded a model."""
        self._fill()

    # Notifications

    def _on_notification(self, queue: Queue) -> None:
        demand = self._demand(queue)
        if demand.hot and demand.outstanding:
            return  # the open pull brings the job
        demand.notified = demand.outstanding > 0
        self._rounds.record_use(queue)
        admission = self._admission
        cold = admission is not None and admission.turns.needs_load(queue.model)
        if not cold:
            demand.notifications += 1
            self._notified.add(queue)
        if self._free <= 0:
            self._selector.record_notification(queue, self._loop.time())
            return
        if not self._backoff.should_pull(queue) or cold:
            if queue not in self._deferred:
                delay_s = self._backoff.deferral_s(queue)
                if cold and admission is not None:
                    delay_s = max(delay_s, admission.start_cold_delay(queue))
                self._defer(queue, delay_s)
            return
        self._selector.record_notification(queue, self._loop.time())
        if self.busy:
            self._loop.call_later(BUSY_WAKE_DELAY_S * self.busy / self._slots, self._fill)
        else:
            self._fill()

    def _defer(self, queue: Queue, delay_s: float) -> None:
        self._deferred.add(queue)
        self._loop.call_later(delay_s, self._pull_deferred, queue)

    def _pull_deferred(self, queue: Queue) -> None:
        self._deferred.discard(queue)
        self._selector.record_notification(queue, self._loop.time())
        self._fill()

    def _on_backlog(self, queue: Queue) -> None:
        """Note a queue that may hold a job of which no notification came. It is not urgent, and an empty pull shows nothing."""
        demand = self._demand(queue)
        is_recent = self._loop.time() - demand.last_pull <= BACKLOG_RETRY_S
        if not demand.outstanding and not is_recent and queue in self._served:
            self._backlog[queue] = None
            self._fill()

    # Decisions

    @property
    def _free(self) -> int:
        return self._slots - self.busy - self._outstanding

    def _demand(self, queue: Queue) -> Demand:
        demand = self._demands.get(queue)
        if demand is None:
            demand = Demand()
            if queue in self._served:
                self._demands[queue] = demand
        return demand

    def _fill(self) -> None:
        if not self._open or self._free <= 0:
            return
        now = self._loop.time()
        if self._backlog:
            self._fill_backlog(now)
        if self._selector.has_waiting:
            self._fill_waiting(now)
        for queue in self._hot:
            if self._free <= 0:
                return
            self._renew(queue, self._demands[queue], now)
        while self._round and self._free > 0:
            self._poll(self._round.popleft(), now)

    def _fill_backlog(self, now: float) -> None:
        """Pull the queues that a gateway named: all of them where no other queue waits, else one at each interval."""
        while self._backlog and self._free > 0 and (now >= self._next_backlog_turn or not self._selector.has_waiting):
            queue = next(iter(self._backlog))
            del self._backlog[queue]
            self._next_backlog_turn = now + BACKLOG_TURN_S
            self._poll(queue, now)

    def _fill_waiting(self, now: float) -> None:
        """Pull the queues that hold a job, best first: each its share of the slots, and the first at least one."""
        ranked = self._selector.rank_queues(self._loaded(), now)
        if self._paused:
            ranked = [queue for queue in ranked if queue.model not in self._paused]
        if self._admission is not None and not self._admission.turns.unrestricted:
            ranked = self._filter_by_turns(self._admission, ranked, now)
        for place, queue in enumerate(ranked):
            free = self._free
            if free <= 0:
                return
            demand = self._demand(queue)
            share = min(self._selector.pending(queue), max(1, free // (len(ranked) - place)))
            # A lingering pull may be joined by another one; one that does not linger shows by its end that the queue is empty.
            if (not demand.outstanding or demand.lingers) and demand.outstanding < share:
                self._request(queue, demand, share - demand.outstanding, now)

    def _filter_by_turns(self, admission: ModelAdmission, ranked: list[Queue], now: float) -> list[Queue]:
        """Return the queues whose models fit now, and pull one that is due for a scout."""
        admitted, scouted = admission.filter_queues(
            ranked, self._paused, now, lambda queue: self._demand(queue).outstanding
        )
        if scouted is not None:
            self._pull(scouted, self._demand(scouted), 1, now)
        return admitted

    def _admit(self, admission: ModelAdmission, job: JobDelivery, now: float) -> bool:
        """Return whether a job starts; where it does not, its model may have claimed the next turn."""
        queue = job.queue
        decision = admission.decide(job, self._paused, now)
        if decision.retry_s is not None:
            self._selector.record_empty(queue)
            if queue not in self._deferred:
                self._defer(queue, decision.retry_s)
        if decision.claimed_after_s is not None:
            log.info("worker.model_turn_claimed", model=queue.model, waited_s=round(decision.claimed_after_s, 1))
            self._loop.call_soon(self._fill)
        return decision.starts

    def _renew(self, queue: Queue, demand: Demand, now: float) -> None:
        target = demand.target
        if len(self._hot) > 1:  # one slot for each of them comes first
            target = min(target, max(1, (self._slots - self.busy) // len(self._hot)))
        if demand.outstanding * 2 <= target - (target == 1) and (demand.lingers or not demand.outstanding):
            count = min(self._free, target - demand.outstanding)
            if count > 0:
                self._request(queue, demand, count, now)

    def _poll(self, queue: Queue, now: float) -> None:
        demand = self._demand(queue)
        if queue in self._served and not demand.hot and not demand.outstanding:
            if self._admission is None or self._admission.admits(queue.model, self._paused):
                self._request(queue, demand, 1, now)
            elif self._selector.waiting_since(queue) is None:
                self._selector.record_notification(queue, now)  # it may hold a job: its turn will come

    def _request(self, queue: Queue, demand: Demand, count: int, now: float) -> None:
        if queue.model in self._paused:
            return
        admission = self._admission
        if admission is not None and not admission.turns.unrestricted:
            if not admission.admits(queue.model, self._paused):
                return
            admission.turns.record_request(queue.model, count)
        self._pull(queue, demand, count, now)

    def _pull(self, queue: Queue, demand: Demand, count: int, now: float) -> None:
        if not demand.outstanding:
            demand.lingers, demand.notified = demand.hot, False
        demand.outstanding += count
        demand.last_pull = now
        self._outstanding += count
        self._bus.pull(queue, count, LINGER_S if demand.lingers else 0.0, self._on_pull_end)

    def _on_pull_end(self, queue: Queue, unused: int) -> None:
        demand = self._demands.get(queue)
        if demand is None:
            return
        now = self._loop.time()
        unused = min(unused, demand.outstanding)
        demand.outstanding -= unused
        self._outstanding -= unused
        self._selector.record_empty(queue)
        if self._admission is not None:
            self._admission.record_end(queue, unused)
            self._admission.record_empty(queue, delay_runs=queue in self._deferred)
            self._admission.cancel_claim_without_jobs(queue.model, self._paused)
        if not demand.lingers:
            self._backoff.record_empty(queue)
            if demand.notified:
                self._selector.record_notification(queue, now)
            demand.notified = False
        elif not demand.outstanding:
            # The pull brought nothing, or the queue is missing: pulling again at once would keep slots idle, or spin.
            demand.cool_down()
            if demand.hot:
                self._set_hot(queue, demand, hot=False)
            else:
                self._selector.record_notification(queue, now)  # a job may have come before the notifications did
        self._loop.call_soon(self._fill)

    # The clock

    async def _tick(self) -> None:
        next_round = self._loop.time() + POLL_ROUND_S
        while True:
            await asyncio.sleep(TICK_S)
            self._update_hot()
            if self._admission is not None and not self.busy and not self._outstanding:
                self._admission.reset()  # jobs requested from a queue that is not served any more were not discounted
            if self._loop.time() >= next_round:
                next_round = self._loop.time() + POLL_ROUND_S
                self._start_round()
            self._fill()

    def _update_hot(self) -> None:
        """Decide which queues are hot."""
        active = self._active | self._hot
        share = slots_per_queue(self._slots, self.busy, max(len(active), len(self._selector)))
        used = active | self._notified
        self._active, self._notified = set(), set()
        for queue in used:
            demand = self._demand(queue)
            hot = demand.tick(share)
            if hot is not demand.hot and queue in self._served:
                self._set_hot(queue, demand, hot=hot)

    def _set_hot(self, queue: Queue, demand: Demand, *, hot: bool) -> None:
        demand.hot = hot
        (self._hot.add if hot else self._hot.discard)(queue)
        self._run_in_background(self._update_muting(queue, demand))

    async def _update_muting(self, queue: Queue, demand: Demand) -> None:
        """Mute the notifications of a hot queue. A queue that is cold again is pulled once more when they are back."""
        await self._bus.set_muted(queue, muted=demand.hot)
        if not demand.hot:
            self._selector.record_notification(queue, self._loop.time())
        self._fill()

    def _run_in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def _start_round(self) -> None:
        self._round = self._rounds.next_round()
