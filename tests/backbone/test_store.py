"""The store seam: one contract for every implementation, then what only a real Redis can go through."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from backbone.store import redis_search
from backbone.store.breaker import CircuitBreaker
from backbone.store.job_filter import JobFilter, Range
from backbone.store.redis import RedisStore
from backbone.store.store import DueJob, IllegalMove, JobLimit, LimitReached, Store
from backbone.testing.store import MemoryStore, list_jobs
from schemas.errors import InternalError, Unavailable
from schemas.jobs import LEGAL_TRANSITIONS, TERMINAL_STATUSES, JobRecord, JobStatus, Lane
from tests.servers import Server

QUEUED, RUNNING, COMPLETED, FAILED = (
    JobStatus.QUEUED,
    JobStatus.IN_PROGRESS,
    JobStatus.COMPLETED,
    JobStatus.FAILED,
)


def record(owner: str = "alice", **fields) -> JobRecord:
    defaults = {
        "job": f"job_{uuid.uuid4().hex}",
        "endpoint": "/v1/chat/completions",
        "model": "m",
        "public_model": "m",
        "created_at": 1,
    }
    return JobRecord(owner=owner, **defaults | fields)


@pytest.fixture
def owner() -> str:
    """An owner, and a key, that no other test uses: they share a Redis."""
    return f"o:{uuid.uuid4().hex}"


@pytest.fixture(params=["memory", "redis"])
def unopened(request: pytest.FixtureRequest) -> Store:
    if request.param == "memory":
        return MemoryStore()
    return RedisStore(request.getfixturevalue("redis_url"))


@pytest.fixture
async def store(unopened: Store) -> AsyncIterator[Store]:
    await unopened.start()
    yield unopened
    await unopened.close()


@pytest.fixture
async def own_store(own_redis: Server) -> AsyncIterator[RedisStore]:
    store = RedisStore(own_redis.url, timeout_s=1.0, open_s=0.3)
    await store.start()
    yield store
    await store.close()


async def answers(store: Store) -> bool:
    try:
        await store.get("nobody", "nothing")
    except Unavailable:
        return False
    return True


class TestContract:
    async def test_a_record_comes_back_as_it_was(self, store):
        job = record(
            lane=Lane.FLEX,
            metadata={"größe": "1"},
            usage={"total_tokens": 2**60, "empty": [], "none": None},
            progress=0.1,
            error={"message": "x", "param": None},
        )
        assert await store.create(job, ttl_s=60)
        assert await store.get("alice", job.job) == job
        await store.ping()

    async def test_a_batchs_lines_are_in_no_list(self, store):
        """There may be fifty thousand of them, and the batch's files hold what became of each."""
        owner = uuid.uuid4().hex
        job, line = record(owner), record(owner, batch="batch_1")
        assert await store.create(job, ttl_s=60)
        assert await store.create(line, ttl_s=60)
        assert await list_jobs(store, owner) == [job]
        assert await store.get(owner, line.job) == line

    async def test_a_record_is_created_once(self, store):
        job = record()
        assert await store.create(job, ttl_s=60)
        assert not await store.create(job.model_copy(update={"model": "other"}), ttl_s=60)
        assert (await store.get("alice", job.job)).model == "m"

    async def test_of_racing_creates_one_succeeds(self, store):
        jobs = [record(job="job_race" + uuid.uuid4().hex, model=str(n)) for n in range(1)] * 20
        assert sum(await asyncio.gather(*(store.create(job, ttl_s=60) for job in jobs))) == 1

    async def test_what_is_not_there_is_none(self, store):
        assert await store.get("alice", "job_none") is None
        assert await store.move("alice", "job_none", RUNNING) is None

    async def test_another_owners_record_does_not_exist(self, store):
        job = record("alice")
        await store.create(job, ttl_s=60)
        assert await store.get("bob", job.job) is None
        assert await store.move("bob", job.job, RUNNING) is None
        assert (await store.get("alice", job.job)).status is QUEUED

    async def test_no_made_up_id_reaches_another_owner(self, store):
        job = record("team:a")
        await store.create(job, ttl_s=60)
        for owner, job_id in [("team", f"a:{job.job}"), ("team%3Aa", job.job), ("", f"team:a:{job.job}")]:
            assert await store.get(owner, job_id) is None
        assert await store.get("team:a", job.job) == job

    async def test_a_move_changes_status_and_fields(self, store):
        job = record()
        await store.create(job, ttl_s=60)
        moved = await store.move("alice", job.job, RUNNING, worker="w1", started_at=5, attempts=1)
        assert moved == job.model_copy(update={"status": RUNNING, "worker": "w1", "started_at": 5, "attempts": 1})
        assert await store.get("alice", job.job) == moved

    @pytest.mark.parametrize("origin", JobStatus)
    async def test_only_legal_moves_happen(self, store, origin):
        for to in JobStatus:
            job = record(status=origin)
            await store.create(job, ttl_s=60)
            if to in LEGAL_TRANSITIONS[origin] and origin is not FAILED:  # which only a newer run takes anywhere
                assert (await store.move("alice", job.job, to)).status is to
            else:
                with pytest.raises(IllegalMove):
                    await store.move("alice", job.job, to)
                assert await store.get("alice", job.job) == job

    @pytest.mark.parametrize("changes", [{"owner": "bob"}, {"id": "job_x"}, {"nonsense": 1}, {"attempts": "many"}])
    async def test_a_move_with_wrong_changes_is_a_defect_and_changes_nothing(self, store, changes):
        job = record()
        await store.create(job, ttl_s=60)
        with pytest.raises((ValueError, TypeError)):
            await store.move("alice", job.job, RUNNING, **changes)
        assert await store.get("alice", job.job) == job

    async def test_of_racing_moves_one_succeeds(self, store):
        for _ in range(20):
            job = record(status=RUNNING)
            await store.create(job, ttl_s=60)
            ends = [COMPLETED, FAILED, JobStatus.CANCELLED, JobStatus.EXPIRED]
            moves = (store.move("alice", job.job, end, worker=end.value) for end in ends)
            results = await asyncio.gather(*moves, return_exceptions=True)
            won = [result for result in results if isinstance(result, JobRecord)]
            assert len(won) == 1
            assert all(isinstance(result, IllegalMove) for result in results if result not in won)
            assert await store.get("alice", job.job) == won[0]

    async def test_a_record_is_gone_after_its_time_and_a_move_does_not_prolong_it(self, store, eventually):
        job = record()
        await store.create(job, ttl_s=0.5)
        await store.move("alice", job.job, RUNNING)

        async def gone() -> bool:
            return await store.get("alice", job.job) is None

        await eventually(gone)
        assert await store.create(job, ttl_s=60)

    async def test_close_is_idempotent(self, store):
        await store.close()
        await store.close()


