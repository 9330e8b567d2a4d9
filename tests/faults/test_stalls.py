"""A process that gets no CPU blames no server for it; a server that is frozen is blamed in time all the same."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import uvloop

from backbone.store.redis import RedisStore
from schemas.errors import Unavailable
from schemas.jobs import Capability, JobRecord
from tests.servers import Server

TIMEOUT_S = 1.5
"""What a call may take: the default."""
OPENED_S = 2.0
"""Promised: a frozen Redis is known within this."""
STALL_S = 3.0
Run = Callable[[Coroutine[Any, Any, None]], None]
LOOPS: dict[str, Run] = {"asyncio": asyncio.run, "uvloop": uvloop.run}


def record(number: int) -> JobRecord:
    return JobRecord(
        job=f"job_{number:032x}", owner="alice", endpoint="/v1/chat/completions", model="m", public_model="m",
        capability=Capability.CHAT, created_at=1,
    )  # fmt: skip


@pytest.mark.parametrize("run", LOOPS.values(), ids=LOOPS.keys())
def test_a_held_up_loop_opens_no_breaker(own_redis: Server, run: Run) -> None:
    """Redis is well: of calls under way while the loop stands still for twice their time, none fails, and no later one."""

    async def calls() -> None:
        store = RedisStore(own_redis.url, timeout_s=TIMEOUT_S)
        await store.start()
        loop = asyncio.get_running_loop()
        try:
            for turn in range(3):
                jobs = [record(turn * 100 + number) for number in range(20)]
                waiting = [asyncio.create_task(store.create(job, ttl_s=60)) for job in jobs]
                loop.call_soon(time.sleep, STALL_S)  # after the calls have been asked for, before any is answered
                assert await asyncio.gather(*waiting) == [True] * len(jobs)
                assert await store.get("alice", jobs[0].job) == jobs[0]
        finally:
            await store.close()

    run(calls())


@pytest.mark.parametrize("run", LOOPS.values(), ids=LOOPS.keys())
def test_a_loop_held_up_again_and_again(own_redis: Server, run: Run) -> None:
    """As a process that gets a tenth of a core: more time is lost than a call may take, and nothing fails."""

    async def calls() -> None:
        store = RedisStore(own_redis.url, timeout_s=TIMEOUT_S)
        await store.start()
        loop, until = asyncio.get_running_loop(), time.monotonic() + 5.0

        def hold_up() -> None:
            time.sleep(0.4)
            if time.monotonic() < until:
                loop.call_later(0.01, hold_up)

        loop.call_soon(hold_up)
        try:
            made = await asyncio.gather(*(store.create(record(number), ttl_s=60) for number in range(600)))
            assert made == [True] * 600
        finally:
            await store.close()

    run(calls())


def test_a_frozen_redis_is_known_in_time(own_redis: Server) -> None:
    """Within 2 s, whatever this process did before; calls after it fail at once."""

    async def calls() -> None:
        store = RedisStore(own_redis.url, timeout_s=TIMEOUT_S)
        await store.start()
        loop = asyncio.get_running_loop()
        own_redis.pause()
        try:
            began, lost_s = loop.time(), store.connection._stalls.stalled_s
            with pytest.raises(Unavailable, match="within"):
                await store.get("alice", record(1).job)
            lost_s = store.connection._stalls.stalled_s - lost_s  # this machine's own, which is busy
            assert loop.time() - began - lost_s < OPENED_S
            began = loop.time()
            with pytest.raises(Unavailable, match="recent calls"):
                await store.get("alice", record(1).job)
            assert loop.time() - began < 1.0
        finally:
            own_redis.resume()
            await store.close()

    asyncio.run(calls())
