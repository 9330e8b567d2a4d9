"""Reading a server's completion into the caller's, on bytes alone."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.adapter_kit.text.chunk_merge import combine_usage, finish_choice, merge_objects
from workers.adapter_kit.text.completion_collector import CompletionCollector
from workers.adapter_kit.text.completion_options import CompletionOptions
from workers.adapter_kit.text.completion_reader import CompletionReader
from workers.adapter_kit.text.completion_relay import CompletionRelay
from workers.backends.base import BackendError, Chunk, Finish, Output

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


def run(answer: CompletionReader, stream: bytes, cuts: list[int]) -> tuple[bytes, int, Finish]:
    edges = sorted({0, len(stream), *(cut % (len(stream) + 1) for cut in cuts)})
    outputs: list[Output | None] = [answer.feed(stream[start:end]) for start, end in pairwise(edges)]
    outputs += list(answer.finish())
    chunks = [output for output in outputs if isinstance(output, Chunk)]
    assert isinstance(outputs[-1], Finish)
    return b"".join(chunk.data for chunk in chunks), sum(chunk.tokens for chunk in chunks), outputs[-1]


@given(words, forms, st.booleans(), st.booleans(), st.sampled_from(["m", "other"]), st.lists(st.integers(0, 5000)))
def test_any_text_in_any_form_cut_anywhere_is_relayed(
    said: list[str], form: tuple[str, str], ascii_only: bool, order: bool, model: str, cuts: list[int]
) -> None:
    stream = encoded(chat_events(said, order, model), form, ascii_only)
    data, _, _ = run(CompletionRelay(CompletionOptions(chat=True, model="m", fallback_id="f")), stream, cuts)
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
    data, tokens, _ = run(CompletionCollector(CompletionOptions(chat=True, model="m", fallback_id="f")), stream, cuts)
    assert json.loads(data)["choices"][0]["message"]["content"] == "".join(said)
    assert tokens <= len(said)


def text_events(*choices: dict[str, Any], **rest: Any) -> list[Any]:
    return [{"id": "a", "created": 5, "model": "m", "choices": [choice], **rest} for choice in choices]


def test_plain_events_pass_as_they_are() -> None:
    stream = encoded(chat_events(["a", "b", "c"], False, "m")[:-1], (",", ":"), ascii_only=False)
    answer = CompletionRelay(CompletionOptions(chat=True, model="m", fallback_id="f"))
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
    wanted = CompletionOptions(chat=False, model="m", fallback_id="f")
    whole = json.loads(run(CompletionCollector(wanted), stream, [])[0])
    assert (whole["timings"], whole["system_fingerprint"], whole["object"]) == ({"ms": 1}, "fp", "text_completion")
    assert whole["choices"] == [{"index": 0, "text": "ab", "finish_reason": "stop", "stop_reason": 7, "logprobs": None}]
    relayed = run(CompletionRelay(wanted), stream, [])[0]
    assert b'"timings":{"ms":1}' in relayed
    assert relayed.count(b'"system_fingerprint":"fp"') == 3
    assert relayed.count(b'"stop_reason":7,"finish_reason":"stop"') == relayed.count(b'"stop_reason":7') == 1


def test_choices_of_several_prompts_are_kept_apart_and_their_usage_is_added() -> None:
    usage = {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
    events: list[Any] = [None]  # llama.cpp begins so
    events += text_events(
        {"index": 1, "text": "x", "finish_reason": None}, {"index": 0, "text": "a", "finish_reason": None}
    )
    events += text_events({"index": 1, "text": "y", "finish_reason": "stop"}, usage=usage)
    events += text_events({"index": 0, "text": "", "finish_reason": "length"}, usage=usage)
    data, _, finish = run(
        CompletionCollector(CompletionOptions(chat=False, model="m", fallback_id="f", prompts=2)),
        encoded(events, (",", ":"), False),
        [],
    )
    body = json.loads(data)
    assert [(choice["index"], choice["text"]) for choice in body["choices"]] == [(0, "a"), (1, "xy")]
    assert finish.usage is not None
    assert (finish.usage.prompt_tokens, finish.usage.completion_tokens) == (4, 6)


CHAT = CompletionOptions(chat=True, model="m", fallback_id="f")


def relayed(events: list[Any] | bytes) -> list[Any]:
    """Return the choices that a streaming caller reads."""
    stream = events if isinstance(events, bytes) else encoded(events, (",", ":"), ascii_only=False)
    frames = run(CompletionRelay(CHAT), stream, [])[0].split(b"\n\n")[:-1]
    return [json.loads(frame.removeprefix(b"data: ").decode()) for frame in frames]


def collected(events: list[Any] | bytes) -> Any:
    """Return the only choice that a caller without a stream reads."""
    stream = events if isinstance(events, bytes) else encoded(events, (",", ":"), ascii_only=False)
    return json.loads(run(CompletionCollector(CHAT), stream, [])[0].decode())["choices"][0]


def accumulated(events: list[Any]) -> dict[str, Any]:
    """Merge a stream as OpenAI's clients do: strings at the same place are added."""
    into: dict[str, Any] = {"content": "", "role": "", "calls": {}}
    for event in events:
        delta = event["choices"][0]["delta"]
        into["content"] += delta.get("content") or ""
        into["role"] += delta.get("role") or ""
        for call in delta.get("tool_calls") or ():
            one = into["calls"].setdefault(call["index"], ["", "", ""])
            function = call.get("function") or {}
            for at, piece in enumerate((call.get("id"), function.get("name"), function.get("arguments"))):
                one[at] += piece or ""
    return into