class TestRuns:
    async def test_a_retry_begins_without_what_the_failed_run_left(self, store):
        job = record(metadata={"a": "b"})
        await store.create(job, ttl_s=60)
        await store.move("alice", job.job, RUNNING, worker="w1", started_at=5, attempts=3, seq=7)
        await store.move("alice", job.job, FAILED, error={"message": "x"}, finished_at=6, usage={"n": 1}, progress=0.5)
        again = await store.move("alice", job.job, QUEUED, run=2)
        assert again == job.model_copy(update={"run": 2})
        assert await store.get("alice", job.job) == again

    async def test_the_same_run_keeps_what_is_known_of_it(self, store):
        job = record()
        await store.create(job, ttl_s=60)
        await store.move("alice", job.job, RUNNING, worker="w1", attempts=1)
        moved = await store.move("alice", job.job, COMPLETED, run=1, finished_at=6)
        assert (moved.worker, moved.attempts, moved.finished_at) == ("w1", 1, 6)

    async def test_another_attempt_of_a_running_job_begins(self, store):
        job = record()
        await store.create(job, ttl_s=60)
        await store.move("alice", job.job, RUNNING, worker="w1", attempts=1)
        assert (await store.move("alice", job.job, RUNNING, worker="w2", attempts=2)).worker == "w2"

    async def test_what_an_old_run_says_late_changes_nothing(self, store):
        job = record(run=2)
        await store.create(job, ttl_s=60)
        for to in JobStatus:
            with pytest.raises(IllegalMove):
                await store.move("alice", job.job, to, run=1)
        with pytest.raises(IllegalMove):
            await store.update("alice", job.job, run=1, progress=0.5)
        assert await store.get("alice", job.job) == job

    @pytest.mark.parametrize("origin", JobStatus)
    async def test_a_newer_run_goes_on_from_wherever_the_job_can_run_again(self, store, origin):
        """The record may be behind: the outcome of the previous run was not recorded."""
        for to in JobStatus:
            job = record(status=origin, attempts=3)
            await store.create(job, ttl_s=60)
            if origin in {QUEUED, RUNNING, FAILED}:
                moved = await store.move("alice", job.job, to, run=4, worker="w")
                assert (moved.status, moved.run, moved.attempts, moved.worker) == (to, 4, 0, "w")
            else:
                with pytest.raises(IllegalMove):
                    await store.move("alice", job.job, to, run=4)
                assert await store.get("alice", job.job) == job

    async def test_of_racing_retries_one_succeeds(self, store):
        job = record(status=FAILED)
        await store.create(job, ttl_s=60)
        moves = (store.move("alice", job.job, QUEUED, run=2) for _ in range(20))
        results = await asyncio.gather(*moves, return_exceptions=True)
        assert sum(isinstance(result, JobRecord) for result in results) == 1
        assert sum(isinstance(result, IllegalMove) for result in results) == 19


