"""Quirks that begin in the middle of a stream whose pattern is learned: unparsed events keep the same guarantees."""

from __future__ import annotations

import json
from typing import Any

import pytest

from workers.adapter_kit.text.completion_collector import CompletionCollector
from workers.adapter_kit.text.completion_options import CompletionOptions
from workers.adapter_kit.text.completion_reader import CompletionReader
from workers.adapter_kit.text.completion_relay import CompletionRelay
from workers.backends.base import Chunk


def choice(text: str) -> bytes:
    envelope = '{"id":"c1","object":"chat.completion.chunk","created":1700000000,"model":"m","choices":[%s]}'
    return f"data: {envelope % text}\n\n".encode("utf-8", "surrogateescape")


def piece(delta: str, rest: str = '"finish_reason":null') -> bytes:
    return choice(f'{{"index":0,"delta":{delta},{rest}}}')


PLAIN = [piece('{"role":"assistant","content":""}'), *[piece('{"content":"p"}')] * 4]
END = [piece("{}", '"finish_reason":"stop"'), b"data: [DONE]\n\n"]
NAN = '"logprobs":{"content":[{"token":"x","logprob":NaN,"bytes":null,"top_logprobs":[]}]},"finish_reason":null'
QUIRKS: dict[str, tuple[list[bytes], str]] = {
    "parts": ([piece('{"content":[{"type":"text","text":"x"}]}')], "x"),
    "null": ([piece('{"content":null}'), piece('{"content":"x"}')], "x"),
    "number": ([piece('{"content":7}')], "7"),
    "delta null": ([piece("null"), piece('{"content":"x"}')], "x"),
    "message": ([choice('{"index":0,"message":{"content":"x"},"finish_reason":null}')], "x"),
    "text": ([choice('{"index":0,"text":"x","finish_reason":null}')], "x"),
    "index counts": ([choice(f'{{"index":{n},"delta":{{"content":"x"}},"finish_reason":null}}') for n in (5, 6)], "xx"),
    "index last counts": (
        [choice(f'{{"delta":{{"content":"x"}},"finish_reason":null,"index":{n}}}') for n in range(4)],
        "xxxx",
    ),
    "no index": ([choice('{"delta":{"content":"x"},"finish_reason":null}')] * 3, "xxx"),
    "reason in each": ([piece('{"content":"x"}', '"finish_reason":"stop"')] * 3, "xxx"),
    "reason empty": ([piece('{"content":"x"}', '"finish_reason":""')] * 3, "xxx"),
    "no reason": ([choice('{"index":0,"delta":{"content":"x"}}')] * 3, "xxx"),
    "surrogates": ([piece('{"content":"\\ud83d"}'), piece('{"content":"\\ude00"}')], "😀"),
    "cut UTF-8": ([piece('{"content":"\udcc3"}'), piece('{"content":"\udca9"}')], "é"),
    "no UTF-8": ([piece('{"content":"\udcff"}'), piece('{"content":"x"}')], "\ufffdx"),
    "thoughts": ([*[piece('{"reasoning_content":"r"}')] * 3, piece('{"content":"x"}')], "x"),
    "role behind": ([piece('{"content":"x","role":"assistant"}')] * 2, "xx"),
    "role before": ([piece('{"role":"assistant","content":"x"}')] * 3, "xxx"),
    "NaN": ([piece('{"content":"x"}', NAN)] * 2, "xx"),
    "usage in a choice": ([piece('{"content":"x"}', '"finish_reason":null,"usage":{"prompt_tokens":1}')] * 2, "xx"),
    "structure as text": ([piece('{"content":"x\\n\\"}]}"}')], 'x\n"}]}'),
    "quotes": ([piece('{"content":"say \\"hi\\" "}')] * 3, 'say "hi" ' * 3),
}


def run(answer: CompletionReader, stream: list[bytes], together: int) -> bytes:
    outputs: list[Any] = [answer.feed(b"".join(stream[at : at + together])) for at in range(0, len(stream), together)]
    outputs += list(answer.finish())
    return b"".join(output.data for output in outputs if isinstance(output, Chunk))


@pytest.mark.parametrize("together", [1, 3, 1000])
@pytest.mark.parametrize("plain", [0, 1, 5])
@pytest.mark.parametrize("name", QUIRKS)
def test_quirks_behind_plain_events(name: str, plain: int, together: int) -> None:
    """After none, one or five plain events, one by one or many at once: one text, one role, one index, one reason."""
    quirk, said = QUIRKS[name]
    stream, text = [*PLAIN[:plain], *quirk, *END], "p" * max(0, plain - 1) + said
    data = run(CompletionRelay(CompletionOptions(chat=True, model="m", fallback_id="f")), stream, together)
    choices = [one for frame in data.split(b"\n\n")[:-1] for one in json.loads(frame[6:])["choices"]]
    deltas = [one["delta"] for one in choices]
    assert "".join(delta.get("content") or "" for delta in deltas) == text
    assert all(isinstance(delta.get("content"), str | None) for delta in deltas)
    assert [delta.get("role") for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    assert [one["index"] for one in choices] == [0] * len(choices)
    assert not any(one.keys() & {"message", "usage"} for one in choices)
    assert [one["finish_reason"] for one in choices] == [None] * (len(choices) - 1) + ["stop"]
    body = json.loads(
        run(CompletionCollector(CompletionOptions(chat=True, model="m", fallback_id="f")), stream, together)
    )
    (whole,) = body["choices"]
    assert (whole["message"]["content"], whole["finish_reason"]) == (text, "stop")