def delta_events(*deltas: dict[str, Any], reasons: dict[int, str] | None = None) -> list[Any]:
    """Return events with these deltas, and the `finish_reason` of some of them."""
    reasons = {len(deltas): "stop"} if reasons is None else reasons
    choices: list[dict[str, Any]] = [{"index": 0, "delta": delta, "finish_reason": None} for delta in (*deltas, {})]
    for at, reason in reasons.items():
        choices[at]["finish_reason"] = reason
    return text_events(*choices)


def tool(index: int | None = 0, id: str | None = "call_1", name: str | None = "find", arguments: Any = "") -> Any:  # noqa: A002
    """Return one entry of `tool_calls`; None leaves a field out."""
    function = {"name": name, "arguments": arguments}
    call = {"index": index, "id": id, "function": {key: value for key, value in function.items() if value is not None}}
    return {key: value for key, value in call.items() if value is not None}


def calls(*each: Any) -> dict[str, Any]:
    return {"tool_calls": list(each)}


class TestTheEnd:
    """The end of an answer: once, after its last text, with OpenAI's reason."""

    @pytest.mark.parametrize("reasons", [{0: "stop", 1: "stop", 2: "stop"}, {1: "stop"}, {0: "STOP", 2: "eos"}])
    def test_a_reason_before_the_last_text_cuts_nothing(self, reasons: dict[int, str]) -> None:
        events = delta_events({"content": "Red "}, {"content": "green "}, {"content": "blue"}, reasons=reasons)
        streamed = relayed(events)
        assert accumulated(streamed)["content"] == "Red green blue" == collected(events)["message"]["content"]
        assert [event["choices"][0]["finish_reason"] for event in streamed] == [None, None, None, "stop"]

    def test_a_second_answer_behind_the_first_is_its_continuation(self) -> None:
        events = [*chat_events(["a"], False, "m"), *chat_events(["b"], False, "m")]
        assert [event["choices"][0]["finish_reason"] for event in relayed(events)].count("stop") == 1
        assert accumulated(relayed(events)) == {"content": "ab", "role": "assistant", "calls": {}}

    def test_a_reason_ends_an_answer_without_done(self) -> None:
        stream = encoded(delta_events({"content": "fine"}), (",", ":"), False).removesuffix(b"data: [DONE]\n\n")
        assert relayed(stream)[-1]["choices"][0]["finish_reason"] == "stop"
        assert collected(stream)["message"]["content"] == "fine"

    def test_done_ends_an_answer_without_a_reason(self) -> None:
        events = delta_events({"content": "fine"}, {"content": " too"}, reasons={})
        assert relayed(events)[-1]["choices"][0]["finish_reason"] == "stop"
        assert (collected(events)["message"]["content"], collected(events)["finish_reason"]) == ("fine too", "stop")

    def test_a_whole_message_behind_the_deltas_is_not_said_again(self) -> None:
        """MiniMax's last chunk."""
        events = delta_events({"reasoning_content": "hm"}, *[{"content": word} for word in "abcde"], reasons={})
        message = {"role": "assistant", "content": "abcde", "reasoning_content": "hm", "refusal": "no"}
        del events[-1]["choices"][0]["delta"]
        events[-1]["choices"][0] |= {"message": message, "finish_reason": "stop"}
        assert accumulated(relayed(events))["content"] == "abcde" == collected(events)["message"]["content"]
        whole = collected(events)["message"]
        assert (whole["reasoning_content"], whole["refusal"]) == ("hm", "no")

    @pytest.mark.parametrize("words", ["", "a", "abc"])
    @pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")])
    def test_a_whole_message_behind_a_role_is_the_answer(self, words: str, separators: tuple[str, str]) -> None:
        """Its texts are sent once, whether they came before it, unparsed, or did not."""
        events = delta_events({"role": "assistant", "content": ""}, *[{"content": word} for word in words], reasons={})
        del events[-1]["choices"][0]["delta"]
        message = {"role": "assistant", "content": words or "all"}
        events[-1]["choices"][0] |= {"message": message, "finish_reason": "stop"}
        stream = encoded(events, separators, False)
        one_by_one = [len(stream[: at + 2]) for at in range(len(stream)) if stream[at : at + 2] == b"\n\n"]
        frames = run(CompletionRelay(CHAT), stream, one_by_one)[0].split(b"\n\n")[:-1]
        assert accumulated([json.loads(frame[6:]) for frame in frames])["content"] == (words or "all")
        assert accumulated(relayed(stream))["content"] == (words or "all") == collected(stream)["message"]["content"]

    def test_messages_in_place_of_deltas_are_pieces(self) -> None:
        events = text_events(*({"index": 0, "message": {"content": word}} for word in "aab"))
        assert accumulated(relayed(events))["content"] == "aab" == collected(events)["message"]["content"]

    @pytest.mark.parametrize("nothing", [b"data:  \n\n", b"data: \t\n\n", b"data:\n\n"])
    def test_blank_events_are_nothing(self, nothing: bytes) -> None:
        stream = nothing + encoded(delta_events({"content": "fine"}), (",", ":"), False)
        assert accumulated(relayed(stream))["content"] == "fine" == collected(stream)["message"]["content"]

    @pytest.mark.parametrize("empty", [None, {}, ""])
    def test_an_empty_error_is_none(self, empty: Any) -> None:
        """OpenAI's client for JavaScript throws at `{}`."""
        events = [event | {"error": empty} for event in delta_events({"content": "a"}, {"content": "b"})]
        assert not any("error" in event for event in relayed(events))
        assert collected(events)["message"]["content"] == "ab"

    def test_neither_is_no_end(self) -> None:
        stream = encoded(delta_events({"content": "fi"}, reasons={}), (",", ":"), False).removesuffix(
            b"data: [DONE]\n\n"
        )
        for answer in (CompletionRelay(CHAT), CompletionCollector(CHAT)):
            with pytest.raises(BackendError, match="before it was complete"):
                run(answer, stream, [])

    @pytest.mark.parametrize("torn", [b'data: {"id":"c1","choi', b"data: [DO", b"dat"])
    @pytest.mark.parametrize("kind", [CompletionRelay, CompletionCollector])
    def test_an_event_cut_off_behind_a_complete_answer_is_nothing(
        self, kind: type[CompletionReader], torn: bytes
    ) -> None:
        answer = kind(CHAT)
        stream = encoded(delta_events({"content": "fine"}), (",", ":"), False).removesuffix(b"data: [DONE]\n\n")
        outputs = [answer.feed(stream + torn), answer.feed_end(), *answer.finish()]
        data = b"".join(output.data for output in outputs if isinstance(output, Chunk))
        assert answer.is_complete
        assert data.count(b'"finish_reason":"stop"') == 1
        assert b"fine" in data

    @pytest.mark.parametrize("kind", [CompletionRelay, CompletionCollector])
    def test_an_event_cut_off_behind_text_is_an_error(self, kind: type[CompletionReader]) -> None:
        """Some servers put a reason into every event: one beside the last text does not end the answer."""
        answer = kind(CHAT)
        events = delta_events({"content": "fi"}, {"content": "ne"}, reasons={0: "stop", 1: "stop"})[:-1]
        stream = b"".join(b"data: %b\n\n" % json.dumps(event).encode() for event in events)
        answer.feed(stream + b'data: {"id":"c1","choi')
        assert not answer.is_complete
        with pytest.raises(BackendError, match="not JSON"):
            answer.feed_end()

    @pytest.mark.parametrize(
        ("said", "reason"),
        [("stop", "tool_calls"), ("tool_use", "tool_calls"), ("length", "length"), ("MAX_TOKENS", "length")],
    )
    def test_reasons_are_those_of_openai(self, said: str, reason: str) -> None:
        events = delta_events(calls(tool(arguments="{}")), reasons={1: said})
        assert relayed(events)[-1]["choices"][0]["finish_reason"] == reason == collected(events)["finish_reason"]


