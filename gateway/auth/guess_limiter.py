"""Slow down an address that tries out API keys, without locking out others who share it.

An address that sends more than `max_wrong_keys` different wrong keys within `WINDOW_S` is shut out until the window ends: a wrong key
is then answered 429 instead of 401. So is the bootstrap key, which a person chose and an attacker could guess, unless it was used from
that address before. Created keys stay valid, since 256 random bits cannot be guessed. Repeating one wrong key is not guessing: a client
with an old key gets 401.
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
"""Addresses that are remembered in each table; the oldest are forgotten first."""


class TooManyWrongKeys(RateLimited):
    """Too many wrong API keys came from your address; try again later."""

    code = "too_many_wrong_keys"


class _WrongKeys:
    """Wrong keys that an address has sent in the current window."""

    __slots__ = ("keys", "since")

    def __init__(self, since: float) -> None:
        self.since = since
        self.keys: set[int] = set()


class KeyGuessLimiter:
    """Remembers which addresses sent wrong keys, and which used the bootstrap key."""

    def __init__(self, max_wrong_keys: int, clock: Callable[[], float] = monotonic) -> None:
        self._max_wrong_keys = max_wrong_keys
        self._clock = clock
        self._wrong_keys: dict[str, _WrongKeys] = {}
        self._bootstrap_users: dict[str, bool] = {}

    def record_wrong_key(self, address: str, key: bytes) -> None:
        """Count a wrong key. Raises TooManyWrongKeys."""
        now = self._clock()
        wrong_keys = self._wrong_keys.get(address)
        if wrong_keys is None or now - wrong_keys.since >= WINDOW_S:
            self._wrong_keys.pop(address, None)
            wrong_keys = _remember(self._wrong_keys, address, _WrongKeys(now))
        if len(wrong_keys.keys) <= self._max_wrong_keys:
            wrong_keys.keys.add(hash(key))
            if len(wrong_keys.keys) > self._max_wrong_keys:
                log.warning("auth.address_shut_out", address=address, seconds=WINDOW_S)
        self._refuse(wrong_keys, now)

    def record_bootstrap_use(self, address: str) -> None:
        """Remember that `address` used the bootstrap key. Raises TooManyWrongKeys if it may have been guessed."""
        if address in self._bootstrap_users:
            return
        wrong_keys, now = self._wrong_keys.get(address), self._clock()
        if wrong_keys is not None and now - wrong_keys.since < WINDOW_S:
            self._refuse(wrong_keys, now)
        _remember(self._bootstrap_users, address, True)

    def _refuse(self, wrong_keys: _WrongKeys, now: float) -> None:
        if len(wrong_keys.keys) > self._max_wrong_keys:
            left_s = max(1.0, wrong_keys.since + WINDOW_S - now)
            raise TooManyWrongKeys(
                f"More than {self._max_wrong_keys} different wrong API keys came from your address within {WINDOW_S:g} s. "
                f"Retry in {left_s:.0f} s.",
                retry_after_s=left_s,
            )


def _remember(found: dict[str, V], address: str, value: V) -> V:
    if len(found) >= MAX_ADDRESSES:
        del found[next(iter(found))]
    found[address] = value
    return value
