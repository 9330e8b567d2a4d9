"""Delivery preferences: accepted, ignored and rejected headers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.http.preferences import MAX_KEY, MAX_WAIT_S, DeliveryPreferences, read_preferences
from schemas.errors import InvalidRequest


def prefer(*values: str) -> DeliveryPreferences | None:
    return read_preferences([(b"prefer", value.encode("latin-1")) for value in values])


@pytest.mark.parametrize(
    ("value", "wait_s"),
    [
        ("respond-async", None),
        ("Respond-Async", None),
        (" respond-async ", None),
        ('respond-async=""', None),
        ("respond-async; foo=bar", None),
        ("respond-async, wait=10", 10),
        ("wait=10, respond-async", 10),
        ('respond-async,wait = "10"', 10),
        ("respond-async, WAIT=0", 0),
        ("respond-async, wait=99999", MAX_WAIT_S),
        ("respond-async, wait=5, wait=60", 5),
        ('return=minimal, respond-async, handling="strict, wait=7"', None),
    ],
)
def test_respond_async(value: str, wait_s: float | None) -> None:
    """RFC 7240: any case, any order, parameters, quotes; of what is said twice, the first."""
    assert prefer(value) == DeliveryPreferences(respond_async=True, wait_s=wait_s)


def test_several_headers_are_one() -> None:
    assert prefer("wait=3", "respond-async") == DeliveryPreferences(respond_async=True, wait_s=3.0)


@pytest.mark.parametrize(
    "value",
    [
        "",
        ",,;=,",
        "wait=10",
        "return=representation",
        "respond-asynchronously",
        "respond-async=no",
        'handling="lenient, respond-async, x"',
        'handling="a\\", respond-async, x"',
        'open="respond-async, respond-async',
        "wait=respond-async",
        "\xe9\xff",
    ],
)
def test_other_preferences_are_ignored(value: str) -> None:
    assert prefer(value) is None


@pytest.mark.parametrize(
    "wait", ["wait", "wait=", "wait=-1", "wait=1.5", "wait=1e3", "wait=\xb2", "wait='5'", "wait=9999999999", 'wait="5']
)
def test_an_invalid_wait_is_ignored(wait: str) -> None:
    """The answer comes later all the same."""
    assert prefer(f"respond-async, {wait}") == DeliveryPreferences(respond_async=True)


@given(st.text(st.characters(max_codepoint=255)))
def test_nothing_in_the_header_is_an_error(text: str) -> None:
    preferences = prefer(text)
    assert preferences is None or preferences.respond_async


@pytest.mark.parametrize("text", ['"' * 60_000, "a," * 30_000, '"\\' * 30_000, "wait" + " " * 60_000, ' "a" ' * 12_000])
def test_a_long_header_is_no_way_to_stop_a_gateway(text: str) -> None:
    """Work grows with its length and no faster: by another power, this would not end within the time of a test."""
    assert prefer(f"{text}, respond-async") in {None, DeliveryPreferences(respond_async=True)}


@pytest.mark.parametrize("key", ["k", "8e03978e-40d5-43dd-bc93-6894a57f9324", '"quoted"', "ä" * MAX_KEY, "a b"])
def test_an_idempotency_key(key: str) -> None:
    assert read_preferences([(b"idempotency-key", key.encode("latin-1"))]) == DeliveryPreferences(key=key)


@pytest.mark.parametrize("key", [b"", b"k" * (MAX_KEY + 1), b"a\tb", b"a\x00b", b"a\x7fb", b"\xa0", b"\x85"])
def test_an_invalid_key_is_rejected(key: bytes) -> None:
    """Two callers must never take different keys for the same one."""
    with pytest.raises(InvalidRequest) as caught:
        read_preferences([(b"idempotency-key", key)])
    assert caught.value.info.param == "Idempotency-Key"


@pytest.mark.parametrize(
    ("value", "resume"),
    [(b"true", True), (b" TRUE ", True), (b"1", True), (b"false", False), (b"0", False), (b"", False)],
)
def test_a_stream_to_be_resumed(value: bytes, resume: bool) -> None:
    assert read_preferences([(b"x-nexus-resume", value)]) == (DeliveryPreferences(resume=True) if resume else None)


def test_other_headers_are_no_preferences() -> None:
    assert read_preferences([(b"authorization", b"Bearer x"), (b"preference", b"respond-async")]) is None


@pytest.mark.parametrize(
    ("wait_s", "said"), [(None, b"respond-async"), (0.0, b"respond-async, wait=0"), (5.0, b"respond-async, wait=5")]
)
def test_the_applied_preference_is_returned(wait_s: float | None, said: bytes) -> None:
    assert DeliveryPreferences(respond_async=True, wait_s=wait_s).applied == said
