"""Slow down an address that tries out API keys, without locking out others who share it.

An address that sends more than `most` different wrong keys within `WINDOW_S` is shut out until the window ends: what is wrong is 429,
not 401. So is the bootstrap key, which somebody chose and which could be found so, unless it was used from there before. Keys that
Nexus made go on working: nobody finds one of 2^256. The same wrong key again and again is no guessing: a client with an old key gets
its 401.
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import TypeVar

import structlog

from schemas.errors import RateLimited

log = structlog.get_logger(__name__)

V = TypeVar("V")

WINDOW_S = 60.0
MAX_ADDRESSES = 10_000
"""Addresses that are remembered of either kind; the oldest are forgotten first."""


class TooManyWrongKeys(RateLimited):
    """Too many wrong API keys came from your address; try again later."""

    code = "too_many_wrong_keys"


class _Guesser:
    """An address that has sent wrong keys in the current window."""

    __slots__ = ("keys", "since")

    def __init__(self, since: float) -> None:
        self.since = since
        self.keys: set[int] = set()


class KeyGuessLimiter:
    """Remember which addresses sent wrong keys, and which ones used the bootstrap key. Nothing waits."""

    def __init__(self, most: int, clock: Callable[[], float] = monotonic) -> None:
        self._most = most
        self._clock = clock
        self._guessers: dict[str, _Guesser] = {}
        self._bootstrapped: dict[str, bool] = {}

    def wrong(self, address: str, key: bytes) -> None:
        """Count a wrong key. Raises TooManyWrongKeys."""
        now = self._clock()
        guesser = self._guessers.get(address)
        if guesser is None or now - guesser.since >= WINDOW_S:
            self._guessers.pop(address, None)
            guesser = _remember(self._guessers, address, _Guesser(now))
        if len(guesser.keys) <= self._most:
            guesser.keys.add(hash(key))
            if len(guesser.keys) > self._most:
                log.warning("auth.address_shut_out", address=address, seconds=WINDOW_S)
        self._refuse(guesser, now)

    def bootstrap(self, address: str) -> None:
        """Remember that the bootstrap key was used from there. Raises TooManyWrongKeys where it may have been found by guessing."""
        if address in self._bootstrapped:
            return
        guesser, now = self._guessers.get(address), self._clock()
        if guesser is not None and now - guesser.since < WINDOW_S:
            self._refuse(guesser, now)
        _remember(self._bootstrapped, address, True)

    def _refuse(self, guesser: _Guesser, now: float) -> None:
        if len(guesser.keys) > self._most:
            left_s = max(1.0, guesser.since + WINDOW_S - now)
            raise TooManyWrongKeys(
                f"more than {self._most} different wrong API keys came from your address within {WINDOW_S:g} s; "
                f"try again in {left_s:.0f} s",
                retry_after_s=left_s,
            )


def _remember(found: dict[str, V], address: str, value: V) -> V:
    if len(found) >= MAX_ADDRESSES:
        del found[next(iter(found))]
    found[address] = value
    return value
