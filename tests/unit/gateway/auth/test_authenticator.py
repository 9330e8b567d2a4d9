"""Authentication by the bootstrap key."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.auth.authenticator import Authenticator
from schemas.errors import AuthenticationFailed

KEY = "sk-a-key"


def check(token: str | None, *values: bytes) -> str:
    headers = [(b"host", b"nexus"), *((b"authorization", value) for value in values)]
    return Authenticator(token).authenticate({"headers": headers}).owner


@pytest.mark.parametrize("value", [b"Bearer sk-a-key", b"bearer sk-a-key", b"BEARER  sk-a-key "])
def test_the_bootstrap_key_is_accepted(value: bytes) -> None:
    """The scheme's case and blanks around the key do not matter."""
    assert check(KEY, value) == "default"


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"Bearer",
        b"Bearer ",
        b"sk-a-key",
        b"Basic sk-a-key",
        b"Bearer sk-a-ke",
        b"Bearer sk-a-keys",
        b"Bearer \xff",
    ],
)
def test_other_headers_are_rejected(value: bytes) -> None:
    """What is not exactly the key is 401, and is not repeated in the error."""
    with pytest.raises(AuthenticationFailed) as caught:
        check(KEY, value)
    assert caught.value.info.status == 401
    assert caught.value.info.code == "invalid_api_key"
    assert "sk-a" not in caught.value.info.message


def test_a_missing_header_is_401() -> None:
    """So is nothing, and the error says how a key is sent."""
    with pytest.raises(AuthenticationFailed, match="Bearer"):
        check(KEY)


@pytest.mark.parametrize("token", [None, ""])
@pytest.mark.parametrize("value", [b"Bearer ", b"Bearer None", b"Bearer x", b""])
def test_without_a_configured_key_every_request_is_rejected(token: str | None, value: bytes) -> None:
    """An empty setting is no key, and no empty key."""
    with pytest.raises(AuthenticationFailed, match="GATEWAY_BEARER_TOKEN"):
        check(token, value)


def test_the_first_of_two_headers_counts() -> None:
    """A second Authorization header cannot mend the first."""
    with pytest.raises(AuthenticationFailed):
        check(KEY, b"Bearer wrong", b"Bearer sk-a-key")


@given(st.binary(max_size=40))
def test_random_bytes_are_rejected(value: bytes) -> None:
    """Whatever bytes come, they are refused in order."""
    with pytest.raises(AuthenticationFailed):
        check("a key that no test draws", value)


def test_a_key_may_hold_other_characters_than_ascii() -> None:
    """A configured key may hold any text; it is compared as UTF-8."""
    assert check("schlüssel", b"Bearer " + "schlüssel".encode()) == "default"