class TestUpdates:
    async def test_an_update_changes_fields_and_not_the_status(self, store):
        job = record(status=RUNNING)
        await store.create(job, ttl_s=60)
        assert await store.update("alice", job.job, progress=0.5) == job.model_copy(update={"progress": 0.5})
        assert (await store.get("alice", job.job)).progress == 0.5
        assert await store.update("bob", job.job, progress=1.0) is None

    @pytest.mark.parametrize("changes", [{"status": COMPLETED}, {"id": "job_x"}, {"nonsense": 1}, {"run": "x"}])
    async def test_an_update_with_wrong_changes_is_a_defect_and_changes_nothing(self, store, changes):
        job = record()
        await store.create(job, ttl_s=60)
        with pytest.raises(ValueError):
            await store.update("alice", job.job, **changes)
        assert await store.get("alice", job.job) == job

    async def test_no_update_of_many_at_once_is_lost(self, store):
        job = record(status=RUNNING)
        await store.create(job, ttl_s=60)
        names = ("worker", "seq", "progress", "request_id", "batch", "attempts")
        values = ("w", 3, 0.5, "req", "b", 2)
        changes = [{name: value} for name, value in zip(names, values, strict=True)]
        await asyncio.gather(*(store.update("alice", job.job, **change) for change in changes))
        now = await store.get("alice", job.job)
        assert tuple(getattr(now, name) for name in names) == values


class TestLimits:
    async def test_a_full_key_takes_no_more_until_a_job_leaves_the_queue(self, store, owner):
        jobs = [record(owner, key=owner) for _ in range(3)]
        assert await store.create(jobs[0], ttl_s=60, max_queued=JobLimit(2))
        assert await store.create(jobs[1], ttl_s=60, max_queued=JobLimit(2))
        with pytest.raises(LimitReached):
            await store.create(jobs[2], ttl_s=60, max_queued=JobLimit(2))
        assert await store.get(owner, jobs[2].job) is None
        assert not await store.create(jobs[0], ttl_s=60, max_queued=JobLimit(2))  # it exists, full or not
        await store.move(owner, jobs[0].job, RUNNING)
        assert await store.create(jobs[2], ttl_s=60, max_queued=JobLimit(2))

    async def test_keys_count_for_themselves(self, store, owner):
        assert await store.create(record(owner, key=f"{owner}:1"), ttl_s=60, max_queued=JobLimit(1))
        assert await store.create(record(owner, key=f"{owner}:2"), ttl_s=60, max_queued=JobLimit(1))
        assert await store.create(record(owner, key=f"{owner}:1"), ttl_s=60)
        with pytest.raises(LimitReached):
            await store.create(record(owner, key=f"{owner}:2"), ttl_s=60, max_queued=JobLimit(0))

    async def test_of_fifty_racing_creates_as_many_succeed_as_the_key_may_have(self, store, owner):
        jobs = [record(owner, key=owner) for _ in range(50)]
        creates = (store.create(job, ttl_s=60, max_queued=JobLimit(10)) for job in jobs)
        results = await asyncio.gather(*creates, return_exceptions=True)
        assert sum(result is True for result in results) == 10
        assert sum(isinstance(result, LimitReached) for result in results) == 40
        assert len(await list_jobs(store, owner)) == 10

    async def test_jobs_that_run_and_that_wait_are_counted_by_their_key(self, store, owner):
        jobs = [record(owner, key=owner) for _ in range(3)]
        for job in jobs:
            await store.create(job, ttl_s=60)
        assert (await store.count_running(owner), await store.count_queued(owner)) == (0, 3)
        for job in jobs:
            await store.move(owner, job.job, RUNNING)
            await store.move(owner, job.job, RUNNING, attempts=2)
        assert (await store.count_running(owner), await store.count_queued(owner)) == (3, 0)
        await store.move(owner, jobs[0].job, QUEUED)
        await store.move(owner, jobs[1].job, COMPLETED)
        assert (await store.count_running(owner), await store.count_queued(owner)) == (1, 1)
        await store.remove(owner, jobs[2].job)
        assert await store.count_running(owner) == 0

    async def test_a_job_that_changes_its_key_counts_for_the_new_one(self, store, owner):
        job = record(owner, key=f"{owner}:1", status=RUNNING)
        await store.create(job, ttl_s=60)
        await store.update(owner, job.job, key=f"{owner}:2")
        assert (await store.count_running(f"{owner}:1"), await store.count_running(f"{owner}:2")) == (0, 1)

    async def test_records_that_have_expired_block_no_key(self, store, owner, eventually):
        for status in (QUEUED, RUNNING):
            await store.create(record(owner, key=owner, status=status), ttl_s=0.3)

        async def free() -> bool:
            try:
                return await store.create(record(owner, key=owner), ttl_s=60, max_queued=JobLimit(1))
            except LimitReached:
                return False

        await eventually(free)

        async def none_runs() -> bool:
            return await store.count_running(owner) == 0

        await eventually(none_runs)


