"""The retry helper: which errors are retried, how long, and after which delays."""

from __future__ import annotations

import asyncio

import pytest

from backbone.retry import Backoff, retry


class Call:
    """Fails with these errors, one after another, then returns 42."""

    def __init__(self, *errors: BaseException) -> None:
        self.errors = list(errors)
        self.count = 0

    async def __call__(self) -> int:
        self.count += 1
        if self.errors:
            raise self.errors.pop(0)
        return 42


class Time:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now = 100.0
        self.delays: list[float] = []

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.delays.append(seconds)
        self.now += seconds


async def test_a_call_that_succeeds_is_made_once() -> None:
    call, time = Call(), Time()
    assert await retry(call, on=OSError, backoff=Backoff(1), sleep=time.sleep, clock=time) == 42
    assert (call.count, time.delays) == (1, [])


async def test_delays_grow_up_to_their_bound() -> None:
    call, time = Call(*(OSError(str(n)) for n in range(5))), Time()
    backoff = Backoff(0.5, factor=2, max_s=3)
    assert await retry(call, on=OSError, backoff=backoff, sleep=time.sleep, clock=time) == 42
    assert time.delays == [0.5, 1, 2, 3, 3]


async def test_the_caller_learns_of_each_error() -> None:
    seen: list[Exception] = []
    errors = OSError("one"), OSError("two")
    time = Time()
    await retry(Call(*errors), on=OSError, backoff=Backoff(1), on_error=seen.append, sleep=time.sleep, clock=time)
    assert seen == list(errors)


async def test_another_error_is_raised_at_once() -> None:
    call, time = Call(ValueError()), Time()
    with pytest.raises(ValueError):
        await retry(call, on=(OSError, TimeoutError), backoff=Backoff(1), sleep=time.sleep, clock=time)
    assert (call.count, time.delays) == (1, [])


async def test_the_deadline_ends_the_attempts() -> None:
    call, time = Call(*(OSError(str(n)) for n in range(9))), Time()
    with pytest.raises(OSError, match="3"):
        await retry(call, on=OSError, backoff=Backoff(1), deadline_s=3, sleep=time.sleep, clock=time)
    assert (call.count, time.delays) == (4, [1, 1, 1])


@pytest.mark.parametrize("attempt", [1, 2, 5000])
def test_jitter_shortens_a_delay_within_its_share(attempt: int) -> None:
    delays = [Backoff(10, factor=2, max_s=20, jitter=0.25).delay_s(attempt) for _ in range(200)]
    longest = 10 if attempt == 1 else 20
    assert all(0.75 * longest <= delay <= longest for delay in delays)
    assert len(set(delays)) > 1


async def test_cancellation_ends_the_sleep_and_the_call() -> None:
    call = Call(*(OSError(str(n)) for n in range(9)))
    task = asyncio.create_task(retry(call, on=OSError, backoff=Backoff(60)))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert call.count == 1


async def test_a_cancelled_call_is_not_retried() -> None:
    call, time = Call(asyncio.CancelledError()), Time()
    with pytest.raises(asyncio.CancelledError):
        await retry(call, on=Exception, backoff=Backoff(1), sleep=time.sleep, clock=time)
    assert call.count == 1
