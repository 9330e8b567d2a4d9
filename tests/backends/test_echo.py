"""The echo adapter: the contract, and its script."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest

from tests.backends.contract import Contract, Rig, body_of, chat, check_stream, collect, completion, events
from workers.backends.base import (
    BackendConfig,
    BackendError,
    BackendRefused,
    BackendUnavailable,
    Chunk,
    Finish,
    make_backend,
)
from workers.backends.echo.adapter import EchoBackend


def echo(**options: str) -> EchoBackend:
    return EchoBackend(BackendConfig(options=options))


class TestEcho(Contract):
    @pytest.fixture
    async def rig(self) -> Rig:
        backend = echo()
        running: list[int] = []
        run = backend.run

        async def counted(task: Any) -> Any:
            running.append(1)
            output = run(task)
            try:
                async for piece in output:
                    yield piece
            finally:
                await output.aclose()  # type: ignore[attr-defined]
                running.pop()

        async def idle() -> bool:
            return not running

        backend.run = counted  # type: ignore[method-assign]
        return Rig(backend, "echo", idle, {"echo": {"tokens": 1000, "delay_ms": 20}})


async def test_answers_with_the_last_user_message() -> None:
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "no"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": [{"type": "text", "text": 'a "quoted"  text\nwith é'}]},
    ]
    body, finish = await body_of(echo(), chat("echo", messages=messages))
    assert body["choices"][0]["message"]["content"] == 'a "quoted"  text\nwith é'
    assert body["choices"][0]["finish_reason"] == "stop"
    assert finish.usage is not None
    assert finish.usage.prompt_tokens == 9


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
async def test_max_tokens_cuts_the_answer(name: str) -> None:
    fields: dict[str, Any] = {name: 2}
    body, _ = await body_of(echo(), chat("echo", **fields))
    assert body["choices"][0]["message"]["content"] == "Say hello"
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 2


async def test_an_answer_of_no_tokens_is_complete() -> None:
    chunks, _ = await collect(echo(), chat("echo", stream=True, max_tokens=0))
    assert check_stream(events(chunks), "echo", is_chat=True) == ""


async def test_n_and_lists_of_prompts_are_honoured() -> None:
    body, _ = await body_of(echo(), completion("echo", prompt=["one", "two three"], n=2))
    assert [choice["text"] for choice in body["choices"]] == ["one", "one", "two three", "two three"]
    chunks, _ = await collect(echo(), chat("echo", stream=True, n=3))
    found = events(chunks)
    check_stream(found, "echo", is_chat=True)
    assert {event["choices"][0]["index"] for event in found} == {0, 1, 2}


async def test_size_and_tokens_say_how_much_comes() -> None:
    work = chat("echo", stream=True, echo={"size": 100_001, "tokens": 10, "batch": 4})
    chunks, finish = await collect(echo(), work)
    assert len(check_stream(events(chunks), "echo", is_chat=True)) == 100_001
    assert [chunk.tokens for chunk in chunks] == [4, 4, 2, 0]
    assert finish.usage is not None
    assert finish.usage.completion_tokens == 10


async def test_delays_are_kept_and_the_body_overrides_the_options() -> None:
    began = time.monotonic()
    work = chat("echo", stream=True, echo={"delay_ms": 10, "first_delay_ms": 100, "tokens": 5})
    await collect(echo(delay_ms="60000"), work)
    assert 0.12 < time.monotonic() - began < 5


async def test_an_answer_in_one_piece_shows_signs_of_life() -> None:
    chunks, _ = await collect(echo(delay_ms="1"), chat("echo", echo={"tokens": 4}))
    assert [bool(chunk.data) for chunk in chunks] == [False] * 4 + [True]
    assert sum(chunk.tokens for chunk in chunks) == 4


@pytest.mark.parametrize(
    ("fail", "error", "transient", "tokens"),
    [
        ("before", BackendError, True, 0),
        ("mid", BackendError, True, 5),
        ("refuse", BackendRefused, False, 0),
        ("unavailable", BackendUnavailable, True, 0),
        ("error", BackendError, False, 0),
        ("crash", RuntimeError, None, 5),
    ],
)
async def test_failures(fail: str, error: type[Exception], transient: bool | None, tokens: int) -> None:
    seen: list[Any] = []
    with pytest.raises(error) as caught:
        async for piece in echo(fail=fail).run(chat("echo", stream=True, echo={"tokens": 10})):
            seen.append(piece)  # noqa: PERF401  # what came before the error counts
    assert len(seen) == tokens
    assert getattr(caught.value, "transient", None) is transient


async def test_a_dropped_answer_has_no_finish() -> None:
    seen = [piece async for piece in echo(fail="drop").run(chat("echo", stream=True, echo={"tokens": 10}))]
    assert len(seen) == 5
    assert not any(isinstance(piece, Finish) for piece in seen)


@pytest.mark.parametrize(("fail", "tokens"), [("hang", 0), ("hang_mid", 5)])
async def test_a_hanging_answer_ends_when_it_is_closed(fail: str, tokens: int) -> None:
    seen: list[Chunk] = []

    async def consume() -> None:
        async for piece in echo(fail=fail).run(chat("echo", stream=True, echo={"tokens": 10})):
            assert isinstance(piece, Chunk)
            seen.append(piece)

    with pytest.raises(TimeoutError):
        await asyncio.wait_for(consume(), 0.05)
    assert len(seen) == tokens


async def test_fail_times_lets_a_later_attempt_pass() -> None:
    backend = echo(fail="before", fail_times="2")
    for _ in range(2):
        with pytest.raises(BackendError):
            await collect(backend, chat("echo"))
    await collect(backend, chat("echo"))


async def test_down_is_down() -> None:
    with pytest.raises(BackendUnavailable):
        await echo(down="true").discover()


async def test_configured_models_and_slots_are_offered() -> None:
    backend = make_backend("echo", BackendConfig(models=("a", "b/c:d"), options={"slots": "7"}))
    found = await backend.discover()
    assert [model.name for model in found.models] == ["a", "b/c:d"]
    assert found.slots == 7


@pytest.mark.parametrize("script", [{"fail": "nonsense"}, {"tokens": -1}, {"unknown": 1}, {"delay_ms": "soon"}])
async def test_a_script_that_makes_no_sense_is_refused(script: dict[str, Any]) -> None:
    with pytest.raises(BackendRefused) as caught:
        await collect(echo(), chat("echo", echo=script))
    assert (caught.value.info.param or "").startswith("echo.")


async def test_openais_own_echo_field_is_no_script() -> None:
    body, _ = await body_of(echo(), completion("echo", echo=True))
    assert body["choices"][0]["text"] == "Once upon a time"


def test_an_option_that_makes_no_sense_is_an_error() -> None:
    with pytest.raises(ValueError, match="delay"):
        echo(delay="3")


async def test_usage_comes_last_when_asked_for() -> None:
    work = chat("echo", stream=True, stream_options={"include_usage": True})
    chunks, _ = await collect(echo(), work)
    last = json.loads(chunks[-1].data[6:])
    assert last["usage"] == {"prompt_tokens": 5, "completion_tokens": 5, "total_tokens": 10}