class TestTwoProcesses:
    """Each remembers the records that it wrote; another process may have changed them since."""

    @pytest.fixture
    async def other(self, redis_url: str) -> AsyncIterator[RedisStore]:
        store = RedisStore(redis_url)
        await store.start()
        yield store
        await store.close()

    @pytest.fixture
    async def mine(self, redis_url: str) -> AsyncIterator[RedisStore]:
        store = RedisStore(redis_url)
        await store.start()
        yield store
        await store.close()

    async def test_a_move_changes_the_newest_record(self, mine: RedisStore, other: RedisStore) -> None:
        job = record()
        await mine.create(job, ttl_s=60)
        await other.move("alice", job.job, RUNNING, worker="w", attempts=1)
        ended = await mine.move("alice", job.job, COMPLETED)
        assert ended is not None
        assert (ended.status, ended.worker, ended.attempts) == (COMPLETED, "w", 1)
        assert await other.get("alice", job.job) == ended

    async def test_a_move_is_judged_by_the_newest_record(self, mine: RedisStore, other: RedisStore) -> None:
        """It is refused where it was legal before, and made where it was not."""
        job = record()
        await mine.create(job, ttl_s=60)
        await other.move("alice", job.job, FAILED)
        with pytest.raises(IllegalMove):
            await mine.move("alice", job.job, RUNNING)
        await mine.move("alice", job.job, QUEUED, run=2)
        await other.remove("alice", job.job)
        await other.create(job, ttl_s=60)
        moved = await mine.move("alice", job.job, RUNNING, run=1)
        assert moved is not None
        assert (moved.status, moved.run) == (RUNNING, 1)

    async def test_a_record_that_was_removed_is_not_there(self, mine: RedisStore, other: RedisStore) -> None:
        job = record()
        await mine.create(job, ttl_s=60)
        await other.remove("alice", job.job)
        assert await mine.move("alice", job.job, RUNNING) is None
        assert await mine.update("alice", job.job, progress=0.5) is None


class TestPages:
    async def test_an_owners_jobs_are_listed_newest_first(self, store, owner):
        jobs = [record(owner, job=f"job_{number:02}") for number in range(7)]
        for job in (*jobs[3:], *jobs[:3]):
            await store.create(job, ttl_s=60)
        await store.create(record(f"{owner}:", job="job_99"), ttl_s=60)
        newest = list(reversed(jobs))
        assert await list_jobs(store, owner) == newest
        assert await list_jobs(store, owner, limit=3) == newest[:3]
        assert await list_jobs(store, owner, after="job_04", limit=3) == newest[3:6]
        assert await list_jobs(store, owner, after="job_00") == []
        assert await list_jobs(store, owner, limit=0) == []
        assert await list_jobs(store, owner, after="job_045") == newest[2:]  # which is not there itself
        assert await list_jobs(store, f"{owner}x") == []

    async def test_odd_ids_are_listed_in_the_same_order_everywhere(self, store, owner):
        ids = ["job 1", "job%201", "job:1", "jöb", "job\x00", "job~", "JOB", "日本", "a" * 300]
        for job_id in ids:
            await store.create(record(owner, job=job_id), ttl_s=60)
        seen, after = [], ""
        while page := await list_jobs(store, owner, after=after, limit=2):
            seen += [job.job for job in page]
            after = seen[-1]
        assert seen == sorted(ids, reverse=True)

    async def test_records_that_expire_while_one_reads_are_left_out(self, store, owner, eventually):
        for number in range(30):
            await store.create(record(owner, job=f"job_{number:02}"), ttl_s=0.4 if number % 3 else 60)
        assert len(await list_jobs(store, owner, limit=1)) == 1

        async def gone() -> bool:
            return await store.get(owner, "job_29") is None

        await eventually(gone)
        seen, after = [], ""
        while page := await list_jobs(store, owner, after=after, limit=4):
            seen += [job.job for job in page]
            after = seen[-1]
        assert seen == [f"job_{number:02}" for number in range(27, -1, -3)]

    async def test_a_removed_record_is_forgotten_everywhere(self, store, owner):
        job = record(owner, key=owner, job="job_1")
        await store.create(job, ttl_s=60, due_s=0)
        await store.remove(owner, job.job)
        await store.remove(owner, job.job)
        assert await store.get(owner, job.job) is None
        assert await list_jobs(store, owner) == []
        assert [due for due in await store.claim_due(1000) if due.owner == owner] == []
        assert await store.create(job, ttl_s=60, max_queued=JobLimit(1))


