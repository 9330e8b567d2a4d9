"""Any order of what workers, gateways and callers may do to one job: one end per run, and records that say it."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backbone.bus.bus import Queue
from backbone.store.store import CLAIMED_TIMER_S
from backbone.testing.bus import MemoryDelivery
from backbone.testing.job_log import MemoryWorkerLog
from backbone.testing.job_log_state import JobLogState
from gateway.jobs import records
from schemas.errors import WORKER_DRAINED, BackendFailed, ErrorInfo, NexusError, Unavailable
from schemas.frames import AttemptStarted, FrameKind, encode_frame
from schemas.job_events import GateRequest, GateVerdict
from schemas.jobs import TERMINAL_STATUSES, Capability, Envelope, JobRecord, JobStatus, Lane, Limits
from schemas.outcome import Outcome, outcome_of
from tests.conftest import Eventually
from tests.unit.gateway.jobs.rig import OWNER, QUEUE_S, Rig

QUEUE = Queue(Capability.CHAT, Lane.DEFAULT, "echo")
FINAL = TERMINAL_STATUSES - {JobStatus.FAILED}
TRANSIENT, DRAIN = BackendFailed("x").info, Unavailable("drained", code=WORKER_DRAINED).info


class Died(BaseException):
    """A gateway is killed here."""


class Slow:
    """Another part, each call of which may be overtaken by others."""

    def __init__(self, part: Any, chance: random.Random, life: Life) -> None:
        self._part, self._chance, self._life = part, chance, life

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._part, name)
        if not asyncio.iscoroutinefunction(real):
            return real

        async def late(*args: Any, **kwargs: Any) -> Any:
            for _ in range(self._chance.randrange(4)):
                await asyncio.sleep(0)
            if name == self._life.deadly:
                self._life.deadly = ""
                raise Died
            return await real(*args, **kwargs)

        return late


class Attempt:
    """A worker's part of it, step by step, as `workers.attempt` does it."""

    def __init__(self, life: Life, delivery: MemoryDelivery) -> None:
        self.life, self.delivery = life, delivery
        self.envelope, _ = Envelope.decode(delivery.message)
        life.attempts_made += 1
        self.token = f"t{life.attempts_made}"
        self.begun = False
        self.over = False
        self.number = 0
        self.seq = 0

    async def _ask(self, kind: FrameKind) -> Any:
        ask = GateRequest(
            kind=kind, job=self.envelope.job, run=self.envelope.run, delivery=self.delivery.delivery, token=self.token,
            owner=OWNER, worker=f"w-{self.token}", key=self.envelope.key,
        )  # fmt: skip
        return await self.life.chance.choice(self.life.rig.gateways).gate(ask)

    async def _say(self, kind: FrameKind, payload: bytes = b"") -> None:
        env = self.envelope
        frame = encode_frame(kind.value, env.run, self.delivery.delivery, self.seq, self.token, payload)
        self.seq += 1
        self.life.rig.broker.job_log.append_event(env.job, frame)

    async def begin(self) -> None:
        answer = await self._ask(FrameKind.STARTED)
        if answer is None or not self.delivery.owned:
            return
        if answer.kind is GateVerdict.PROCEED:
            self.begun, self.number = True, answer.attempt
            await self._say(
                FrameKind.STARTED, AttemptStarted(worker=self.token, backend="b").model_dump_json().encode()
            )
        elif answer.kind is GateVerdict.EXHAUSTED:
            self.number = answer.attempt
            await self.end(JobStatus.FAILED, dead=True)
        elif answer.kind is GateVerdict.STOP:
            self.delivery.ack()
            self.over = True
        else:
            self.delivery.nak()
            self.over = True

    async def beat(self) -> None:
        answer = await self._ask(FrameKind.HEARTBEAT)
        if answer is not None and answer.kind is GateVerdict.STOP:
            self.delivery.ack()
            self.over = True
        elif answer is not None and answer.kind is GateVerdict.SUPERSEDED:
            self.over = True

    async def give_back(self, info: ErrorInfo) -> None:
        await self._say(FrameKind.RETURNED, info.model_dump_json().encode())
        await self._ask(FrameKind.RETURNED)
        self.delivery.nak()
        self.over = True

    async def end(self, status: JobStatus, *, dead: bool = False) -> None:
        failed = status is JobStatus.FAILED
        outcome = outcome_of(
            self.envelope, status, token=self.token, events=self.seq, worker=f"w-{self.token}", attempts=self.number, dead=dead,
            error=TRANSIENT if failed else None,
        )  # fmt: skip
        message = self.delivery.message if failed else b"answer of " + self.token.encode()
        if dead:
            await self.life.worker_log.store_dead_letter(outcome, message)
        if self.delivery.owned:
            await self.life.worker_log.store_outcome(outcome, message)
            self.delivery.ack()
        self.over = True


