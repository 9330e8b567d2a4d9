"""The store seam: one contract for every implementation, then what only a real Redis can go through."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from backbone.store.base import IllegalMove, Store
from backbone.store.breaker import Breaker
from backbone.store.memory import MemoryStore
from backbone.store.redis import RedisStore
from cli.embedded.servers import RedisServer
from schemas.errors import InternalError, Unavailable
from schemas.jobs import LEGAL_MOVES, JobRecord, JobStatus, Lane

QUEUED, RUNNING, COMPLETED, FAILED = (
    JobStatus.QUEUED,
    JobStatus.IN_PROGRESS,
    JobStatus.COMPLETED,
    JobStatus.FAILED,
)


def record(owner: str = "alice", **fields) -> JobRecord:
    defaults = {"id": f"job_{uuid.uuid4().hex}", "endpoint": "/v1/chat/completions", "model": "m", "created_at": 1}
    return JobRecord(owner=owner, **defaults | fields)


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
async def own_store(own_redis: RedisServer) -> AsyncIterator[RedisStore]:
    store = RedisStore(own_redis.url, timeout_s=1.0, rest_s=0.3)
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
            service_tier=Lane.FLEX,
            metadata={"größe": "1"},
            usage={"total_tokens": 2**60, "empty": [], "none": None},
            progress=0.1,
            error={"message": "x", "param": None},
        )
        assert await store.create(job, ttl_s=60)
        assert await store.get("alice", job.id) == job
        await store.ping()

    async def test_a_record_is_created_once(self, store):
        job = record()
        assert await store.create(job, ttl_s=60)
        assert not await store.create(job.model_copy(update={"model": "other"}), ttl_s=60)
        assert (await store.get("alice", job.id)).model == "m"

    async def test_of_racing_creates_one_succeeds(self, store):
        jobs = [record(id="job_race" + uuid.uuid4().hex, model=str(n)) for n in range(1)] * 20
        assert sum(await asyncio.gather(*(store.create(job, ttl_s=60) for job in jobs))) == 1

    async def test_what_is_not_there_is_none(self, store):
        assert await store.get("alice", "job_none") is None
        assert await store.move("alice", "job_none", RUNNING) is None

    async def test_another_owners_record_does_not_exist(self, store):
        job = record("alice")
        await store.create(job, ttl_s=60)
        assert await store.get("bob", job.id) is None
        assert await store.move("bob", job.id, RUNNING) is None
        assert (await store.get("alice", job.id)).status is QUEUED

    async def test_no_made_up_id_reaches_another_owner(self, store):
        job = record("team:a")
        await store.create(job, ttl_s=60)
        for owner, job_id in [("team", f"a:{job.id}"), ("team%3Aa", job.id), ("", f"team:a:{job.id}")]:
            assert await store.get(owner, job_id) is None
        assert await store.get("team:a", job.id) == job

    async def test_a_move_changes_status_and_fields(self, store):
        job = record()
        await store.create(job, ttl_s=60)
        moved = await store.move("alice", job.id, RUNNING, worker="w1", started_at=5, attempts=1)
        assert moved == job.model_copy(update={"status": RUNNING, "worker": "w1", "started_at": 5, "attempts": 1})
        assert await store.get("alice", job.id) == moved

    @pytest.mark.parametrize("origin", JobStatus)
    async def test_only_legal_moves_happen(self, store, origin):
        for to in JobStatus:
            job = record(status=origin)
            await store.create(job, ttl_s=60)
            if to in LEGAL_MOVES[origin]:
                assert (await store.move("alice", job.id, to)).status is to
            else:
                with pytest.raises(IllegalMove):
                    await store.move("alice", job.id, to)
                assert await store.get("alice", job.id) == job

    @pytest.mark.parametrize("changes", [{"owner": "bob"}, {"id": "job_x"}, {"nonsense": 1}, {"attempts": "many"}])
    async def test_a_move_with_wrong_changes_is_a_defect_and_changes_nothing(self, store, changes):
        job = record()
        await store.create(job, ttl_s=60)
        with pytest.raises((ValueError, TypeError)):
            await store.move("alice", job.id, RUNNING, **changes)
        assert await store.get("alice", job.id) == job

    async def test_of_racing_moves_one_succeeds(self, store):
        for _ in range(20):
            job = record(status=RUNNING)
            await store.create(job, ttl_s=60)
            ends = [COMPLETED, FAILED, JobStatus.CANCELLED, JobStatus.EXPIRED]
            moves = (store.move("alice", job.id, end, worker=end.value) for end in ends)
            results = await asyncio.gather(*moves, return_exceptions=True)
            won = [result for result in results if isinstance(result, JobRecord)]
            assert len(won) == 1
            assert all(isinstance(result, IllegalMove) for result in results if result not in won)
            assert await store.get("alice", job.id) == won[0]

    async def test_a_record_is_gone_after_its_time_and_a_move_does_not_prolong_it(self, store, eventually):
        job = record()
        await store.create(job, ttl_s=0.5)
        await store.move("alice", job.id, RUNNING)

        async def gone() -> bool:
            return await store.get("alice", job.id) is None

        await eventually(gone)
        assert await store.create(job, ttl_s=60)

    async def test_close_is_idempotent(self, store):
        await store.close()
        await store.close()


async def test_a_pretended_outage():
    store = MemoryStore()
    store.available = False
    for call in (store.ping(), store.create(record(), ttl_s=1), store.get("a", "b"), store.move("a", "b", RUNNING)):
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
        breaker = Breaker(1.0, clock=lambda: now[0])
        assert breaker.admits()
        breaker.timed_out()
        assert not breaker.admits()
        now[0] = 1.0
        assert [breaker.admits(), breaker.admits()] == [True, False]
        breaker.timed_out()
        now[0] = 2.0
        assert breaker.admits()
        breaker.answered()
        assert breaker.closed
        assert [breaker.admits(), breaker.admits()] == [True, True]


class TestFaults:
    async def test_the_ttl_is_redis_own_and_a_move_keeps_it(self, own_store, own_redis):
        job = record()
        await own_store.create(job, ttl_s=100)
        await own_store.move("alice", job.id, RUNNING)
        async with Redis.from_url(own_redis.url) as redis:
            assert 0 < await redis.ttl(f"nexus:job:alice:{job.id}") <= 100

    async def test_racing_moves_of_two_processes(self, own_store, own_redis):
        other = RedisStore(own_redis.url)
        for _ in range(20):
            job = record(status=RUNNING)
            await own_store.create(job, ttl_s=60)
            results = await asyncio.gather(
                own_store.move("alice", job.id, COMPLETED),
                other.move("alice", job.id, FAILED),
                return_exceptions=True,
            )
            assert sorted(type(result).__name__ for result in results) == ["IllegalMove", "JobRecord"]
        await other.close()

    async def test_a_move_that_meets_another_change_is_made_again_on_the_new_record(self, own_store, own_redis):
        """Queue and worker race: the record has moved between the read and the write, and the move is legal still."""
        job = record()
        await own_store.create(job, ttl_s=60)
        other = RedisStore(own_redis.url)
        real, once = own_store._replace, []

        async def replace(keys, args):
            if not once:
                once.append(await other.move("alice", job.id, RUNNING, worker="w1"))
            return await real(keys, args)

        own_store._replace = replace
        assert (await own_store.move("alice", job.id, COMPLETED)).worker == "w1"
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
        await asyncio.gather(*(own_store.get("alice", job.id) for _ in range(20)))  # fill the pool
        own_redis.kill()
        await own_redis.process.wait()
        for _ in range(3):
            with pytest.raises(Unavailable):
                await own_store.get("alice", job.id)
        await own_redis.restart()
        await eventually(lambda: answers(own_store))
        results = await asyncio.gather(*(own_store.get("alice", job.id) for _ in range(20)))
        assert len(set(map(repr, results))) == 1

    async def test_a_restart_between_two_calls_costs_nothing(self, own_store, own_redis):
        """Connections that the old server closed are not used."""
        job = record()
        await asyncio.gather(*(own_store.create(record(), ttl_s=60) for _ in range(20)))
        await own_redis.restart()
        assert await own_store.create(job, ttl_s=60)
        assert all(await asyncio.gather(*(own_store.get("alice", job.id) for _ in range(20))))

    async def test_a_frozen_redis_costs_one_time_out_and_then_nothing(self, own_store, own_redis, eventually):
        job = record()
        await own_store.create(job, ttl_s=60)
        own_store.connection._breaker._rest_s = 3600
        own_redis.pause()
        async with asyncio.timeout(10):
            with pytest.raises(Unavailable, match="within"):
                await own_store.get("alice", job.id)
            for _ in range(200):
                with pytest.raises(Unavailable, match="moment"):
                    await own_store.move("alice", job.id, RUNNING)
        own_redis.resume()
        await own_store.ping()  # an active round trip closes the breaker
        assert await own_store.get("alice", job.id) == job

    @pytest.mark.parametrize("calls", [1, 200])
    async def test_a_frozen_redis_fails_in_time_and_recovers(self, own_store, own_redis, eventually, calls):
        """With more calls than connections too."""
        job = record()
        await own_store.create(job, ttl_s=60)
        own_redis.pause()
        began = time.monotonic()
        results = await asyncio.gather(*(own_store.get("alice", job.id) for _ in range(calls)), return_exceptions=True)
        took = time.monotonic() - began
        assert all(isinstance(result, Unavailable) for result in results)
        assert took < 6  # about one; a machine under load gets more
        own_redis.resume()
        await eventually(lambda: answers(own_store))
        assert await own_store.get("alice", job.id) == job

    async def test_answers_that_come_too_late_reach_no_other_call(self, own_store, own_redis, eventually):
        jobs = [record(model=str(n)) for n in range(10)]
        for job in jobs:
            await own_store.create(job, ttl_s=60)
        own_redis.pause()
        await asyncio.gather(*(own_store.get("alice", job.id) for job in jobs), return_exceptions=True)
        own_redis.resume()
        await eventually(lambda: answers(own_store))
        for job in reversed(jobs):
            assert await own_store.get("alice", job.id) == job

    async def test_a_caller_who_gives_up_harms_no_other_call(self, own_store):
        jobs = [record(model=str(n)) for n in range(10)]
        for job in jobs:
            await own_store.create(job, ttl_s=60)
        for turn in range(50):
            call = asyncio.create_task(own_store.get("alice", jobs[turn % 10].id))
            for _ in range(turn % 5):
                await asyncio.sleep(0)
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
            assert await own_store.get("alice", jobs[(turn + 1) % 10].id) == jobs[(turn + 1) % 10]

    async def test_a_record_that_cannot_be_read_is_our_defect(self, own_store, own_redis):
        async with Redis.from_url(own_redis.url) as redis:
            await redis.set("nexus:job:alice:job_x", "{]")
        with pytest.raises(InternalError):
            await own_store.get("alice", "job_x")
        with pytest.raises(InternalError):
            await own_store.move("alice", "job_x", RUNNING)

    async def test_a_script_that_redis_has_forgotten(self, own_store, own_redis):
        job = record()
        await own_store.create(job, ttl_s=60)
        await own_store.move("alice", job.id, RUNNING)
        async with Redis.from_url(own_redis.url) as redis:
            await redis.script_flush()
        assert (await own_store.move("alice", job.id, COMPLETED)).status is COMPLETED
