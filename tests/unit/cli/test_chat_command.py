"""`nexus chat`: the choice of the model, the requests, and the history after stopped and failed turns."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

import httpx
import pytest

from cli import chat
from cli.errors import ConsoleError
from cli.gateway_client import ApiClient, GatewayTarget
from tests.unit.cli.gateway_double import serve

WORKERS = {
    "data": [
        {"id": "painter", "models": [{"name": "flux", "capabilities": ["images"]}]},
        {"id": "talker", "models": [{"name": "smollm2", "capabilities": ["chat"]}]},
    ]
}


def api(answer: Callable[[httpx.Request], httpx.Response]) -> ApiClient:
    return ApiClient(GatewayTarget(serve(answer), "k"))


def routes(**answers: httpx.Response) -> Callable[[httpx.Request], httpx.Response]:
    return lambda request: answers[request.url.path.rpartition("/")[2]]


def sse(*pieces: str, done: bool = True) -> httpx.Response:
    frames: list[dict[str, Any]] = [{"choices": [{"delta": {"role": "assistant", "content": None}}]}]
    frames += [{"choices": [{"delta": {"content": piece}}]} for piece in pieces]
    frames += [{"choices": [{"delta": {}, "finish_reason": "stop"}]}, {"choices": [], "usage": {}}]
    text = "".join(f"data: {json.dumps(frame)}\n\n" for frame in frames)
    return httpx.Response(200, text=text + ("data: [DONE]\n\n" if done else ""))


def typed(monkeypatch: pytest.MonkeyPatch, lines: Iterable[str | type[BaseException]]) -> None:
    """What the user types; then Ctrl-D."""
    left = iter([*lines, EOFError])

    def read(_: str) -> str:
        line = next(left)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read)


def test_first_model_is_one_that_can_chat():
    """Not the first of the list, which paints."""
    assert chat.first_chat_model(api(routes(workers=httpx.Response(200, json=WORKERS)))) == "smollm2"


def test_first_model_with_a_key_that_may_not_see_workers():
    """Then the list of models has to do."""
    models = httpx.Response(200, json={"data": [{"id": "m"}]})
    assert chat.first_chat_model(api(routes(workers=httpx.Response(403, json={}), models=models))) == "m"


def test_no_model():
    """Says so."""
    empty = httpx.Response(200, json={"data": []})
    with pytest.raises(ConsoleError, match="has no model"):
        chat.first_chat_model(api(routes(workers=empty, models=empty)))


def test_one_answer_streams_to_stdout(capsys: pytest.CaptureFixture[str]):
    """And ends with a newline."""
    chat.ask_once(api(lambda _: sse("Hel", "lo")), "m", [], stream=True)
    assert capsys.readouterr().out == "Hello\n"


def test_one_answer_without_stream(capsys: pytest.CaptureFixture[str]):
    """The whole body at once."""
    answer = httpx.Response(200, json={"choices": [{"message": {"content": "Hello"}}]})
    chat.ask_once(api(lambda _: answer), "m", [], stream=False)
    assert capsys.readouterr().out == "Hello\n"


def test_broken_answer_is_an_error_after_its_text(capsys: pytest.CaptureFixture[str]):
    """Nobody takes half an answer for a whole one."""
    with pytest.raises(ConsoleError, match="broke off"):
        chat.ask_once(api(lambda _: sse("Hel", done=False)), "m", [], stream=True)
    assert capsys.readouterr().out == "Hel\n"


def test_turns_carry_the_history(monkeypatch: pytest.MonkeyPatch):
    """A failed turn is not part of it, /clear resets it, Ctrl-C at the prompt does not end the chat."""
    requests: list[list[dict[str, str]]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        requests.append(json.loads(request.content)["messages"])
        if requests[-1][-1]["content"] == "fail":
            return httpx.Response(503, json={"error": {"message": "away"}})
        return sse("yes")

    typed(monkeypatch, ["one", "fail", "", KeyboardInterrupt, "two", "/clear", "three"])
    chat.converse(api(answer), "m", [{"role": "system", "content": "s"}], stream=True)
    contents = [[message["content"] for message in messages] for messages in requests]
    assert contents == [
        ["s", "one"],
        ["s", "one", "yes", "fail"],
        ["s", "one", "yes", "two"],
        ["s", "three"],
    ]


def test_stopped_answer_is_part_of_the_history(monkeypatch: pytest.MonkeyPatch):
    """Ctrl-C in the middle: the model will see what the user has seen."""
    history: list[dict[str, str]] = []
    closed = False

    def pieces(*_: object, **__: object):
        nonlocal closed
        try:
            yield "half"
            raise KeyboardInterrupt
        finally:
            closed = True

    monkeypatch.setattr(chat, "stream_answer", pieces)
    typed(monkeypatch, ["go"])
    chat.converse(api(lambda _: sse()), "m", history, stream=True)
    assert history == [{"role": "user", "content": "go"}, {"role": "assistant", "content": "half"}]
    assert closed
