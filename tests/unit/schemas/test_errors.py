"""Errors have one class for each status, and reach callers unchanged as OpenAI's object."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas import errors
from schemas.errors import ErrorInfo, NexusError


def subclasses(kind: type[NexusError]) -> list[type[NexusError]]:
    return [
        kind,
        *(sub for child in kind.__subclasses__() if child.__module__ == errors.__name__ for sub in subclasses(child)),
    ]


KINDS = subclasses(NexusError)


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_is_openais_object(kind: type[NexusError]) -> None:
    """Every error has a default message and the four fields that SDKs read."""
    error = kind()
    body = error.info.body()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"] == str(error)
    assert str(error).strip()
    assert 400 <= error.info.status <= 508
    assert kind.__doc__


def test_the_drawn_tree_is_the_real_one() -> None:
    """The drawing in the module's docstring names every direct subclass with its status."""
    drawn = [line.split()[1:3] for line in (errors.__doc__ or "").splitlines() if line.startswith(("├", "└"))]
    assert drawn == [
        [kind.__name__, str(kind.status)]
        for kind in NexusError.__subclasses__()
        if kind.__module__ == errors.__name__ and kind is not errors.InternalError
    ] + [["InternalError", "500"]]


@pytest.mark.parametrize(
    ("error", "headers"),
    [
        (errors.QueueFull(), {"retry-after": "2"}),
        (errors.QueueFull(retry_after_s=0.01), {"retry-after": "1"}),
        (errors.Unavailable(retry_after_s=12.4, should_retry=True), {"retry-after": "12", "x-should-retry": "true"}),
        (errors.DeadlineExceeded(), {"x-should-retry": "false"}),
        (errors.RequestLoop(), {"x-should-retry": "false", "x-nexus-hops": "refused"}),
        (errors.InvalidRequest(), {}),
    ],
)
def test_headers(error: NexusError, headers: dict[str, str]) -> None:
    """`Retry-After` is in whole seconds, at least one. `x-should-retry` is sent if Nexus knows the answer."""
    assert error.info.headers() == headers


def test_what_is_given_comes_before_what_the_class_says() -> None:
    """Arguments of an error take precedence over the defaults of its class."""
    info = errors.InvalidRequest("no", code="bad_size", param="size", should_retry=False).info
    assert (info.status, info.type, info.code, info.param) == (400, "invalid_request_error", "bad_size", "size")
    assert info.should_retry is False


def test_an_empty_message_is_the_classs() -> None:
    """An empty message is replaced by the default message."""
    assert str(errors.QueueFull("")) == "The queue for this model is full. Retry shortly."


INFOS = st.builds(
    ErrorInfo,
    status=st.integers(400, 599),
    type=st.text(max_size=10),
    code=st.none() | st.text(max_size=10),
    message=st.text(max_size=20),
    param=st.none() | st.text(max_size=10),
    retry_after_s=st.none() | st.floats(0, 1e6),
    should_retry=st.none() | st.booleans(),
)


@given(INFOS, st.booleans())
def test_errors_travel(info: ErrorInfo, exclude_none: bool) -> None:
    """An error is unchanged after a round trip, also if the sender omits null fields, as workers do."""
    assert ErrorInfo.model_validate_json(info.model_dump_json(exclude_none=exclude_none)) == info
    assert NexusError.from_info(info).info == info
