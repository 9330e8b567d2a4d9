"""Addresses that try out API keys."""

from __future__ import annotations

import pytest

from gateway.auth.authenticator import Authenticator, Principal
from gateway.auth.guess_limiter import MAX_ADDRESSES, WINDOW_S, KeyGuessLimiter, TooManyWrongKeys
from gateway.http.asgi import CALLER_INFO, Caller
from schemas.errors import AuthenticationFailed

KEY = "bootstrap"
CREATED = b"nexus-created"
MOST = 5


class Ring:
    """Knows one key that was created."""

    is_empty = False

    def find(self, key: bytes) -> Principal:
        if key == CREATED:
            return Principal(owner="tenant", key_id="key_1")
        raise AuthenticationFailed

    find_hash = find

    def webhook_secret(self, _key_id: str) -> str | None:
        return None


class Gateway:
    """Authentication, with a clock."""

    def __init__(self) -> None:
        self.now = 0.0
        self.guesses = KeyGuessLimiter(MOST, lambda: self.now)
        self.auth = Authenticator(KEY, Ring(), self.guesses)

    def check(self, key: bytes | str, address: str = "a") -> str:
        """The owner; else the error's code."""
        value = key if isinstance(key, bytes) else key.encode()
        caller = Caller(address)
        try:
            owner = self.auth.authenticate(
                {"headers": [(b"authorization", b"Bearer " + value)], CALLER_INFO: caller}
            ).owner
        except (AuthenticationFailed, TooManyWrongKeys) as error:
            assert not caller.owner
            return str(error.info.code)
        assert caller.owner == owner
        return owner

    def guess(self, count: int, address: str = "a") -> list[str]:
        return [self.check(f"guess-{number}", address) for number in range(count)]


WRONG, SHUT_OUT = "invalid_api_key", "too_many_wrong_keys"


def test_an_address_that_guesses_is_shut_out() -> None:
    """Beyond so many different wrong keys an address gets 429 until the minute is over, and says how long that is."""
    gateway = Gateway()
    assert gateway.guess(MOST + 3) == [WRONG] * MOST + [SHUT_OUT] * 3
    gateway.now = 20.0
    with pytest.raises(TooManyWrongKeys) as caught:
        gateway.guesses.record_wrong_key("a", b"one more")
    assert (caught.value.info.status, caught.value.info.headers()["retry-after"]) == (429, str(int(WINDOW_S - 20)))
    gateway.now = WINDOW_S
    assert gateway.guess(MOST + 1) == [WRONG] * MOST + [SHUT_OUT]


def test_a_correct_guess_looks_like_a_wrong_one() -> None:
    """While an address is shut out, the bootstrap key gets the same answer there as a wrong one, and only there."""
    gateway = Gateway()
    gateway.guess(MOST + 1)
    assert gateway.check(KEY) == SHUT_OUT
    assert gateway.check(KEY, "b") == "default"


def test_known_callers_at_the_address_are_not_affected() -> None:
    """Keys that Nexus made cannot be guessed, and a bootstrap key that was used from there before was not."""
    gateway = Gateway()
    assert gateway.check(KEY) == "default"
    gateway.guess(MOST + 1)
    assert gateway.check(KEY) == "default"
    assert gateway.check(CREATED) == "tenant"


def test_repeating_one_wrong_key_is_not_guessing() -> None:
    """A client that repeats one wrong key, or sends none, is told 401 as often as it asks."""
    gateway = Gateway()
    assert {gateway.check("revoked") for _ in range(100)} == {WRONG}
    with pytest.raises(AuthenticationFailed):
        gateway.auth.authenticate({"headers": [], CALLER_INFO: Caller("a")})


def test_memory_is_bounded() -> None:
    """Addresses are forgotten, the oldest first."""
    gateway = Gateway()
    for number in range(MAX_ADDRESSES + 10):
        gateway.check("wrong", f"address-{number}")
        gateway.check(KEY, f"address-{number}")
    assert len(gateway.guesses._wrong_keys) == len(gateway.guesses._bootstrap_users) == MAX_ADDRESSES
