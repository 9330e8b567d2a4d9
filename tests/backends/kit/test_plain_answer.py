"""An answer that is read in one pass is the answer that is read event by event."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.adapter_kit.text.completion_collector import CompletionCollector
from workers.adapter_kit.text.completion_options import CompletionOptions
from workers.adapter_kit.text.completion_relay import CompletionRelay
from workers.adapter_kit.text.plain_answer import read_plain_answer
from workers.backends.base import BackendError, Chunk, Finish, Output

texts = st.text(max_size=6) | st.sampled_from(["", "error", "[DONE]", "\n\ndata: ", "\\", '"', "é😀", "\ud83d\ude00"])
reasons = st.sampled_from([None, None, None, "stop", "length", "eos", "tool_calls", "abort", ""])
usages = st.none() | st.sampled_from([
    {},
    {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5, "prompt_tokens_details": {"cached_tokens": 1}},
    {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
    {"input_tokens": 4, "output_tokens": 1},
    "none",
])  # fmt: skip
EXTRAS = {"system_fingerprint": "fp", "provider": "p", "timings": {"ms": 2}, "x_groq": {"id": 1}, "error": None}
extras = st.dictionaries(st.sampled_from(sorted(EXTRAS)), st.booleans(), max_size=2).map(
    lambda chosen: {name: EXTRAS[name] if given else None for name, given in chosen.items()}
)


@st.composite
def choices(draw: st.DrawFn, *, chat: bool) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": draw(st.sampled_from([0, 0, 0, 1, None]))}
    text = draw(texts)
    if chat:
        delta: dict[str, Any] = draw(
            st.sampled_from([{}, {}, {"role": "assistant"}, {"refusal": None}, {"reasoning": "r"}])
        )
        choice["delta"] = delta | draw(st.sampled_from([{"content": text}, {"content": text}, {"content": None}, {}]))
    else:
        choice["text"] = text
    choice |= draw(st.sampled_from([{}, {}, {"logprobs": None}, {"logprobs": {"content": []}}, {"stop_reason": 7}]))
    if draw(st.booleans()):
        choice["finish_reason"] = draw(reasons)
    return choice


@st.composite
def streams(draw: st.DrawFn, *, chat: bool) -> bytes:
    """Draw a stream of events, most of them ordinary."""
    events: list[Any] = []
    for _ in range(draw(st.integers(0, 6))):
        several = draw(st.sampled_from([1, 1, 1, 1, 0, 2]))
        event: dict[str, Any] = {"id": draw(st.sampled_from(["a", "a", "b"])), "created": 5, "model": "server"}
        event["choices"] = [draw(choices(chat=chat)) for _ in range(several)]
        if draw(st.booleans()):
            event["usage"] = draw(usages)
        events.append(event | draw(extras))
    separators = draw(st.sampled_from([(",", ":"), (", ", ": ")]))
    ascii_only = draw(st.booleans())
    lines = [json.dumps(event, separators=separators, ensure_ascii=ascii_only) for event in events]
    lines += draw(st.sampled_from([["[DONE]"], ["[DONE]"], []]))
    end = draw(st.sampled_from(["\n\n", "\n\n", "\n\n", "\r\n\r\n", "\n"]))
    return "".join(f"data: {line}{end}" for line in lines).encode("utf-8", "replace")


def read(stream: bytes, cuts: list[int], *, chat: bool, by_events: bool) -> tuple[Any, int, Any]:
    """Return the body or the error, the number of tokens, and the usage."""
    answer = CompletionCollector(CompletionOptions(chat=chat, model="m", fallback_id="f"))
    if by_events:
        answer._unread = None
    edges = sorted({0, len(stream), *(cut % (len(stream) + 1) for cut in cuts)})
    outputs: list[Output | None] = []
    try:
        for start, end in pairwise(edges):
            if not answer.done and not answer.take(stream[start:end]):
                outputs.append(answer.feed(stream[start:end]))
        if not answer.done:
            outputs.append(answer.feed_end())
        outputs += list(answer.finish())
    except BackendError as error:
        return error.info.message, 0, None
    chunks = [output for output in outputs if isinstance(output, Chunk)]
    finish = outputs[-1]
    assert isinstance(finish, Finish)
    body = json.loads(b"".join(chunk.data for chunk in chunks))
    return body, sum(chunk.tokens for chunk in chunks), finish.usage


def relay(stream: bytes, cuts: list[int], *, chat: bool, pushes: bool) -> tuple[bytes, int] | str:
    """Return what a caller who streams gets, and the number of tokens; or the error."""
    got: list[bytes] = []
    tokens: list[int] = []

    def push(data: bytes, count: int) -> None:
        got.append(data)
        tokens.append(count)

    options = CompletionOptions(chat=chat, model="m", fallback_id="f", stream=True)
    answer = CompletionRelay(options, push if pushes else None)
    edges = sorted({0, len(stream), *(cut % (len(stream) + 1) for cut in cuts)})
    try:
        for piece in (stream[start:end] for start, end in pairwise(edges)):
            if not answer.done and not answer.take(piece) and (chunk := answer.feed(piece)) is not None:
                push(chunk.data, chunk.tokens)
        if not answer.done and (chunk := answer.feed_end()) is not None:
            push(chunk.data, chunk.tokens)
        for output in answer.finish():
            if isinstance(output, Chunk):
                push(output.data, output.tokens)
    except BackendError as error:
        return error.info.message
    return b"".join(got), sum(tokens)


@settings(max_examples=200)
@given(st.data(), st.booleans(), st.lists(st.integers(0, 3000), max_size=6))
def test_pushed_events_stand_where_yielded_ones_would(data: st.DataObject, chat: bool, cuts: list[int]) -> None:
    """Any stream, cut anywhere and between its events: the same bytes in the same order, or the same error."""
    stream = data.draw(streams(chat=chat))
    cuts += [at + 2 for at in range(len(stream)) if stream.startswith(b"\n\n", at)]
    assert relay(stream, cuts, chat=chat, pushes=True) == relay(stream, cuts, chat=chat, pushes=False)


@settings(max_examples=400)
@given(st.data(), st.booleans(), st.lists(st.integers(0, 3000), max_size=6))
def test_both_ways_give_the_same_answer(data: st.DataObject, chat: bool, cuts: list[int]) -> None:
    """Any stream, cut anywhere: the same body and usage, or the same error. By events, texts that are empty may count as tokens."""
    stream = data.draw(streams(chat=chat))
    body, tokens, usage = read(stream, cuts, chat=chat, by_events=False)
    expected_body, expected_tokens, expected_usage = read(stream, cuts, chat=chat, by_events=True)
    assert (body, usage) == (expected_body, expected_usage)
    assert tokens <= expected_tokens


@pytest.mark.parametrize("chat", [True, False])
def test_an_ordinary_answer_is_read_in_one_pass(chat: bool) -> None:
    """The ordinary form is recognized, or the pass would be for nothing."""
    parts = [{"delta": {"content": word}} if chat else {"text": word} for word in ("Hel", "lo")]
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    events: list[Any] = [
        {"id": "a", "created": 5, "choices": [{"index": 0, **part, "finish_reason": None}]} for part in parts
    ]
    events += [
        {"id": "a", "created": 5, "choices": [{"index": 0, "delta": {}, "text": "", "finish_reason": "stop"}]}
    ] * chat
    events += [{"id": "a", "created": 5, "choices": [], "usage": usage}]
    if chat:
        events[2]["choices"][0].pop("text")
    stream = b"".join(b"data: %b\n\n" % json.dumps(event).encode() for event in events) + b"data: [DONE]\n\n"
    answer = read_plain_answer(stream, chat=chat)
    assert answer is not None
    assert (answer.text, answer.reason, answer.tokens, answer.usage) == ("Hello", "stop", 2, usage)


def test_the_first_text_is_reported_at_once() -> None:
    """The worker learns from the first text that the model is loaded, and counts each token once."""
    answer = CompletionCollector(CompletionOptions(chat=True, model="m", fallback_id="f"))
    first = b'data: {"id":"a","choices":[{"index":0,"delta":{"content":"%b"}}]}\n\n'
    assert answer.feed(first % b"") is None
    assert answer.feed(first % b"a") == Chunk(b"", 1)
    assert answer.feed(first % b"b") is None
    assert answer.feed(b"data: [DONE]\n\n") is None
    body, finish = answer.finish()
    assert isinstance(body, Chunk)
    assert (body.tokens, isinstance(finish, Finish)) == (1, True)


def test_an_error_ends_the_call_at_once() -> None:
    """An error amid a stream is raised when it arrives, not at the end of the stream."""
    answer = CompletionCollector(CompletionOptions(chat=True, model="m", fallback_id="f"))
    answer.feed(b'data: {"id":"a","choices":[{"index":0,"delta":{"content":"a"}}]}\n\n')
    with pytest.raises(BackendError, match="out of memory"):
        answer.feed(b'data: {"error":{"message":"out of memory"}}\n\n')
