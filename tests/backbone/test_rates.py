"""Limits per minute that several gateways share, on one real Redis."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest
from redis.asyncio import Redis

from backbone.store.byte_quotas import ByteQuotas
from backbone.store.rates import RateShare
from backbone.store.redis import RedisStore
from backbone.store.redis_quotas import RedisByteQuotas
from backbone.store.redis_rates import RedisRateStore
from backbone.testing.byte_quotas import MemoryByteQuotas
from gateway.limits.effective import EffectiveLimits, Rate
from gateway.limits.rate_limiter import RECHECK_S, RateLimiter
from schemas.errors import RateLimited, Unavailable
from tests.conftest import Eventually

LIMIT = 600


class Fleet:
    """Three gateways' limiters on one Redis."""

    def __init__(self, stores: list[RedisStore], redis: Redis) -> None:
        self.redis_store = stores[0]
        self.stores = [RedisRateStore(store) for store in stores]
        self.limiters = [RateLimiter(store) for store in self.stores]
        self.redis = redis
        self.name = f"key:{uuid.uuid4().hex}"
        self.key = f"nexus:rate:requests%3A{self.name.replace(':', '%3A')}"

    def limits(self, requests: int = LIMIT, tokens: int = 0) -> EffectiveLimits:
        return EffectiveLimits(
            requests=(Rate(self.name, requests),),
            tokens=(Rate(self.name, tokens),) if tokens else (),
            is_rated=True,
        )

    async def second(self) -> int:
        return int((await self.redis.time())[0])


@pytest.fixture
async def fleet(redis_url: str) -> AsyncIterator[Fleet]:
    async with AsyncExitStack() as stack:
        redis = await stack.enter_async_context(Redis.from_url(redis_url))
        stores = [RedisStore(redis_url) for _ in range(3)]
        for store in stores:
            stack.push_async_callback(store.close)
        yield Fleet(stores, redis)


async def flood(limiter: RateLimiter, limits: EffectiveLimits, attempts: int, tokens: int = 0) -> int:
    """How many of as many requests, eight at a time, are admitted."""
    left = attempts
    admitted = 0

    async def caller() -> None:
        nonlocal left, admitted
        while left > 0:
            left -= 1
            try:
                await limiter.admit(limits, tokens)
                admitted += 1
            except RateLimited:
                await asyncio.sleep(0)

    await asyncio.gather(*(caller() for _ in range(8)))
    return admitted


async def test_three_gateways_admit_what_the_limit_allows(fleet: Fleet) -> None:
    """In a minute, to 5 %: with unequal load, and with shares that move to where they are needed."""
    limits = fleet.limits()
    admitted = sum(
        await asyncio.gather(*(flood(one, limits, n) for one, n in zip(fleet.limiters, (150, 50, 900), strict=True)))
    )
    for _ in range(8):  # what two gateways hold unused goes to the third
        for limiter in fleet.limiters:
            for bucket in limiter._buckets.values():
                bucket.taken_at = bucket.check_at = 0.0
            await limiter._adjust(time.monotonic())
        fleet.limiters[2]._buckets[f"requests:{fleet.name}"].check_at = 0.0
        admitted += await flood(fleet.limiters[2], limits, 100)
    assert 0.95 * LIMIT <= admitted <= LIMIT


async def test_a_request_waits_for_no_store_while_shares_are_here(fleet: Fleet) -> None:
    """After the first ones, shares are taken ahead of need: almost every request finds one."""
    limiter, limits, calls = fleet.limiters[0], fleet.limits(100_000), 0
    take = fleet.stores[0].take

    async def counted(*args: object, **options: object) -> RateShare:
        nonlocal calls
        calls += 1
        return await take(*args, **options)  # type: ignore[arg-type]

    limiter._store = type("Store", (), {"take": staticmethod(counted)})()
    for _ in range(10):
        assert await flood(limiter, limits, 200) == 200
        await limiter._adjust(time.monotonic())
    asked_before = calls
    missed = sum(limiter.try_admit(limits, 0) is None for _ in range(150))
    assert missed == 0
    assert calls - asked_before <= 2