class TestSearches:
    async def test_a_filter_finds_what_it_describes(self, store, owner):
        """A text in the metadata that looks like a field of the record finds nothing, and hides nothing."""
        lure = {"status": "failed", "finished_at": "1", "started_at": "x"}
        jobs = [
            record(owner, job="job_1", status=COMPLETED, started_at=10, finished_at=15, metadata=lure),
            record(owner, job="job_2", status=FAILED, error={"code": "timeout", "type": "t"}, metadata={"a b": '"ü\n'}),
            record(owner, job="job_3", status=COMPLETED, started_at=10, finished_at=90, lane=Lane.FLEX, worker="w"),
            record(owner, job="job_4", key="k", public_model="other"),
        ]
        for job in jobs:
            await store.create(job, ttl_s=60)

        async def found(wanted: JobFilter, **more) -> str:
            return "".join(job.job[-1] for job in (await store.search([owner], wanted, **more)).records)

        assert await found(JobFilter({"status": ("failed", "queued")})) == "42"
        assert (
            await found(JobFilter({"status": ("completed",), "service_tier": ("flex",), "worker": ("w", "v")})) == "3"
        )
        assert await found(JobFilter({"model": ("other",), "key": ("k",)})) == "4"
        assert await found(JobFilter({"key": ()})) == ""
        assert await found(JobFilter(errors=("timeout",))) == "2"
        assert await found(JobFilter(errors=("t",))) == "", "the code is what the error has"
        assert await found(JobFilter(metadata={"a b": '"ü\n'})) == "2"
        assert await found(JobFilter(metadata=lure)) == "1"
        assert await found(JobFilter(ranges=(Range("finished_at", 5, 80, "started_at"),))) == "31"
        assert await found(JobFilter(ranges=(Range("finished_at", None, 15),))) == "1"
        assert await found(JobFilter(first_id="job_2", last_id="job_4"), newest_first=False) == "23"
        assert await found(JobFilter(first_id="job_2"), newest_first=False, after="job_1") == "234"
        assert await found(JobFilter(last_id="job_3"), after="job_4") == "21"
        select = await store.select(owner, ["job_3", "job_9", "job_1"], JobFilter({"status": ("completed",)}))
        assert [job.job for job in select] == ["job_3", "job_1"]

    @pytest.mark.parametrize("newest_first", [True, False])
    async def test_the_jobs_of_several_owners_come_in_one_order(self, store, owner, newest_first, monkeypatch):
        """One owner has many, another few; pages follow each other without a gap, also where a step ends within a list."""
        monkeypatch.setattr(redis_search, "STEP", 24)
        owners = [f"{owner}:%{number}" for number in range(3)]
        ids = [f"job_{number:03}" for number in range(60)]
        for number, job_id in enumerate(ids):
            await store.create(record(owners[0 if number < 45 else number % 3], job=job_id), ttl_s=60)
        expected = ids[::-1] if newest_first else ids
        seen, after = [], ""
        while True:
            page = await store.search(owners, JobFilter(), after=after, limit=7, newest_first=newest_first)
            seen += [job.job for job in page.records]
            if not page.after:
                break
            after = page.after
        assert seen == expected


class TestTimers:
    async def due(self, store: Store, owner: str) -> list[str]:
        return sorted(job for who, job in await store.claim_due(1000) if who == owner)

    async def test_a_timer_that_runs_out_is_given_to_one_caller(self, store, owner):
        jobs = [record(owner) for _ in range(20)]
        for job in jobs:
            await store.create(job, ttl_s=60, due_s=0)
        first, second = await asyncio.gather(*(self.due(store, owner) for _ in range(2)))
        assert sorted(first + second) == sorted(job.job for job in jobs)
        assert await self.due(store, owner) == []

    async def test_what_is_due_first_is_given_first_and_no_more_than_asked_for(self, own_store, own_redis):
        async with Redis.from_url(own_redis.url) as redis:
            for number in range(4):
                await own_store.create(record("a b", job=f"job:{number}"), ttl_s=60, due_s=3600)
                await redis.zadd("nexus:timers", {f"a%20b:job%3A{number}": 4 - number}, xx=True)
        assert await own_store.claim_due(3) == [DueJob("a b", f"job:{number}") for number in (3, 2, 1)]
        assert await own_store.claim_due(3) == [DueJob("a b", "job:0")]
        assert await own_store.claim_due(0) == []

    async def test_timers_run(self, store, owner, eventually):
        late, soon, never = record(owner), record(owner), record(owner)
        await store.create(late, ttl_s=60, due_s=3600)
        await store.create(soon, ttl_s=60, due_s=0.2)
        await store.create(never, ttl_s=60)
        assert await eventually(lambda: self.due(store, owner)) == [soon.job]

    async def test_moves_set_and_remove_timers_and_updates_leave_them(self, store, owner):
        job = record(owner)
        await store.create(job, ttl_s=60, due_s=3600)
        await store.move(owner, job.job, RUNNING, due_s=0)
        assert await self.due(store, owner) == [job.job]
        await store.update(owner, job.job, due_s=0)
        await store.update(owner, job.job, progress=0.5)
        assert await self.due(store, owner) == [job.job]
        await store.update(owner, job.job, due_s=0)
        await store.move(owner, job.job, QUEUED)
        assert await self.due(store, owner) == []

    @pytest.mark.parametrize("end", sorted(TERMINAL_STATUSES))
    async def test_a_job_that_has_ended_has_no_timer(self, store, owner, end):
        job = record(owner)
        await store.create(job, ttl_s=60, due_s=0)
        await store.move(owner, job.job, end, due_s=0)
        await store.update(owner, job.job, progress=1.0, due_s=0)
        await store.create(record(owner, status=end), ttl_s=60, due_s=0)
        assert await self.due(store, owner) == []

    async def test_a_record_that_has_expired_is_not_due(self, store, owner, eventually):
        job = record(owner)
        await store.create(job, ttl_s=0.3, due_s=0.2)

        async def gone() -> bool:
            return await store.get(owner, job.job) is None

        await eventually(gone)
        assert await self.due(store, owner) == []

    async def test_no_timer_outlives_its_record(self, store, owner, eventually):
        """A job that is recorded again, under the same id, has the timer that it is given now, or none."""
        job = record(owner)
        await store.create(job, ttl_s=0.3, due_s=0)

        async def made_anew() -> bool:
            return await store.create(job, ttl_s=60)

        await eventually(made_anew)
        assert await self.due(store, owner) == []


