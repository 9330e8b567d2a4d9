"""Retry a call until it succeeds: delays that grow within bounds, an optional deadline, and a sleep that tests can replace."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Backoff:
    """The delays between attempts, in seconds."""

    initial_s: float
    factor: float = 1.0
    max_s: float = math.inf
    jitter: float = 0.0
    """The share of each delay that is random: with 0.2, a delay of 10 s lasts from 8 to 10 s."""

    def delay_s(self, attempt: int) -> float:
        """Return the delay after the failed attempt of this number; the first attempt is 1."""
        try:
            delay_s = min(self.initial_s * self.factor ** (attempt - 1), self.max_s)
        except OverflowError:
            delay_s = self.max_s
        return delay_s * (1 - self.jitter * random.random())


async def retry(
    call: Callable[[], Awaitable[T]],
    *,
    on: type[Exception] | tuple[type[Exception], ...],
    backoff: Backoff,
    deadline_s: float = math.inf,
    on_error: Callable[[Exception], None] | None = None,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> T:
    """Call `call` until it returns, and return its result.

    Errors of the types `on` are retried, each after `on_error` was called with it. Any other error, cancellation included, is raised at
    once, and so is an error whose next attempt would begin more than `deadline_s` seconds after the first one.
    """
    began, attempt = clock(), 0
    while True:
        attempt += 1
        try:
            return await call()
        except on as error:
            delay_s = backoff.delay_s(attempt)
            if clock() + delay_s - began > deadline_s:
                raise
            if on_error is not None:
                on_error(error)
            await sleep(delay_s)