class TestToolCalls:
    """Tool calls are as OpenAI sends them, in whatever form a server does."""

    @pytest.mark.parametrize(
        ("deltas", "expected"),
        [
            ([calls(tool(id="a", arguments='{"q":1}')), calls(tool(id="b", name="g", arguments="{}"))], [("a", "find", '{"q":1}'), ("b", "g", "{}")]),
            ([calls(tool(arguments='{"q":')), calls(tool(arguments='"tea"}'))], [("call_1", "find", '{"q":"tea"}')]),
            ([calls(tool(arguments='{"q":')), calls(tool(id=None, name=None, arguments="1}"))], [("call_1", "find", '{"q":1}')]),
            ([calls(tool(arguments='{"q":')), calls(tool(id="", name="", arguments="1}"))], [("call_1", "find", '{"q":1}')]),
            ([calls(tool(arguments='{"q":')), calls(tool(id=None, arguments="1}"))], [("call_1", "find", '{"q":1}')]),
            ([calls(tool(id="a")), calls(tool(id="b", name=None, arguments='{"q":')), calls(tool(id="c", name="", arguments="1}"))], [("a", "find", '{"q":1}')]),
            ([calls(tool(id="a", arguments='{"q":1}')), calls(tool(id="b", name=None, arguments='{"q":2}'))], [("a", "find", '{"q":1}'), ("b", "find", '{"q":2}')]),
            ([calls(tool(arguments=" "))], [("call_1", "find", " {}")]),
            ([calls(tool(arguments={"q": "tea"}))], [("call_1", "find", '{"q":"tea"}')]),
            ([calls(tool(arguments={"q": "tea"})), calls(tool(arguments={"q": "tea"}))], [("call_1", "find", '{"q":"tea"}')]),
            ([calls(tool(arguments=None))], [("call_1", "find", "{}")]),
            ([calls(tool(arguments=""))], [("call_1", "find", "{}")]),
            ([calls(tool(name="fi")), calls(tool(id=None, name="nd")), calls(tool(id=None, name=None, arguments="{}"))], [("call_1", "find", "{}")]),
            ([calls(tool(index=None, id=None, arguments="{}")), calls(tool(index=None, id=None, arguments='{"q":2}'))], [("*", "find", "{}"), ("*", "find", '{"q":2}')]),
            ([calls(tool(id=None, arguments="{}")), calls(tool(id=None, name="g", arguments="{}"))], [("*", "find", "{}"), ("*", "g", "{}")]),
            ([calls(tool(id="f", arguments="{}"), tool(index=1, id="f", arguments='{"q":2}'))], [("f", "find", "{}"), ("*", "find", '{"q":2}')]),
            ([calls(tool(index=3, arguments="{}")), calls(tool(index=7, id="b", arguments="{}"))], [("call_1", "find", "{}"), ("b", "find", "{}")]),
        ],
    )  # fmt: skip
    def test_each_way_to_send_them(self, deltas: list[Any], expected: list[tuple[str, str, str]]) -> None:
        """`*` stands for an id that the server did not give, or gave twice."""
        events = delta_events(*deltas)
        streamed = accumulated(relayed(events))["calls"]
        assert list(streamed) == list(range(len(expected)))
        whole = [
            (c["id"], c["function"]["name"], c["function"]["arguments"])
            for c in collected(events)["message"]["tool_calls"]
        ]
        for got in ([tuple(one) for one in streamed.values()], whole):
            assert len({one[0] for one in got}) == len(got)
            assert all(one[0] for one in got)
            assert [(a[0] if b[0] != "*" else "*", *a[1:]) for a, b in zip(got, expected, strict=True)] == expected

    def test_no_call_has_a_first_delta_without_what_it_is(self) -> None:
        first = relayed(delta_events(calls(tool(index=None, id=None))))[0]["choices"][0]["delta"]["tool_calls"][0]
        assert first["id"].startswith("call_")
        assert (first["index"], first["type"], first["function"]) == (0, "function", {"name": "find", "arguments": ""})

    def test_calls_that_are_no_list_are_none(self) -> None:
        events = delta_events({"content": "a", "tool_calls": {}}, {"content": "b", "tool_calls": [None, "x"]})
        assert "tool_calls" not in collected(events)["message"]
        assert accumulated(relayed(events)) == {"content": "ab", "role": "assistant", "calls": {}}