class Life:
    """One job with its gateways, workers and callers."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.rig = Rig(Eventually(), ack_wait_s=3600.0, limits=Limits())
        self.worker_log = MemoryWorkerLog(self.rig.broker)
        self.attempts: list[Attempt] = []
        self.attempts_made = 0
        self.deadly = ""
        """The step at which the next gateway that comes to it dies."""
        self.outcomes: Counter[tuple[int, JobStatus]] = Counter()
        self.seen: list[JobRecord] = []
        self.job = ""
        self.tasks: set[asyncio.Task[None]] = set()

    async def start(self, patch: pytest.MonkeyPatch) -> None:
        decide = self.rig.broker.job_log.store_outcome

        def counted(outcome: Outcome, payload: bytes) -> bool:
            first = decide(outcome, payload)
            if first:
                self.outcomes[(outcome.run, outcome.status)] += 1
            return first

        patch.setattr(JobLogState, "store_outcome", lambda _, outcome, payload: counted(outcome, payload))
        real = self.rig.store
        for _ in range(2):
            self.rig.store = Slow(real, self.chance, self)  # type: ignore[assignment]
            gateway = await self.rig.gateway()
            self.rig.store = real
            slow = Slow(gateway.log, self.chance, self)
            for part in (
                gateway.jobs,
                gateway.jobs._submitter,
                gateway.terminator,
                gateway.gate,
                gateway.recorder,
                gateway.expiry_watcher,
            ):
                part._log = slow
        self.job = await self.rig.submit()

    @property
    def gateway(self) -> Any:
        return self.chance.choice(self.rig.gateways)

    def record(self) -> JobRecord | None:
        return next((r for name, r in self.rig.store._records.items() if name.job == self.job), None)

    # What may happen

    async def take(self) -> None:
        broker = self.rig.broker
        waiting = broker.waiting.get(QUEUE)
        if waiting:
            job = waiting.popleft()
            job.deliveries += 1
            broker.start_ack_timer(job)
            self.attempts.append(Attempt(self, MemoryDelivery(broker, job, job.deliveries, 0)))

    async def redeliver(self) -> None:
        """A worker is silent: NATS gives its job to another one. It may live, and find that out later."""
        for job in list(self.rig.broker.jobs.values()):
            if job.ack_timer is not None:
                self.rig.broker.requeue(job)

    async def lease_ends(self) -> None:
        self.rig.clock.ahead += self.rig.ack_wait_s

    async def worker(self, step: Callable[[Attempt], Awaitable[None]], *, begun: bool) -> None:
        able = [one for one in self.attempts if one.begun is begun and not one.over and one.delivery.owned]
        if able:
            await step(self.chance.choice(able))

    async def run_and_fail(self) -> None:
        """All of it, as it mostly goes."""
        for name in ("take", "begin", self.chance.choice(["fail", "dead"])):
            await self.act(name)

    async def cancel(self) -> None:
        await self.gateway.jobs.cancel(OWNER, self.job)

    async def retry(self) -> None:
        await self.gateway.jobs.retry(OWNER, self.job)

    async def broken_retry(self) -> None:
        """Its gateway dies in the middle of it."""
        self.deadly = self.chance.choice(["enqueue", "delete_outcome"])
        await self.retry()

    async def replay(self) -> None:
        await self.gateway.jobs.replay(self.job)

    async def look(self) -> None:
        """What timers do."""
        gateway = self.gateway
        for due in await self.rig.store.claim_due(10):
            await gateway.expiry_watcher._check(due)

    async def much_time(self) -> None:
        self.rig.clock.ahead += QUEUE_S + 1
        await self.look()

    async def lose_record(self) -> None:
        await self.rig.store.remove(OWNER, self.job)
        self.seen.clear()  # a new one is made from what is known

    async def store_away(self) -> None:
        self.rig.store.available = not self.rig.store.available

    async def die(self) -> None:
        self.deadly = self.chance.choice(["enqueue", "delete_outcome", "move", "delete_dead_letter", "create"])

    def act(self, name: str) -> Awaitable[None]:
        steps: dict[str, Callable[[], Awaitable[None]]] = {
            "begin": lambda: self.worker(Attempt.begin, begun=False),
            "beat": lambda: self.worker(Attempt.beat, begun=True),
            "return": lambda: self.worker(lambda one: one.give_back(TRANSIENT), begun=True),
            "drain": lambda: self.worker(lambda one: one.give_back(DRAIN), begun=True),
            "fail": lambda: self.worker(lambda one: one.end(JobStatus.FAILED), begun=True),
            "dead": lambda: self.worker(lambda one: one.end(JobStatus.FAILED, dead=True), begun=True),
            "complete": lambda: self.worker(lambda one: one.end(JobStatus.COMPLETED), begun=True),
        }
        step = steps.get(name) or getattr(self, name)
        return step()

    async def begin_to_act(self, name: str, ticks: int) -> None:
        """It may not be done when the next one begins."""

        async def run() -> None:
            with suppress(NexusError, Died):
                await self.act(name)

        task = asyncio.create_task(run())
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        for _ in range(ticks):
            await asyncio.sleep(0)
            self.note()

    def note(self) -> None:
        record = self.record()
        if record is not None and (not self.seen or record != self.seen[-1]):
            self.seen.append(record)

    # The end

    async def settle(self) -> None:
        """Everything is well again, and time passes: every job ends."""
        await asyncio.gather(*self.tasks)
        self.deadly = ""  # a task that began late may have set it
        self.rig.store.available = True
        for _ in range(12):
            await self.lease_ends()
            await self.redeliver()
            await self.take()
            for one in [a for a in self.attempts if not a.over and a.delivery.owned]:
                if not one.begun:
                    await one.begin()
                if one.begun and not one.over:
                    await one.end(JobStatus.COMPLETED)
            await self.quiet()
        for _ in range(3):
            self.rig.clock.ahead += 86_400 + QUEUE_S + CLAIMED_TIMER_S
            await self.look()
            await self.quiet()

    async def quiet(self) -> None:
        for gateway in self.rig.gateways:
            await asyncio.gather(*gateway.gate._tasks, return_exceptions=True)
        for _ in range(10_000):
            if not self.rig.broker.job_log.outcome_queue.items:
                return
            await asyncio.sleep(0.001 if self.rig.broker.job_log.outcome_queue.waiting == [] else 0)
            self.note()
        pytest.fail("words are left")

    async def check(self) -> None:
        stored = self.rig.broker.job_log.outcomes.get(self.job)
        assert stored is not None, "it never ended"
        for record in (self.record(), await self.gateway.jobs.get(OWNER, self.job)):
            if record is not None:
                assert (record.status, record.run) == (stored.outcome.status, stored.outcome.run)
        assert not self.rig.broker.jobs, "it is still in the queue"
        per_run = Counter[int]()
        for (run, _), count in self.outcomes.items():
            per_run[run] += count
        assert set(per_run.values()) == {1}, self.outcomes
        for before, after in zip(self.seen, self.seen[1:], strict=False):
            assert after.run >= before.run
            assert before.status not in FINAL or (after.status, after.run) == (before.status, before.run)


ACTIONS = (
    "take", "begin", "beat", "return", "drain", "fail", "dead", "complete", "redeliver", "lease_ends", "cancel", "retry", "replay",
    "run_and_fail", "broken_retry", "look", "much_time", "lose_record", "store_away", "die",
)  # fmt: skip
OFTEN = (
    "take",
    "begin",
    "run_and_fail",
    "run_and_fail",
    "run_and_fail",
    "retry",
    "broken_retry",
    "redeliver",
    "lease_ends",
)
steps = st.tuples(st.sampled_from(ACTIONS + OFTEN), st.integers(0, 12))


@settings(max_examples=60, deadline=None)
@given(st.lists(steps, max_size=40), st.integers(0, 2**32))
def test_whatever_happens_each_run_ends_once_and_the_record_says_how(story: list[tuple[str, int]], seed: int) -> None:
    """Cancelled, expired, failed, completed, retried, replayed, lost and given back, all at once; gateways die in the middle."""
    asyncio.run(live(story, seed))


async def live(story: list[tuple[str, int]], seed: int) -> None:
    life = Life(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "clock", life.rig.clock)
        patch.setattr("gateway.jobs.outcome_recorder.RETRY_DELAY_S", 0.0)
        patch.setattr("gateway.jobs.outcome_recorder.ACK_WAIT_S", 0.02)
        patch.setattr("backbone.testing.job_log_state.DUPLICATE_WINDOW_S", 0.0)
        await life.start(patch)
        try:
            for name, ticks in story:
                await life.begin_to_act(name, ticks)
            await life.settle()
            await life.check()
        finally:
            await life.rig.close()