class TestLeases:
    async def test_one_attempt_holds_the_lease_until_it_lets_go(self, store, owner):
        assert await store.acquire_lease(owner, "a", 60)
        assert not await store.acquire_lease(owner, "b", 60)
        assert await store.acquire_lease(owner, "a", 60)
        await store.release_lease(owner, "b")
        assert not await store.acquire_lease(owner, "b", 60)
        await store.release_lease(owner, "a")
        await store.release_lease(owner, "a")
        assert await store.acquire_lease(owner, "b", 60)
        assert await store.acquire_lease(f"{owner}:other", "a", 60)

    async def test_a_lease_runs_out(self, store, owner, eventually):
        assert await store.acquire_lease(owner, "a", 0.2)
        assert await eventually(lambda: store.acquire_lease(owner, "b", 60))

    async def test_of_racing_attempts_one_gets_the_lease(self, store, owner):
        assert sum(await asyncio.gather(*(store.acquire_lease(owner, str(n), 60) for n in range(50)))) == 1


async def test_service_times_are_a_mean_in_which_the_newest_counts_a_fifth(store, owner):
    assert await store.mean_service_time_s("chat", owner) is None
    await store.record_service_time("chat", owner, 10)
    assert await store.mean_service_time_s("chat", owner) == 10
    await store.record_service_time("chat", owner, 20.5)
    assert await store.mean_service_time_s("chat", owner) == pytest.approx(12.1)
    await store.record_service_time("chat", owner, 0.000123)
    assert await store.mean_service_time_s("chat", owner) == pytest.approx(9.6800246)
    assert await store.mean_service_time_s("images", owner) is None


async def test_a_pretended_outage():
    store = MemoryStore()
    store.available = False
    calls = (
        store.ping(),
        store.create(record(), ttl_s=1),
        store.get("a", "b"),
        store.move("a", "b", RUNNING),
        store.update("a", "b", progress=0.5),
        store.remove("a", "b"),
        list_jobs(store, "a"),
        store.count_running("a"),
        store.count_queued("a"),
        store.claim_due(1),
        store.acquire_lease("a", "b", 1),
        store.release_lease("a", "b"),
        store.record_service_time("chat", "m", 1),
        store.mean_service_time_s("chat", "m"),
    )
    for call in calls:
        with pytest.raises(Unavailable):
            await call


async def test_memory_forgets_what_has_expired():
    now = [0.0]
    store = MemoryStore(clock=lambda: now[0])
    for _ in range(5):
        await store.create(record(), ttl_s=1)
        now[0] += 2
    assert len(store._records) == 1


class TestBreaker:
    def test_it_opens_on_a_time_out_and_lets_one_call_try_at_a_time(self):
        now = [0.0]
        breaker = CircuitBreaker(1.0, clock=lambda: now[0])
        assert breaker.allows_call()
        breaker.record_timeout()
        assert not breaker.allows_call()
        now[0] = 1.0
        assert [breaker.allows_call(), breaker.allows_call()] == [True, False]
        breaker.record_timeout()
        now[0] = 2.0
        assert breaker.allows_call()
        breaker.record_answer()
        assert breaker.closed
        assert [breaker.allows_call(), breaker.allows_call()] == [True, True]


