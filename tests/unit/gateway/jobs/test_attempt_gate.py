"""The attempt gate: its verdicts depend only on stored state, so all gateways decide alike."""

from __future__ import annotations

import pytest

from gateway.jobs.attempt_gate import GATE_REQUESTS_PER_S
from schemas.errors import WORKER_DRAINED, BackendFailed, Unavailable
from schemas.frames import AttemptStarted, FrameKind, Progress, encode_frame
from schemas.job_events import GateReply, GateRequest, GateVerdict
from schemas.jobs import MAX_STARTS, JobStatus
from tests.unit.gateway.jobs.rig import OWNER, Rig

GO, GONE, STALE, WAIT, DEAD = (
    GateVerdict.PROCEED,
    GateVerdict.STOP,
    GateVerdict.SUPERSEDED,
    GateVerdict.WAIT,
    GateVerdict.EXHAUSTED,
)
LEASE_S = 13.5
TRANSIENT, DRAIN = BackendFailed("x").info, Unavailable("drained", code=WORKER_DRAINED).info


class Desk:
    """Workers that ask about one job, and store what they would."""

    def __init__(self, rig: Rig, job: str, key: str = "") -> None:
        self.rig, self.job, self.key = rig, job, key
        self.asked = 0

    async def ask(
        self, kind: FrameKind, token: str, *, run: int = 1, progress: Progress | None = None
    ) -> GateReply | None:
        """Of one gateway, then of the next."""
        gateways = self.rig.gateways
        self.asked += 1
        ask = GateRequest(
            kind=kind, job=self.job, run=run, delivery=1, token=token, owner=OWNER, worker=f"w-{token}", key=self.key, progress=progress
        )  # fmt: skip
        answer = await gateways[self.asked % len(gateways)].gate(ask)
        for gateway in gateways:
            await gateway.gate.close()
        return answer

    async def begins(self, token: str, *, run: int = 1) -> int:
        """Request a start, store STARTED, and return the number of the attempt."""
        answer = await self.ask(FrameKind.STARTED, token, run=run)
        assert answer is not None
        assert answer.kind is GO
        await self.say(
            FrameKind.STARTED, 0, token, AttemptStarted(worker=token, backend="b").model_dump_json().encode(), run
        )
        return answer.attempt

    async def gives_back(self, token: str, *, drained: bool = False, run: int = 1) -> None:
        info = DRAIN if drained else TRANSIENT
        await self.say(FrameKind.RETURNED, 1, token, info.model_dump_json().encode(), run)
        assert await self.ask(FrameKind.RETURNED, token, run=run) is None

    async def say(self, kind: FrameKind, seq: int, token: str, payload: bytes = b"", run: int = 1) -> None:
        await self.rig.gateways[0].log.append_event(self.job, encode_frame(kind.value, run, 1, seq, token, payload))

    async def answer(self, token: str, *, run: int = 1) -> GateVerdict:
        answer = await self.ask(FrameKind.STARTED, token, run=run)
        assert answer is not None
        return answer.kind


@pytest.fixture
async def desk(rig: Rig) -> Desk:
    await rig.gateway()
    return Desk(rig, await rig.submit())