def raw_event(text: bytes, name: bytes = b"content", reason: bytes = b"null") -> bytes:
    piece = b'{"id":"a","created":5,"model":"m","choices":[{"index":0,"delta":{"%b":"%b"},"finish_reason":%b}]}'
    return b"data: " + piece % (name, text, reason) + b"\n\n"


class TestCharacters:
    """Characters that are cut between two events are joined or replaced, never broken, never an error."""

    @pytest.mark.parametrize("before", [0, 1, 5])
    @pytest.mark.parametrize("name", ["content", "reasoning_content"])
    @pytest.mark.parametrize(
        ("pieces", "text"),
        [
            ((rb"\ud83d", rb"\ude00"), "😀"),
            ((rb"\uD83D", rb"\uDE00 x"), "😀 x"),
            ((rb"\ud83d", rb"\udc80"), "💀"),
            (("😀".encode()[:1], "😀".encode()[1:]), "😀"),
            (("😀".encode()[:3], "😀".encode()[3:] + b" x"), "😀 x"),
            (("é".encode()[:1], "é".encode()[1:] + rb"\ud83d", rb"\ude00"), "é😀"),
            ((rb"\ud83d", b"x"), "\ufffdx"),
            ((b"\xff", b"x"), "\ufffdx"),
            ((rb"x\udc00", b"y"), "x\ufffdy"),
        ],
    )
    def test_are_whole(self, pieces: tuple[bytes, ...], text: str, name: str, before: int) -> None:
        stream = raw_event(b"", b"role") + b"".join(raw_event(b"%d" % at, name.encode()) for at in range(before))
        stream += b"".join(raw_event(piece, name.encode()) for piece in pieces)
        stream += raw_event(b"", reason=b'"stop"') + b"data: [DONE]\n\n"
        expected = "".join(map(str, range(before))) + text
        assert "".join(event["choices"][0]["delta"].get(name) or "" for event in relayed(stream)) == expected
        assert collected(stream)["message"][name] == expected

    def test_a_half_at_the_end_is_replaced(self) -> None:
        stream = raw_event(b"a") + raw_event(b"b") + raw_event(rb"\ud83d") + b"data: [DONE]\n\n"
        assert accumulated(relayed(stream))["content"] == "ab\ufffd" == collected(stream)["message"]["content"]

    def test_a_half_at_the_end_of_thoughts_is_replaced(self) -> None:
        stream = raw_event(rb"a\ud83d", b"reasoning_content") + raw_event(b"b") + b"data: [DONE]\n\n"
        assert collected(stream)["message"]["reasoning_content"] == "a\ufffd"
        thoughts = [event["choices"][0]["delta"].get("reasoning_content") or "" for event in relayed(stream)]
        assert "".join(thoughts) == "a\ufffd"

    @pytest.mark.parametrize("first", [rb"\ud83d", "😀".encode()[:2]])
    def test_a_half_in_an_event_of_another_form_joins_what_follows(self, first: bytes) -> None:
        """Unparsed events precede it."""
        second = rb"\ude00" if first == rb"\ud83d" else "😀".encode()[2:]
        other = raw_event(first).replace(b'"delta"', b' "delta"')
        stream = raw_event(b"", b"role") + raw_event(b"a") * 4 + other + raw_event(second) + raw_event(b"b")
        stream += b"data: [DONE]\n\n"
        assert accumulated(relayed(stream))["content"] == "aaaa😀b" == collected(stream)["message"]["content"]

    def test_control_characters_are_those_of_the_text(self) -> None:
        stream = raw_event(b"a\tb") + raw_event(b"", reason=b'"stop"') + b"data: [DONE]\n\n"
        assert accumulated(relayed(stream))["content"] == "a\tb" == collected(stream)["message"]["content"]