async def test_retry_after_is_true(fleet: Fleet) -> None:
    """It names the time at which the oldest use is a minute old."""
    now = await fleet.second()
    await fleet.redis.zadd(fleet.key, {str(now - 57): 5, str(now - 10): 5})
    with pytest.raises(RateLimited) as caught:
        await fleet.limiters[0].admit(fleet.limits(10), 0)
    info = caught.value.info
    assert (info.status, info.code) == (429, "rate_limit_exceeded")
    assert 1 <= int(info.headers()["retry-after"]) <= 4
    assert (await fleet.stores[0].take("requests:" + fleet.name, 10, need=6, wanted=6)).wait_s > 40
    await fleet.redis.zadd(fleet.key, {str(now - 61): 5})
    await fleet.redis.zrem(fleet.key, str(now - 57))
    assert (await fleet.stores[0].take("requests:" + fleet.name, 10, need=5, wanted=5)).granted == 5


async def test_no_minute_has_more_than_the_limit(fleet: Fleet) -> None:
    """What was used at the end of a second of the clock is not free again with what was used at its beginning."""
    now, after = 0, -1
    while now != after:  # all within one second
        await fleet.redis.delete(fleet.key)
        now = await fleet.second()
        await fleet.redis.zadd(fleet.key, {str(now - 60): 10})
        share = await fleet.stores[0].take("requests:" + fleet.name, 10, need=1, wanted=1)
        after = await fleet.second()
    assert share.granted == 0
    assert 0 < share.wait_s <= 1


@pytest.mark.parametrize("jump", [3600, -3600])
async def test_a_clock_that_jumps_by_an_hour_does_no_harm(fleet: Fleet, jump: int) -> None:
    """Redis's clock: ahead, the limit is free once more; back, what was used counts for a minute, not for an hour."""
    before = await fleet.second() - jump  # what a Redis wrote whose clock has jumped since
    await fleet.redis.zadd(fleet.key, {str(before): 10})
    share = await fleet.stores[0].take("requests:" + fleet.name, 10, need=1, wanted=1)
    assert share.granted == (1 if jump > 0 else 0)
    assert share.wait_s <= 61
    now = await fleet.second()
    seconds = [int(str(second, "ascii")) for second in await fleet.redis.zrange(fleet.key, 0, -1)]  # type: ignore[arg-type]
    assert all(abs(second - now) <= 60 for second in seconds)


async def test_tokens_are_reserved_and_settled(fleet: Fleet) -> None:
    """Less than the estimate is free again; more is owed. A request above the limit takes all of it."""
    limiter, limits = fleet.limiters[0], fleet.limits(1000, 1000)
    first = await limiter.admit(limits, 600)
    with pytest.raises(RateLimited, match="tokens per minute"):
        await limiter.admit(limits, 600)
    first.settle(100)
    second = await limiter.admit(limits, 600)
    headers = dict(limiter.headers(limits))
    assert headers[b"x-ratelimit-limit-tokens"] == b"1000"
    assert headers[b"x-ratelimit-remaining-tokens"] == b"300"
    assert headers[b"x-ratelimit-reset-tokens"] in {b"59s", b"60s"}
    second.settle(1500)
    await limiter._adjust(time.monotonic())
    assert dict(limiter.headers(limits))[b"x-ratelimit-remaining-tokens"] == b"0"
    with pytest.raises(RateLimited):
        await fleet.limiters[1].admit(limits, 1)
    fleet.name = uuid.uuid4().hex
    assert (await limiter.admit(fleet.limits(9, 1000), 5000)).reserved == 1000


async def test_a_gateway_that_stops_gives_its_shares_back(fleet: Fleet) -> None:
    limits = fleet.limits()
    for limiter in fleet.limiters[:2]:
        await flood(limiter, limits, 100)
        await limiter.close()
    assert await flood(fleet.limiters[2], limits, 2 * LIMIT) >= LIMIT - 200 - LIMIT // 20


