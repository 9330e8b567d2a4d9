"""Admission of queues and jobs while the models of a server take turns. Pure: no clock, no bus.

A queue whose model does not fit now gets no slot. Once it has waited long enough, the worker pulls one job of it all the same, as a
scout: its age shows whether another worker serves the queue, or the models in use here have to yield. The scouted job goes back.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from backbone.bus.bus import JobDelivery, Queue
from schemas.jobs import Lane
from workers.model_turns import ModelTurns
from workers.queue_selector import LANE_RANK, QueueSelector

MIN_COLD_DELAY_S, MAX_COLD_DELAY_S = 0.05, 1.0
"""How long a job whose model is not loaded here is left to a worker that has it loaded; doubled each time such a worker takes one."""
MIN_COLD_WAIT_S = 0.004
"""A shorter rest of the delay is not waited for."""
UNSERVED_AGE_SHARE = 0.5
"""The oldest job of a queue without another worker is older than this share of the time since when the queue has jobs."""


@dataclass(frozen=True, slots=True)
class AdmissionDecision:
    """What happens to a job that has come."""

    starts: bool
    """It runs here; otherwise it goes back to its queue at once."""
    retry_s: float | None = None
    """When to look at its queue again; None: no timer is needed."""
    claimed_after_s: float | None = None
    """The other models yield to its model, after its queue has waited so long."""


START = AdmissionDecision(starts=True)
RETURN = AdmissionDecision(starts=False)


class ModelAdmission:
    """Decides which queues and jobs are admitted, by the turns of their models."""

    def __init__(self, turns: ModelTurns, selector: QueueSelector) -> None:
        self.turns = turns
        self._selector = selector
        self._scouted: Queue | None = None
        """A queue that was pulled though its model does not fit now."""
        self._cold_delays_s: dict[Queue, float] = {}
        self._delayed: set[Queue] = set()
        """Queues that are pulled after their cold delay."""

    def waiting_models(self, paused: Collection[str]) -> frozenset[str]:
        """Return the models of which jobs are believed to wait, without those that are paused."""
        if self.turns.unrestricted:
            return frozenset()
        return self._selector.waiting_models.difference(paused)

    def admits(self, model: str, paused: Collection[str]) -> bool:
        """Return whether a job of the model may be requested now."""
        return self.turns.admits(model, self.waiting_models(paused))

    def filter_queues(
        self, ranked: list[Queue], paused: Collection[str], now: float, outstanding: Callable[[Queue], int]
    ) -> tuple[list[Queue], Queue | None]:
        """Return the queues whose models fit now, and one to scout, if any. `outstanding`: how many jobs of a queue are requested."""
        waiting = self.waiting_models(paused)
        if self._scouted is not None and not outstanding(self._scouted):
            self._scouted = None
        admitted = [queue for queue in ranked if self.turns.admits(queue.model, waiting)]
        if self._scouted is None and len(admitted) < len(ranked):
            for queue in ranked:
                if queue not in admitted and self._is_due(queue, waiting, now) and not outstanding(queue):
                    self._scouted = queue
                    return admitted, queue
        return admitted, None

    def decide(self, job: JobDelivery, paused: Collection[str], now: float) -> AdmissionDecision:
        """Decide about a job that has come, and note its start or its model's claim."""
        queue, model = job.queue, job.queue.model
        waiting = self.waiting_models(paused)
        if self.turns.admits(model, waiting):
            if self.turns.needs_load(model) and (retry_s := self._remaining_delay_s(job)) is not None:
                return AdmissionDecision(starts=False, retry_s=retry_s)
            self.turns.start_job(model, now)
            self.turns.record_request(model)  # a job that begins the first load counts as well
            return START
        self._selector.record_notification(queue, now)
        since = self._selector.waiting_since(queue)
        if since is not None and self.turns.may_claim(model, waiting, now):
            if job.age_s >= UNSERVED_AGE_SHARE * (now - since) and self._is_due(queue, waiting, now):
                self.turns.claim(model, waiting)
                return AdmissionDecision(starts=False, claimed_after_s=now - since)
            self._selector.set_waiting_since(queue, now - job.age_s)
        return RETURN

    def record_end(self, queue: Queue, count: int) -> None:
        """Note that jobs which were requested have come, or will not."""
        if queue == self._scouted:
            self._scouted = None
        else:
            self.turns.record_end(queue.model, count)

    def record_empty(self, queue: Queue, *, delay_runs: bool) -> None:
        """Note that a pull found no job: after a cold delay, another worker has taken it. `delay_runs`: the delay is not over yet."""
        if queue in self._delayed and not delay_runs:
            self._delayed.discard(queue)
            self._cold_delays_s[queue] = min(2 * self._cold_delays_s.get(queue, MIN_COLD_DELAY_S), MAX_COLD_DELAY_S)

    def cancel_claim_without_jobs(self, model: str, paused: Collection[str]) -> None:
        """Cancel the model's claim, if none of its jobs waits any more."""
        if model == self.turns.claimant and model not in self.waiting_models(paused):
            self.turns.cancel_claim(model)

    def reset(self) -> None:
        """Note that no job runs, and none was requested."""
        self._scouted = None
        self.turns.reset_active_jobs()

    def start_cold_delay(self, queue: Queue) -> float:
        """Return how long to leave a job in the queue to a worker that has its model loaded."""
        self._delayed.add(queue)
        return self._cold_delays_s.get(queue, MIN_COLD_DELAY_S)

    def _remaining_delay_s(self, job: JobDelivery) -> float | None:
        """Return the rest of the cold delay; None where no other worker was there to take the job."""
        queue = job.queue
        left_s = self.start_cold_delay(queue) - job.age_s
        if left_s > MIN_COLD_WAIT_S:
            return left_s
        self._delayed.discard(queue)
        self._cold_delays_s.pop(queue, None)
        return None

    def _is_due(self, queue: Queue, waiting: frozenset[str], now: float) -> bool:
        since = self._selector.waiting_since(queue)
        if since is None or now - since < self.turns.patience_s(self._lane_difference(queue)):
            return False
        return self.turns.may_claim(queue.model, waiting, now)

    def _lane_difference(self, queue: Queue) -> int:
        """Return a value below 0 where no job of another model waits in a lane as high, above 0 where one waits in a higher lane."""
        others = (LANE_RANK[lane] for lane, model in self._selector.waiting_lanes() if model != queue.model)
        return LANE_RANK[queue.lane] - min(others, default=LANE_RANK[Lane.DEFAULT])