@given(words, st.integers(0, 3), st.lists(st.integers(0, 5000)))
def test_roles_in_every_delta_are_said_once(said: list[str], spaced: int, cuts: list[int]) -> None:
    """This holds on the slow path and the fast one: clients add strings."""
    deltas = [{"role": "assistant", "content": word} for word in said]
    form = (", ", ": ") if spaced % 2 else (",", ":")
    data = run(CompletionRelay(CHAT), encoded(delta_events(*deltas), form, ascii_only=spaced > 1), cuts)[0]
    events = [json.loads(frame.removeprefix(b"data: ")) for frame in data.split(b"\n\n")[:-1]]
    assert accumulated(events) == {"content": "".join(said), "role": "assistant", "calls": {}}


def test_usage_in_every_event_is_for_who_asked() -> None:
    usage = [{"prompt_tokens": 3, "completion_tokens": n, "total_tokens": 3 + n} for n in (1, 2, 3)]
    events = delta_events(*({"content": text} for text in "abc"))
    for event, one in zip(events, [*usage, usage[-1]], strict=True):
        event["usage"] = one
    stream = encoded(events, (",", ":"), ascii_only=False)

    def usages_of(wanted: CompletionOptions) -> list[Any]:
        frames = run(CompletionRelay(wanted), stream, [])[0].split(b"\n\n")[:-1]
        return [json.loads(frame.removeprefix(b"data: ")).get("usage") for frame in frames]

    assert usages_of(CompletionOptions(True, "m", "f", include_usage=True)) == [None, None, None, None, usage[-1]]
    assert usages_of(CompletionOptions(True, "m", "f", include_usage=True, continuous_usage=True))[:3] == usage