class TestFaults:
    async def test_the_ttl_is_redis_own_and_a_move_keeps_it(self, own_store, own_redis):
        job = record()
        await own_store.create(job, ttl_s=100)
        await own_store.move("alice", job.job, RUNNING)
        async with Redis.from_url(own_redis.url) as redis:
            assert 0 < await redis.ttl(f"nexus:job:alice:{job.job}") <= 100

    async def test_racing_moves_of_two_processes(self, own_store, own_redis):
        other = RedisStore(own_redis.url)
        for _ in range(20):
            job = record(status=RUNNING)
            await own_store.create(job, ttl_s=60)
            results = await asyncio.gather(
                own_store.move("alice", job.job, COMPLETED),
                other.move("alice", job.job, FAILED),
                return_exceptions=True,
            )
            assert sorted(type(result).__name__ for result in results) == ["IllegalMove", "JobRecord"]
        await other.close()

    async def test_a_move_that_meets_another_change_is_made_again_on_the_new_record(self, own_store, own_redis):
        """Queue and worker race: the record has moved between the read and the write, and the move is legal still."""
        job = record()
        await own_store.create(job, ttl_s=60)
        other = RedisStore(own_redis.url)
        real = own_store._replace
        once: list[JobRecord | None] = []

        async def replace(keys, args):
            if not once:
                once.append(await other.move("alice", job.job, RUNNING, worker="w1"))
            return await real(keys, args)

        own_store._replace = replace
        assert (await own_store.move("alice", job.job, COMPLETED)).worker == "w1"
        await other.close()

    async def test_redis_away_from_the_start(self, own_redis, eventually):
        await own_redis.stop()
        store = RedisStore(own_redis.url)
        await store.start()
        with pytest.raises(Unavailable):
            await store.ping()
        with pytest.raises(Unavailable):
            await store.create(record(), ttl_s=1)
        await own_redis.restart()
        await eventually(lambda: answers(store))
        await store.close()

    async def test_redis_killed_and_started_again(self, own_store, own_redis, eventually):
        job = record()
        await own_store.create(job, ttl_s=60)
        await asyncio.gather(*(own_store.get("alice", job.job) for _ in range(20)))  # fill the pool
        own_redis.kill()
        await own_redis.process.wait()
        for _ in range(3):
            with pytest.raises(Unavailable):
                await own_store.get("alice", job.job)
        await own_redis.restart()
        await eventually(lambda: answers(own_store))
        results = await asyncio.gather(*(own_store.get("alice", job.job) for _ in range(20)))
        assert len(set(map(repr, results))) == 1

    async def test_a_restart_between_two_calls_costs_nothing(self, own_store, own_redis):
        """Connections that the old server closed are not used."""
        job = record()
        await asyncio.gather(*(own_store.create(record(), ttl_s=60) for _ in range(20)))
        await own_redis.restart()
        assert await own_store.create(job, ttl_s=60)
        assert all(await asyncio.gather(*(own_store.get("alice", job.job) for _ in range(20))))

    async def test_a_frozen_redis_costs_one_time_out_and_then_nothing(self, own_store, own_redis, eventually):
        job = record()
        await own_store.create(job, ttl_s=60)
        own_store.connection._breaker._rest_s = 3600
        own_redis.pause()
        async with asyncio.timeout(10):
            with pytest.raises(Unavailable, match="within"):
                await own_store.get("alice", job.job)
            for _ in range(200):
                with pytest.raises(Unavailable, match="recent calls"):
                    await own_store.move("alice", job.job, RUNNING)
        own_redis.resume()
        await own_store.ping()  # an active round trip closes the breaker
        assert await own_store.get("alice", job.job) == job

    @pytest.mark.parametrize("calls", [1, 200])
    async def test_a_frozen_redis_fails_in_time_and_recovers(self, own_store, own_redis, eventually, calls):
        """With more calls than connections too."""
        job = record()
        await own_store.create(job, ttl_s=60)
        own_redis.pause()
        began = time.monotonic()
        results = await asyncio.gather(*(own_store.get("alice", job.job) for _ in range(calls)), return_exceptions=True)
        took = time.monotonic() - began
        assert all(isinstance(result, Unavailable) for result in results)
        assert took < 6  # about one; a machine under load gets more
        own_redis.resume()
        await eventually(lambda: answers(own_store))
        assert await own_store.get("alice", job.job) == job

    async def test_answers_that_come_too_late_reach_no_other_call(self, own_store, own_redis, eventually):
        jobs = [record(model=str(n)) for n in range(10)]
        for job in jobs:
            await own_store.create(job, ttl_s=60)
        own_redis.pause()
        await asyncio.gather(*(own_store.get("alice", job.job) for job in jobs), return_exceptions=True)
        own_redis.resume()
        await eventually(lambda: answers(own_store))
        for job in reversed(jobs):
            assert await own_store.get("alice", job.job) == job

    async def test_a_caller_who_gives_up_harms_no_other_call(self, own_store):
        jobs = [record(model=str(n)) for n in range(10)]
        for job in jobs:
            await own_store.create(job, ttl_s=60)
        for turn in range(50):
            call = asyncio.create_task(own_store.get("alice", jobs[turn % 10].job))
            for _ in range(turn % 5):
                await asyncio.sleep(0)
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
            assert await own_store.get("alice", jobs[(turn + 1) % 10].job) == jobs[(turn + 1) % 10]

    async def test_many_callers_who_give_up_at_once_hold_nobody_up(self, own_store):
        job = record()
        await own_store.create(job, ttl_s=60)
        calls = [asyncio.create_task(own_store.get("alice", job.job)) for _ in range(600)]
        await asyncio.sleep(0)  # all have asked, and nothing is sent yet
        for call in calls[:-1]:
            call.cancel()
        assert await calls[-1] == job
        await asyncio.gather(*calls[:-1], return_exceptions=True)

    async def test_a_record_that_cannot_be_read_is_our_defect(self, own_store, own_redis):
        async with Redis.from_url(own_redis.url) as redis:
            await redis.set("nexus:job:alice:job_x", "{]")
        with pytest.raises(InternalError):
            await own_store.get("alice", "job_x")
        for call in (own_store.move("alice", "job_x", RUNNING), own_store.remove("alice", "job_x")):
            with pytest.raises(InternalError):
                await call

    async def test_everything_is_lost_in_the_middle(self, own_store, own_redis):
        """Nothing raises: the data is gone, and the jobs that come after it are listed, counted and timed as ever."""
        job = record(key="k")
        await own_store.create(job, ttl_s=60, due_s=0)
        await own_store.move("alice", job.job, RUNNING, due_s=0)
        assert await own_store.acquire_lease(job.job, "a", 60)
        async with Redis.from_url(own_redis.url) as redis:
            await redis.flushall()
        assert await own_store.get("alice", job.job) is None
        assert await own_store.move("alice", job.job, COMPLETED) is None
        assert await own_store.update("alice", job.job, progress=0.5) is None
        assert (
            await list_jobs(own_store, "alice"),
            await own_store.claim_due(10),
            await own_store.count_running("k"),
        ) == (
            [],
            [],
            0,
        )
        assert await own_store.acquire_lease(job.job, "b", 60)
        await own_store.release_lease(job.job, "a")
        await own_store.remove("alice", job.job)
        assert await own_store.create(job, ttl_s=60, due_s=0, max_queued=JobLimit(1))
        assert (await list_jobs(own_store, "alice"), await own_store.claim_due(10)) == (
            [job],
            [DueJob("alice", job.job)],
        )

    async def test_what_has_expired_leaves_nothing_behind(self, own_store, own_redis, eventually):
        await asyncio.gather(
            *(own_store.create(record(key="k"), ttl_s=0.3, max_queued=JobLimit(50)) for _ in range(50))
        )
        job = record(key="k")
        await own_store.create(job, ttl_s=0.3)
        await own_store.move("alice", job.job, RUNNING)
        async with Redis.from_url(own_redis.url) as redis:

            async def empty() -> bool:
                return await redis.dbsize() == 0

            await eventually(empty)

    async def test_a_search_for_all_owners_finds_the_lists_of_earlier_versions(self, own_store, own_redis):
        owners = ["a b", "a%20b", "b"]
        for number, owner in enumerate(owners):
            await own_store.create(record(owner, job=f"job_{number}"), ttl_s=60)
        async with Redis.from_url(own_redis.url) as redis:
            await redis.delete("nexus:job-owners")
        for _ in range(2):
            found = await own_store.search(None, JobFilter())
            assert [job.owner for job in found.records] == ["b", "a%20b", "a b"]
        await own_store.create(record("c", job="job_9"), ttl_s=60)
        assert [job.owner for job in (await own_store.search(None, JobFilter(), limit=1)).records] == ["c"]

    async def test_a_list_that_nobody_reads_does_not_grow_for_ever(self, own_store, own_redis):
        """What has expired leaves it as others come."""
        await own_store.create(record(), ttl_s=60)
        async with Redis.from_url(own_redis.url) as redis:
            await redis.zadd("nexus:jobs:alice", {f"job_expired{number}": 0 for number in range(200)})
            await asyncio.gather(*(own_store.create(record(), ttl_s=60) for _ in range(400)))
            assert 401 <= await redis.zcard("nexus:jobs:alice") < 401 + 100

    async def test_thousands_that_have_expired_are_passed_over(self, own_store, own_redis):
        """A page of what is behind them comes at once, and full."""
        for number in range(3):
            await own_store.create(record(job=f"job_{number}"), ttl_s=60)
        async with Redis.from_url(own_redis.url) as redis:
            await redis.zadd("nexus:jobs:alice", {f"job_9{number:04}": 0 for number in range(3500)})
            await redis.zadd("nexus:timers", {f"alice:job_9{number:04}": number for number in range(900)})
            assert [job.job for job in await list_jobs(own_store, "alice", limit=2)] == ["job_2", "job_1"]
            assert await redis.zcard("nexus:jobs:alice") == 3
            await own_store.update("alice", "job_0", due_s=0)
            assert await own_store.claim_due(2) == [DueJob("alice", "job_0")]
            assert await redis.zcard("nexus:timers") == 1

    async def test_a_script_that_redis_has_forgotten(self, own_store, own_redis):
        job = record()
        await own_store.create(job, ttl_s=60)
        await own_store.move("alice", job.job, RUNNING)
        async with Redis.from_url(own_redis.url) as redis:
            await redis.script_flush()
        assert (await own_store.move("alice", job.job, COMPLETED)).status is COMPLETED