async def test_with_the_store_away_the_last_shares_go_on(fleet: Fleet) -> None:
    """Each gateway keeps to the part that it used; one that knew nothing, to the limit. Then all of it is counted."""
    limits = fleet.limits()
    used = [await flood(limiter, limits, n) for limiter, n in zip(fleet.limiters[:2], (90, 10), strict=True)]
    for limiter in fleet.limiters:
        await limiter._adjust(time.monotonic())
        limiter._store = _Away()
    busy, quiet, new = [
        n + await flood(one, limits, 5 * LIMIT) for one, n in zip(fleet.limiters, [*used, 0], strict=True)
    ]
    assert LIMIT * 0.7 < busy <= LIMIT
    assert quiet <= 0.2 * LIMIT
    assert new <= LIMIT
    for limiter, store in zip(fleet.limiters, fleet.stores, strict=True):
        limiter._store = store
        await limiter._adjust(time.monotonic())
    assert sum([await flood(limiter, limits, 50) for limiter in fleet.limiters]) <= LIMIT // 20


class _Away:
    async def take(self, *_: object, **__: object) -> RateShare:
        raise Unavailable("away")


async def test_requests_wait_for_their_turn(fleet: Fleet) -> None:
    """In the order of arrival, and each learns its place; a caller that leaves makes room."""
    limiter, limits = fleet.limiters[0], fleet.limits(2)
    await limiter.admit(limits, 0)
    await limiter.admit(limits, 0)
    places: list[list[int]] = [[], [], []]
    order: list[int] = []

    async def wait(number: int) -> None:
        async def report(place: int) -> None:
            places[number].append(place)

        await limiter.admit_in_turn(limits, 0, report)
        order.append(number)

    tasks = []
    for number in range(3):
        tasks.append(asyncio.create_task(wait(number)))
        while not places[number]:
            await asyncio.sleep(RECHECK_S / 10)
    assert places == [[0], [1], [2]]
    tasks[1].cancel()
    await fleet.redis.delete(fleet.key)
    await asyncio.gather(tasks[0], tasks[2])
    assert order == [0, 2]
    assert not limiter._waiting


class TestByteQuotas:
    """What files take, on Redis as in memory."""

    @pytest.fixture(params=["redis", "memory"])
    async def quotas(self, request: pytest.FixtureRequest, fleet: Fleet) -> ByteQuotas:
        if request.param == "memory":
            return MemoryByteQuotas()
        return RedisByteQuotas(fleet.redis_store)

    async def test_bytes_are_counted_until_released(self, quotas: ByteQuotas) -> None:
        owner = uuid.uuid4().hex
        assert await quotas.reserve(owner, "a", 60, ttl_s=60, most=100)
        assert not await quotas.reserve(owner, "b", 50, ttl_s=60, most=100)
        assert await quotas.reserve(owner, "a", 50, ttl_s=60, most=100)
        assert await quotas.reserve(owner, "b", 50, ttl_s=60, most=100)
        assert await quotas.reserve(owner, "c", 500, ttl_s=60, most=None)
        assert await quotas.reserve(owner, "a", 40, ttl_s=60, most=100)  # less is always possible
        for _ in range(2):
            await quotas.release(owner, "c")
        assert await quotas.reserve(owner, "d", 10, ttl_s=60, most=100)
        assert not await quotas.reserve(owner, "e", 1, ttl_s=60, most=100)
        assert await quotas.reserve(uuid.uuid4().hex, "e", 100, ttl_s=60, most=100)

    async def test_an_item_counts_until_its_end(self, quotas: ByteQuotas, eventually: Eventually) -> None:
        owner = uuid.uuid4().hex
        assert await quotas.reserve(owner, "a", 100, ttl_s=0.001, most=100)
        await eventually(lambda: quotas.reserve(owner, "b", 100, ttl_s=60, most=100))

    async def test_racing_items_never_exceed_the_limit(self, quotas: ByteQuotas) -> None:
        owner = uuid.uuid4().hex
        fits = await asyncio.gather(
            *(quotas.reserve(owner, str(number), 10, ttl_s=60, most=100) for number in range(50))
        )
        assert sum(fits) == 10

    async def test_the_oldest_items_above_a_limit_are_named(self, quotas: ByteQuotas) -> None:
        """So many that the rest fits, and no more than asked for."""
        owner = uuid.uuid4().hex
        for number in range(4):
            assert await quotas.reserve(owner, str(number), 10, ttl_s=60 + number, most=None)
        assert await quotas.oldest(owner, 40, 10) == []
        assert await quotas.oldest(owner, 25, 10) == ["0", "1"]
        assert await quotas.oldest(owner, 0, 3) == ["0", "1", "2"]
        assert await quotas.oldest(uuid.uuid4().hex, 0, 3) == []