def test_a_backend_without_id_and_created_gets_them() -> None:
    events = [{"choices": [{"delta": {"content": "a"}}]}, {"choices": [{"delta": {}, "finish_reason": "stop"}]}]
    data, _, _ = run(
        CompletionRelay(CompletionOptions(chat=True, model="m", fallback_id="job_1")),
        encoded(events, (",", ":"), False),
        [],
    )
    first = json.loads(data.split(b"\n\n")[0][6:])
    assert (first["id"], first["model"], first["object"]) == ("job_1", "m", "chat.completion.chunk")
    assert first["created"] > 0
    assert first["choices"] == [{"index": 0, "delta": {"role": "assistant", "content": "a"}, "finish_reason": None}]


def test_a_character_split_over_two_escapes_is_whole_again() -> None:
    frame = b'data: {"id":"a","created":5,"model":"m","choices":[{"index":0,"delta":{"content":"%b"},"finish_reason":%b}]}\n\n'
    stream = frame % (b"x", b"null") + frame % (rb"\ud83d", b"null") + frame % (rb"\ude00", b"null")
    stream += frame % (b"", b'"stop"') + b"data: [DONE]\n\n"
    data, _, _ = run(CompletionCollector(CompletionOptions(chat=True, model="m", fallback_id="f")), stream, [])
    assert json.loads(data)["choices"][0]["message"]["content"] == "x😀"


