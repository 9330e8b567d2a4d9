"""Limit requests and tokens per minute over all gateways, without a round trip for a request.

Each gateway takes shares of a limit from the store ahead of need (`backbone.store.rates`), sized by its use in the last half second, and
gives back what it has not used. Guarantees:

- In any 60 seconds, gateways admit at most the limit, and what `SHARE_S` adds: a share may be used that long after it was taken.
- Only a request that finds no share waits for the store, and only until the store has refused: until then others are refused at once.
- While the store is away, each gateway goes on with the part of the limit that it used, at least `LEAST_PART`: together about the
  limit. A gateway that starts then may use the whole limit. What was used is counted once the store is back.
- Tokens are reserved by an estimate and settled by real usage. Usage beyond the estimate is owed: it delays later requests.
- Time is measured by a clock that never jumps, here, and by the store's own there.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import deque
from collections.abc import Awaitable, Callable
from time import monotonic
from typing import NamedTuple

import structlog

from backbone.store.rates import RateStore
from gateway.http.asgi import Headers
from gateway.limits.effective import EffectiveLimits, Rate
from gateway.limits.leases import ShareLeases
from schemas.errors import RateLimited, Unavailable

log = structlog.get_logger(__name__)

TICK_S = 0.25
"""Between two adjustments of the shares."""
SHARE_S = 1.0
"""Longest time for which an unused share stays here."""
RECHECK_S = 0.2
"""Time after which a refused gateway asks again: others may have given shares back."""
WINDOW_S = 60
FORGET_S = 120.0
"""Time after its last use at which a limit's state is dropped here."""
LEAST_PART = 0.1
"""The least part of a limit that a gateway may use while the store is away."""
MAX_QUEUE_S = 60.0
"""Longest wait of a request that asked to be queued."""
MAX_WAITING = 256
"""Requests of one key or team that may wait at the same time."""
PLACE_INTERVAL_S = 5.0
"""Between two reports of a waiting request's place."""

REQUESTS = (b"x-ratelimit-limit-requests", b"x-ratelimit-remaining-requests", b"x-ratelimit-reset-requests")
TOKENS = (b"x-ratelimit-limit-tokens", b"x-ratelimit-remaining-tokens", b"x-ratelimit-reset-tokens")
MAX_REMEMBERED = 20_000
"""Keys whose buckets are remembered."""

Report = Callable[[int], Awaitable[None]]
"""Receives the number of requests before the waiting one."""


class _Bucket:
    """One limit, as this gateway knows it."""

    __slots__ = (
        "available", "check_at", "free", "history", "lease", "limit", "name", "owed", "part", "recent", "retry_at", "taken_at", "used", "used_at", "wanting",
    )  # fmt: skip

    def __init__(self, name: str, limit: int) -> None:
        self.name = name
        self.limit = limit
        self.available = 0
        """What is left of the share. Negative: more was used."""
        self.owed = 0
        self.free = limit
        """What nobody had taken at the last answer of the store."""
        self.used = 0
        """What was used since the last tick."""
        self.wanting = 0
        """What requests wait for here."""
        self.recent = 0.0
        """What is used in half a second, averaged."""
        self.check_at = self.retry_at = 0.0
        """Until when requests are refused without asking, and when the store expects that one can be admitted."""
        self.taken_at = 0.0
        self.used_at = monotonic()
        self.part = 1.0
        """The part of the limit that this gateway used at the last answer of the store."""
        self.history: deque[tuple[float, int]] = deque()
        """What was used here in the last minute: (time, amount)."""
        self.lease: asyncio.Task[None] | None = None

    def used_here(self, now: float) -> int:
        """Return what was used here in the last minute."""
        while self.history and self.history[0][0] <= now - WINDOW_S:
            self.history.popleft()
        return sum(amount for _, amount in self.history) + self.used


class _BucketsOfKey(NamedTuple):
    limits: EffectiveLimits
    requests: tuple[_Bucket, ...]
    tokens: tuple[_Bucket, ...]
    most_tokens: int
    """The most that one request takes."""


class Admission:
    """An admitted request. `settle` once tells how many tokens it took."""

    __slots__ = ("_buckets", "reserved")

    def __init__(self, buckets: tuple[_Bucket, ...], reserved: int) -> None:
        self._buckets = buckets
        self.reserved = reserved
        """Tokens of the estimate."""

    def settle(self, used: int) -> None:
        """Replace the estimate by the tokens that were used."""
        for bucket in self._buckets:
            bucket.available += self.reserved - used
            bucket.check_at = 0.0
        self.reserved = used