class TestLeave:
    async def test_the_first_attempt_may_start(self, rig: Rig, desk: Desk) -> None:
        """And is the record's worker."""
        assert await desk.begins("a") == 1
        record = await rig.jobs.get(OWNER, desk.job)
        assert (record.status, record.worker, record.attempts) == (JobStatus.IN_PROGRESS, "w-a", 1)

    async def test_an_answer_that_was_lost_is_given_again(self, desk: Desk) -> None:
        """The verdict is the same whether or not STARTED was stored in the meantime."""
        assert (await desk.answer("a"), await desk.answer("a")) == (GO, GO)
        assert await desk.begins("a") == 1
        again = await desk.ask(FrameKind.STARTED, "a")
        assert again == GateReply(kind=GO, attempt=1)

    async def test_only_one_attempt_runs_at_a_time(self, rig: Rig, desk: Desk) -> None:
        """The next attempt waits until the first one has been silent for the lease time."""
        await desk.begins("a")
        rig.clock.ahead += LEASE_S - 1
        answer = await desk.ask(FrameKind.STARTED, "b")
        assert answer is not None
        assert answer.kind is WAIT
        assert 0 < answer.delay_s < LEASE_S
        assert await desk.ask(FrameKind.HEARTBEAT, "a") == GateReply(kind=GO)
        rig.clock.ahead += LEASE_S - 1
        assert await desk.answer("b") is WAIT
        rig.clock.ahead += 2
        assert await desk.begins("b") == 2
        assert await desk.ask(FrameKind.HEARTBEAT, "a") == GateReply(kind=STALE)
        assert await desk.ask(FrameKind.HEARTBEAT, "b") == GateReply(kind=GO)

    async def test_what_is_given_back_is_free_at_once(self, rig: Rig, desk: Desk) -> None:
        await desk.begins("a")
        await desk.gives_back("a")
        assert (await rig.jobs.get(OWNER, desk.job)).status is JobStatus.QUEUED
        assert await desk.begins("b") == 2

    async def test_after_so_many_starts_it_is_poison(self, rig: Rig, desk: Desk) -> None:
        for number in range(1, MAX_STARTS + 1):
            assert await desk.begins(f"t{number}") == number
            rig.clock.ahead += LEASE_S + 1
        answer = await desk.ask(FrameKind.STARTED, "last")
        assert answer is not None
        assert (answer.kind, answer.attempt) == (DEAD, MAX_STARTS)
        assert (answer.error or {})["code"] == "worker_lost"

    async def test_an_attempt_of_a_stopping_worker_does_not_count(self, desk: Desk) -> None:
        for number in range(2 * MAX_STARTS):
            assert await desk.begins(f"t{number}") == 1
            await desk.gives_back(f"t{number}", drained=True)

    async def test_what_never_began_takes_no_start_back(self, rig: Rig, desk: Desk) -> None:
        """An attempt that returns before its start, or twice, does not change the count of starts."""
        for number in range(1, MAX_STARTS + 1):
            assert await desk.begins(f"t{number}") == number
            await desk.gives_back(f"never{number}", drained=True)
            rig.clock.ahead += LEASE_S + 1
        assert await desk.answer("last") is DEAD

    async def test_copies_count_once(self, rig: Rig, desk: Desk) -> None:
        await desk.begins("a")
        await desk.begins("a")
        await desk.gives_back("a", drained=True)
        await desk.gives_back("a", drained=True)
        assert await desk.begins("b") == 1

    async def test_a_long_answer_hides_no_starts(self, rig: Rig, desk: Desk) -> None:
        """All of the events are looked at, not only the first."""
        for number in range(1, MAX_STARTS + 1):
            await desk.begins(f"t{number}")
            for seq in range(1, 10):
                await desk.say(FrameKind.CHUNK, seq, f"t{number}", b"x")
            rig.clock.ahead += LEASE_S + 1
        assert await desk.answer("last") is DEAD

    @pytest.mark.parametrize("status", [JobStatus.CANCELLED, JobStatus.EXPIRED])
    async def test_a_job_with_an_outcome_is_stopped(self, rig: Rig, desk: Desk, status: JobStatus) -> None:
        """The gate stops both a new attempt and the running one."""
        await desk.begins("a")
        assert await rig.gateways[0].terminator.terminate(await rig.jobs.get(OWNER, desk.job), status)
        assert await desk.ask(FrameKind.HEARTBEAT, "a") == GateReply(kind=GONE)
        assert await desk.answer("b") is GONE

    async def test_a_new_run_counts_from_one(self, rig: Rig, desk: Desk) -> None:
        """A leftover outcome of the old run does not block the new run, but still stops the old run's workers."""
        for number in range(MAX_STARTS):
            await desk.begins(f"t{number}")
            rig.clock.ahead += LEASE_S + 1
        record = await rig.jobs.get(OWNER, desk.job)
        assert await rig.gateways[0].terminator.terminate(record, JobStatus.FAILED)
        assert await desk.answer("old") is GONE
        rig.clock.ahead += LEASE_S + 1
        assert await desk.begins("new", run=2) == 1
        assert desk.job not in rig.broker.job_log.outcomes
        recorded = await rig.jobs.get(OWNER, desk.job)
        assert (recorded.run, recorded.status) == (2, JobStatus.IN_PROGRESS)

    async def test_a_late_outcome_of_an_old_run_is_deleted_by_the_next_heartbeat(self, rig: Rig, desk: Desk) -> None:
        """The new run's answer would be taken for a second end."""
        record = await rig.jobs.get(OWNER, desk.job)
        await desk.begins("new", run=2)
        assert await rig.gateways[0].terminator.terminate(record, JobStatus.FAILED)
        assert await desk.ask(FrameKind.HEARTBEAT, "new", run=2) == GateReply(kind=GO)
        assert desk.job not in rig.broker.job_log.outcomes