def test_an_error_field_of_its_own_is_an_error() -> None:
    answer = CompletionRelay(CompletionOptions(chat=True, model="m", fallback_id="f"))
    with pytest.raises(BackendError, match="it broke"):
        answer.feed(
            b'error: {"code":500,"message":"it broke","type":"server_error"}\n\n'.replace(b"{", b'{"error":{', 1)[:-2]
            + b"}\n\n"
        )


def test_an_endless_event_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = CompletionRelay(CompletionOptions(chat=True, model="m", fallback_id="f"))
    monkeypatch.setattr(answer._splitter, "_limit", 1000)
    with pytest.raises(BackendError, match="larger"):
        answer.feed(b"data: " + b"x" * 2000)


def test_merging_keeps_what_comes_complete_and_joins_the_rest() -> None:
    into: dict[str, Any] = {"role": "assistant", "content": None, "list": [1]}
    merge_objects(into, {"role": "assistant", "content": "a", "list": [2], "new": {"x": 1}, "n": 1})
    merge_objects(into, {"content": "b", "new": {"x": 2, "y": "z"}, "n": None})
    assert into == {"role": "assistant", "content": "ab", "list": [1, 2], "new": {"x": 2, "y": "z"}, "n": 1}


def test_calls_are_merged_by_index_and_names_are_not_doubled() -> None:
    into: dict[str, Any] = {"tool_calls": [{"index": 1, "id": "b", "function": {"name": "g", "arguments": "{"}}]}
    merge_objects(into, {"tool_calls": [{"index": 0, "id": "a", "function": {"name": "f", "arguments": ""}}]})
    merge_objects(into, {"tool_calls": [{"index": 1, "id": "b", "function": {"name": "g", "arguments": "}"}}]})
    message = finish_choice({"index": 0, "delta": {"content": ""} | into, "finish_reason": "tool_calls"}, True)[
        "message"
    ]
    assert message["content"] is None
    assert [(call["id"], call["function"]["arguments"]) for call in message["tool_calls"]] == [("a", ""), ("b", "{}")]


@pytest.mark.parametrize("n", [1, 3])
def test_usage_in_every_event_is_not_held(n: int) -> None:
    """The last usage that counts is the answer's; a long answer needs no more memory for the others."""
    answer = CompletionRelay(CompletionOptions(True, "m", "job", include_usage=True, n=n, stream=True))
    counts = [*range(1, 500), 0]
    for number, count in enumerate(counts):
        usage = {"prompt_tokens": count and 2, "completion_tokens": count, "total_tokens": count and count + 2}
        choice = {"index": number % n, "delta": {"content": "a"}, "finish_reason": None}
        answer.feed(b"data: %b\n\n" % json.dumps({"choices": [choice], "usage": usage}).encode())
    assert len(answer._usages) <= n + 1
    answer.feed(b"data: [DONE]\n\n")
    *_, finish = answer.finish()
    assert isinstance(finish, Finish)
    assert finish.usage is not None
    assert finish.usage.completion_tokens == 499


def test_usage_of_a_server_that_counts_on_is_its_last_word() -> None:
    counting = [{"prompt_tokens": 2, "completion_tokens": n, "total_tokens": 2 + n} for n in range(5)]
    assert combine_usage(counting, 2, 2) == counting[-1]
    assert combine_usage([], 1, 1) is None