class RateLimiter:
    """Admits requests within the limits per minute of their keys and teams."""

    def __init__(self, store: RateStore) -> None:
        self._store = store
        self._buckets: dict[str, _Bucket] = {}
        self._by_limits: dict[int, _BucketsOfKey] = {}
        """The buckets by the id of the limits: looking four names up would take 2 µs of each request."""
        self._leases: ShareLeases[_Bucket] = ShareLeases(self._exchange, _limited)
        self._waiting: dict[str, deque[asyncio.Event]] = {}
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start to adjust the shares."""
        self._task = asyncio.create_task(self._adjust_forever(), name="rate-limits")

    async def close(self) -> None:
        """Give all shares back, and stop."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for bucket in self._buckets.values():
            bucket.recent = 0.0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                await asyncio.gather(*(self._exchange(bucket, 0) for bucket in self._buckets.values()))

    # Admission

    def try_admit(self, limits: EffectiveLimits, tokens: int) -> Admission | None:
        """Admit a request from the shares that are here. None: one of them does not suffice."""
        found = self._buckets_of(limits)
        requests, for_tokens = found.requests, found.tokens
        tokens = min(tokens, found.most_tokens)
        for bucket in requests:
            if bucket.available < 1:
                return None
        for bucket in for_tokens:
            if bucket.available < tokens:
                return None
        now = monotonic()
        for bucket in requests:
            self._use(bucket, 1, now)
        for bucket in for_tokens:
            self._use(bucket, tokens, now)
        return Admission(for_tokens, tokens)

    def _use(self, bucket: _Bucket, amount: int, now: float) -> None:
        bucket.available -= amount
        bucket.used += amount
        bucket.used_at = now
        if bucket.available < bucket.recent / 2 and bucket.lease is None and now >= bucket.check_at:
            self._leases.begin(bucket, 1)

    async def admit(self, limits: EffectiveLimits, tokens: int) -> Admission:
        """Admit a request. Raises RateLimited with the time after which it can be repeated."""
        while True:
            admission = self.try_admit(limits, tokens)
            if admission is not None:
                return admission
            found = self._buckets_of(limits)
            amount = min(tokens, found.most_tokens)
            for bucket, need in [*((one, 1) for one in found.requests), *((one, amount) for one in found.tokens)]:
                if bucket.available < need:
                    await self._leases.fill(bucket, need)

    async def admit_in_turn(self, limits: EffectiveLimits, tokens: int, report: Report) -> Admission:
        """Admit a request; while its key or team is over a limit, wait for up to `MAX_QUEUE_S`, in the order of arrival.

        Raises RateLimited if it has waited that long, or `MAX_WAITING` requests wait.
        """
        name = (*limits.requests, *limits.tokens)[0].name
        queue = self._waiting.setdefault(name, deque())
        if len(queue) >= MAX_WAITING:
            raise RateLimited(
                f"{MAX_WAITING} requests wait for this limit already. Retry later.", retry_after_s=MAX_QUEUE_S
            )
        ticket, until, report_at = asyncio.Event(), monotonic() + MAX_QUEUE_S, 0.0
        queue.append(ticket)
        try:
            while True:
                now = monotonic()
                try:
                    if queue[0] is ticket:
                        return await self.admit(limits, tokens)
                    wait_s = PLACE_INTERVAL_S
                except RateLimited as error:
                    if now >= until:
                        raise
                    wait_s = min(RECHECK_S, error.info.retry_after_s or RECHECK_S)
                if now >= until:
                    raise RateLimited(
                        f"The request has waited {MAX_QUEUE_S:g} s for its limit. Retry later.", retry_after_s=1.0
                    )
                if now >= report_at:
                    report_at = now + PLACE_INTERVAL_S
                    await report(queue.index(ticket))
                ticket.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(wait_s, until - now)):
                        await ticket.wait()
        finally:
            queue.remove(ticket)
            if queue:
                queue[0].set()
            else:
                self._waiting.pop(name, None)

    def settle(self, limits: EffectiveLimits, reserved: int, used: int) -> None:
        """Settle the tokens of a job, which another gateway may have admitted."""
        Admission(self._buckets_of(limits).tokens, reserved).settle(used)

    def headers(self, limits: EffectiveLimits) -> Headers:
        """Return `x-ratelimit-…` of the limits that are nearest."""
        now = monotonic()
        found = self._buckets_of(limits)
        return [*_headers(REQUESTS, found.requests, now), *_headers(TOKENS, found.tokens, now)]

    def _buckets_of(self, limits: EffectiveLimits) -> _BucketsOfKey:
        """Return the buckets of a key's limits."""
        found = self._by_limits.get(id(limits))
        if found is None or found.limits is not limits:
            if len(self._by_limits) >= MAX_REMEMBERED:
                self._by_limits.clear()
            requests = tuple(self._bucket("requests:", rate) for rate in limits.requests)
            tokens = tuple(self._bucket("tokens:", rate) for rate in limits.tokens)
            # A request that is larger than a limit takes all of it.
            most = min((bucket.limit for bucket in tokens), default=0)
            found = self._by_limits[id(limits)] = _BucketsOfKey(limits, requests, tokens, most)
        return found

    def _bucket(self, kind: str, rate: Rate) -> _Bucket:
        name = kind + rate.name
        bucket = self._buckets.get(name)
        if bucket is None:
            bucket = self._buckets[name] = _Bucket(name, rate.per_minute)
        bucket.limit = rate.per_minute
        return bucket

    # Shares

    async def _exchange(self, bucket: _Bucket, need: int) -> None:
        """Give back what is not needed, or take what is; report what is owed."""
        now = monotonic()
        if bucket.available < 0:
            bucket.owed, bucket.available = bucket.owed - bucket.available, 0
        target = max(need, bucket.wanting, math.ceil(bucket.recent))
        unused = max(0, bucket.available - target)
        wanted = max(0, target - bucket.available)
        need = max(0, need - bucket.available)
        owed, bucket.owed = bucket.owed, 0
        bucket.available -= unused
        try:
            share = await self._store.take(
                bucket.name, bucket.limit, need=need, wanted=wanted, owed=owed, unused=unused
            )
        except Unavailable:
            bucket.owed += owed
            bucket.available += unused
            self._go_on_alone(bucket, need, now)
            return
        bucket.available += share.granted
        bucket.free, bucket.taken_at = share.free, now
        total = bucket.limit - share.free
        if total > 0:
            bucket.part = min(1.0, max(LEAST_PART, (bucket.used_here(now) + bucket.available) / total))
        if share.granted < need:
            bucket.retry_at = now + share.wait_s
            bucket.check_at = now + min(share.wait_s, RECHECK_S)
        else:
            bucket.check_at = bucket.retry_at = 0.0

    def _go_on_alone(self, bucket: _Bucket, need: int, now: float) -> None:
        """Grant what is left of this gateway's part of the limit, as the store is away."""
        left = max(need, math.ceil(bucket.limit * bucket.part)) - bucket.used_here(now)
        if left >= need:
            granted = max(need, min(left, math.ceil(bucket.recent)))
            bucket.available += granted
            bucket.owed += granted
            bucket.check_at = bucket.retry_at = 0.0
        else:
            oldest = bucket.history[0][0] if bucket.history else now
            bucket.retry_at = max(now + RECHECK_S, oldest + WINDOW_S)
            bucket.check_at = now + RECHECK_S

    async def _adjust_forever(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            try:
                await self._adjust(monotonic())
            except Exception:
                log.exception("limits.adjustment_crashed")

    async def _adjust(self, now: float) -> None:
        """Follow the use of each limit: give unused shares back, and take the next ones."""
        due: list[asyncio.Task[None]] = []
        for bucket in list(self._buckets.values()):
            if bucket.used:
                bucket.history.append((now, bucket.used))
            bucket.recent = (bucket.recent + 2 * bucket.used) / 2 if bucket.recent or bucket.used else 0.0
            if bucket.recent < 0.5:
                bucket.recent = 0.0
            bucket.used = 0
            if not bucket.available and not bucket.owed and now - bucket.used_at > FORGET_S:
                del self._buckets[bucket.name]
                self._by_limits.clear()
                continue
            target = math.ceil(bucket.recent)
            stale = bucket.available > target and now - bucket.taken_at >= SHARE_S / 2
            short = bucket.available < target and now >= bucket.check_at
            if bucket.lease is None and (stale or short or bucket.owed or bucket.available < 0):
                due.append(self._leases.begin(bucket, 0))
        await asyncio.gather(*due)


def _limited(bucket: _Bucket, _need: int) -> RateLimited:
    kind, _, holder = bucket.name.partition(":")
    what = "API key" if holder.startswith("key:") else "team"
    wait_s = max(1, math.ceil(bucket.retry_at - monotonic()))
    return RateLimited(
        f"This {what} has reached its limit of {bucket.limit} {kind} per minute. Retry in {wait_s} s.",
        retry_after_s=wait_s,
    )


def _headers(names: tuple[bytes, bytes, bytes], buckets: tuple[_Bucket, ...], now: float) -> Headers:
    if not buckets:
        return []
    nearest = buckets[0] if len(buckets) == 1 else min(buckets, key=_remaining)
    remaining = _remaining(nearest)
    reset_s = max(1, math.ceil(nearest.used_at + WINDOW_S - now)) if remaining < nearest.limit else 0
    limit, left, reset = names
    return [(limit, b"%d" % nearest.limit), (left, b"%d" % remaining), (reset, b"%ds" % reset_s)]


def _remaining(bucket: _Bucket) -> int:
    return max(0, min(bucket.limit, bucket.free + bucket.available))
