"""From a server's stream to the caller's, on bytes alone."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.backends.base import BackendError, Chunk, Finish
from workers.backends.chunks import Answer, Collector, Relay, Wanted
from workers.backends.merging import combined_usage, finished_choice, merge

words = st.lists(
    st.text(max_size=8) | st.sampled_from(['"', "\\", "\n\n", 'a"finish_reason":"stop"', "é😀"]), max_size=12
)
forms = st.sampled_from([(",", ":"), (", ", ": ")])


def encoded(events: list[Any], separators: tuple[str, str], ascii_only: bool) -> bytes:
    texts = [json.dumps(event, separators=separators, ensure_ascii=ascii_only) for event in events]
    return b"".join(f"data: {text}\n\n".encode() for text in [*texts, "[DONE]"])


def chat_events(said: list[str], order: bool, model: str) -> list[Any]:
    deltas: list[tuple[Any, str | None]] = [({"role": "assistant", "content": ""}, None)]
    deltas += [({"content": word}, None) for word in said]
    deltas += [({}, "stop")]
    events = []
    for delta, reason in deltas:
        choices = [{"index": 0, "delta": delta, "finish_reason": reason}]
        rest = {"id": "a", "object": "chat.completion.chunk", "created": 5, "model": model, "usage": None}
        events.append({"choices": choices, **rest} if order else {**rest, "choices": choices})
    return events


def run(answer: Answer, stream: bytes, cuts: list[int]) -> tuple[bytes, int, Finish]:
    edges = sorted({0, len(stream), *(cut % (len(stream) + 1) for cut in cuts)})
    outputs = [answer.feed(stream[start:end]) for start, end in pairwise(edges)]
    outputs += list(answer.finish())
    chunks = [output for output in outputs if isinstance(output, Chunk)]
    assert isinstance(outputs[-1], Finish)
    return b"".join(chunk.data for chunk in chunks), sum(chunk.tokens for chunk in chunks), outputs[-1]


@given(words, forms, st.booleans(), st.booleans(), st.sampled_from(["m", "other"]), st.lists(st.integers(0, 5000)))
def test_any_text_in_any_form_cut_anywhere_is_relayed(
    said: list[str], form: tuple[str, str], ascii_only: bool, order: bool, model: str, cuts: list[int]
) -> None:
    stream = encoded(chat_events(said, order, model), form, ascii_only)
    data, _, _ = run(Relay(Wanted(chat=True, model="m", fallback_id="f")), stream, cuts)
    frames = data.split(b"\n\n")
    assert frames.pop() == b""
    events = [json.loads(frame.removeprefix(b"data: ")) for frame in frames]
    assert {(event["id"], event["created"], event["model"]) for event in events} == {("a", 5, "m")}
    assert [event["choices"][0]["delta"].get("content") for event in events] == ["", *said, None]
    assert [event["choices"][0]["finish_reason"] for event in events] == [None] * (len(said) + 1) + ["stop"]


@given(words, forms, st.booleans(), st.booleans(), st.lists(st.integers(0, 5000)))
def test_any_text_in_any_form_cut_anywhere_is_collected(
    said: list[str], form: tuple[str, str], ascii_only: bool, order: bool, cuts: list[int]
) -> None:
    stream = encoded(chat_events(said, order, "m"), form, ascii_only)
    data, tokens, _ = run(Collector(Wanted(chat=True, model="m", fallback_id="f")), stream, cuts)
    assert json.loads(data)["choices"][0]["message"]["content"] == "".join(said)
    assert tokens <= len(said)


def text_events(*choices: dict[str, Any], **rest: Any) -> list[Any]:
    return [{"id": "a", "created": 5, "model": "m", "choices": [choice], **rest} for choice in choices]


def test_plain_events_pass_as_they_are() -> None:
    stream = encoded(chat_events(["a", "b", "c"], False, "m")[:-1], (",", ":"), ascii_only=False)
    answer = Relay(Wanted(chat=True, model="m", fallback_id="f"))
    first, rest = stream.split(b"\n\n", 1)
    answer.feed(first + b"\n\n")
    # The envelope has usage: null, which is not wanted: the name is kept, the bytes are not.
    assert answer.feed(rest.replace(b',"usage":null', b"").removesuffix(b"data: [DONE]\n\n")) is not None


def test_unknown_fields_survive_in_both_forms() -> None:
    events = text_events(
        {"index": 0, "text": "a", "finish_reason": None, "stop_reason": None},
        {"index": 0, "text": "b", "finish_reason": "stop", "stop_reason": 7},
        system_fingerprint="fp",
    )
    events[-1]["timings"] = {"ms": 1}
    stream = encoded(events, (",", ":"), ascii_only=False)
    wanted = Wanted(chat=False, model="m", fallback_id="f")
    whole = json.loads(run(Collector(wanted), stream, [])[0])
    assert (whole["timings"], whole["system_fingerprint"], whole["object"]) == ({"ms": 1}, "fp", "text_completion")
    assert whole["choices"] == [{"index": 0, "text": "ab", "finish_reason": "stop", "stop_reason": 7, "logprobs": None}]
    relayed = run(Relay(wanted), stream, [])[0]
    assert b'"timings":{"ms":1}' in relayed
    assert relayed.count(b'"system_fingerprint":"fp"') == 2


def test_choices_of_several_prompts_are_kept_apart_and_their_usage_is_added() -> None:
    usage = {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
    events: list[Any] = [None]  # llama.cpp begins so
    events += text_events(
        {"index": 1, "text": "x", "finish_reason": None}, {"index": 0, "text": "a", "finish_reason": None}
    )
    events += text_events({"index": 1, "text": "y", "finish_reason": "stop"}, usage=usage)
    events += text_events({"index": 0, "text": "", "finish_reason": "length"}, usage=usage)
    data, _, finish = run(
        Collector(Wanted(chat=False, model="m", fallback_id="f", prompts=2)), encoded(events, (",", ":"), False), []
    )
    body = json.loads(data)
    assert [(choice["index"], choice["text"]) for choice in body["choices"]] == [(0, "a"), (1, "xy")]
    assert finish.usage is not None
    assert (finish.usage.prompt_tokens, finish.usage.completion_tokens) == (4, 6)


def test_what_comes_after_the_final_chunk_of_a_choice_is_dropped() -> None:
    events = [*chat_events(["a"], False, "m"), *chat_events(["b"], False, "m")]
    data, _, _ = run(Relay(Wanted(chat=True, model="m", fallback_id="f")), encoded(events, (",", ":"), False), [])
    assert data.count(b'"finish_reason":"stop"') == 1
    assert b'"b"' not in data


def test_a_backend_without_id_and_created_gets_them() -> None:
    events = [{"choices": [{"delta": {"content": "a"}}]}, {"choices": [{"delta": {}, "finish_reason": "stop"}]}]
    data, _, _ = run(Relay(Wanted(chat=True, model="m", fallback_id="job_1")), encoded(events, (",", ":"), False), [])
    first = json.loads(data.split(b"\n\n")[0][6:])
    assert (first["id"], first["model"], first["object"]) == ("job_1", "m", "chat.completion.chunk")
    assert first["created"] > 0
    assert first["choices"] == [{"index": 0, "delta": {"role": "assistant", "content": "a"}, "finish_reason": None}]


def test_a_character_split_over_two_escapes_is_whole_again() -> None:
    frame = b'data: {"id":"a","created":5,"model":"m","choices":[{"index":0,"delta":{"content":"%b"},"finish_reason":%b}]}\n\n'
    stream = frame % (b"x", b"null") + frame % (rb"\ud83d", b"null") + frame % (rb"\ude00", b"null")
    stream += frame % (b"", b'"stop"') + b"data: [DONE]\n\n"
    data, _, _ = run(Collector(Wanted(chat=True, model="m", fallback_id="f")), stream, [])
    assert json.loads(data)["choices"][0]["message"]["content"] == "x😀"


def test_an_error_field_of_its_own_is_an_error() -> None:
    answer = Relay(Wanted(chat=True, model="m", fallback_id="f"))
    with pytest.raises(BackendError, match="it broke"):
        answer.feed(
            b'error: {"code":500,"message":"it broke","type":"server_error"}\n\n'.replace(b"{", b'{"error":{', 1)[:-2]
            + b"}\n\n"
        )


def test_an_endless_event_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = Relay(Wanted(chat=True, model="m", fallback_id="f"))
    monkeypatch.setattr(answer._splitter, "_limit", 1000)
    with pytest.raises(BackendError, match="larger"):
        answer.feed(b"data: " + b"x" * 2000)


def test_merging_keeps_what_comes_complete_and_joins_the_rest() -> None:
    into: dict[str, Any] = {"role": "assistant", "content": None, "list": [1]}
    merge(into, {"role": "assistant", "content": "a", "list": [2], "new": {"x": 1}, "n": 1})
    merge(into, {"content": "b", "new": {"x": 2, "y": "z"}, "n": None})
    assert into == {"role": "assistant", "content": "ab", "list": [1, 2], "new": {"x": 2, "y": "z"}, "n": 1}


def test_calls_are_merged_by_index_and_names_are_not_doubled() -> None:
    into: dict[str, Any] = {"tool_calls": [{"index": 1, "id": "b", "function": {"name": "g", "arguments": "{"}}]}
    merge(into, {"tool_calls": [{"index": 0, "id": "a", "function": {"name": "f", "arguments": ""}}]})
    merge(into, {"tool_calls": [{"index": 1, "id": "b", "function": {"name": "g", "arguments": "}"}}]})
    message = finished_choice({"index": 0, "delta": {"content": ""} | into, "finish_reason": "tool_calls"}, True)[
        "message"
    ]
    assert message["content"] is None
    assert [(call["id"], call["function"]["arguments"]) for call in message["tool_calls"]] == [("a", ""), ("b", "{}")]


def test_usage_of_a_server_that_counts_on_is_its_last_word() -> None:
    counting = [{"prompt_tokens": 2, "completion_tokens": n, "total_tokens": 2 + n} for n in range(5)]
    assert combined_usage(counting, 2, 2) == counting[-1]
    assert combined_usage([], 1, 1) is None