class TestLimits:
    async def test_of_a_keys_jobs_so_many_run(self, rig: Rig) -> None:
        """Also where they ask at once, of several gateways."""
        await rig.gateway()
        rig.max_running["k"] = 2
        desks = [Desk(rig, await rig.submit(key="k"), "k") for _ in range(6)]
        for at, desk in enumerate(desks):
            desk.asked = at
        answers = [await desk.answer("t") for desk in desks]
        assert sorted(answers) == sorted([GO] * 2 + [WAIT] * 4)
        first = desks[answers.index(GO)]
        await first.gives_back("t")
        assert [await desk.answer("t") for desk in desks if desk is not first].count(GO) == 2

    async def test_an_attempt_that_already_started_may_ask_again(self, rig: Rig) -> None:
        """The reply was lost, or that to its predecessor was."""
        rig.max_running["k"] = 1
        desk = Desk(rig, await rig.submit(key="k"), "k")
        assert await desk.answer("a") is GO
        assert await desk.answer("a") is GO
        rig.clock.ahead += LEASE_S + 1
        assert await desk.answer("b") is GO

    async def test_many_that_must_wait_ask_no_more_often_than_few(self, rig: Rig) -> None:
        """Else workers would look at nothing but them, and other tenants' jobs would wait behind their questions."""
        rig.max_running["k"] = 1
        running, waiting = Desk(rig, await rig.submit(key="k"), "k"), Desk(rig, await rig.submit(key="k"), "k")
        assert await running.answer("t") is GO
        few = await waiting.ask(FrameKind.STARTED, "t")
        for _ in range(int(10 * GATE_REQUESTS_PER_S)):
            await rig.submit(key="k")
        many = await waiting.ask(FrameKind.STARTED, "t")
        assert few is not None
        assert many is not None
        assert (few.kind, many.kind) == (WAIT, WAIT)
        assert few.delay_s < 2
        assert many.delay_s >= 10

    async def test_an_attempt_that_must_wait_holds_no_lease(self, rig: Rig) -> None:
        """The next to ask may be another one."""
        rig.max_running["k"] = 1
        first, second = Desk(rig, await rig.submit(key="k"), "k"), Desk(rig, await rig.submit(key="k"), "k")
        assert await first.answer("a") is GO
        assert await second.answer("b") is WAIT
        await first.gives_back("a")
        assert await second.answer("c") is GO


class TestOutages:
    async def test_without_the_store_jobs_go_on(self, rig: Rig, desk: Desk) -> None:
        """Leave is given by what NATS knows."""
        rig.store.available = False
        assert await desk.begins("a") == 1
        assert await desk.ask(FrameKind.HEARTBEAT, "a") == GateReply(kind=GO)
        assert await desk.ask(FrameKind.RETURNED, "a") is None
        rig.store.available = True
        assert (await rig.jobs.get(OWNER, desk.job)).status is JobStatus.QUEUED

    async def test_the_next_heartbeat_records_a_missed_start(self, rig: Rig, desk: Desk) -> None:
        rig.store.available = False
        await desk.begins("a")
        rig.store.available = True
        await desk.ask(FrameKind.HEARTBEAT, "a", progress=Progress(fraction=0.5))
        record = await rig.until(desk.job, JobStatus.IN_PROGRESS)
        assert (record.worker, record.attempts) == ("w-a", 1)
        await desk.ask(FrameKind.HEARTBEAT, "a", progress=Progress(fraction=0.5))
        assert (await rig.jobs.get(OWNER, desk.job)).progress == 0.5

    async def test_without_nats_nothing_is_answered(self, rig: Rig, desk: Desk) -> None:
        """The worker asks again."""
        rig.broker.available = False
        assert await desk.ask(FrameKind.STARTED, "a") is None
        assert await desk.ask(FrameKind.HEARTBEAT, "a") is None

    @pytest.mark.parametrize("kind", [FrameKind.STARTED, FrameKind.HEARTBEAT])
    async def test_a_lost_record_is_recovered(self, rig: Rig, desk: Desk, kind: FrameKind) -> None:
        """From the job's first event: the limits on its time hold again."""
        before = await rig.jobs.get(OWNER, desk.job)
        if kind is FrameKind.HEARTBEAT:
            await desk.begins("a")
        await rig.store.remove(OWNER, desk.job)
        await desk.ask(kind, "a")
        record = await rig.until(desk.job, JobStatus.IN_PROGRESS)
        assert (record.created_at, record.queue_s, record.worker) == (before.created_at, before.queue_s, "w-a")
        rig.clock.ahead += 3 * rig.ack_wait_s + 1
        await rig.until(desk.job, JobStatus.QUEUED)
