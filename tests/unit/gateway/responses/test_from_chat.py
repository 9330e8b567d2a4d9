"""A chat stream becomes a response's events and the final response, the same each time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from gateway.http.request_body import validate_body
from gateway.responses.from_chat import ResponseBuilder, ResponseEvent
from gateway.responses.resource import error_object, initial_response, unanswered_response
from schemas.errors import BackendFailed, ErrorInfo, InvalidRequest, QueueFull
from schemas.jobs import JobStatus
from schemas.openai.responses import ResponsesRequest

JOB = "job_" + "0" * 31 + "1"
USAGE = {
    "prompt_tokens": 5,
    "completion_tokens": 7,
    "total_tokens": 12,
    "prompt_tokens_details": {"cached_tokens": 2},
    "completion_tokens_details": {"reasoning_tokens": 3},
}
ANY_EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def began_as(**fields: Any) -> dict[str, Any]:
    return initial_response(validate_body({"model": "m", "input": "hi"} | fields, ResponsesRequest), JOB, 1_800_000_000)


def frame(delta: Any = None, *, finish: str | None = None, usage: Any = None, **choice: Any) -> bytes:
    chunk: dict[str, Any] = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "usage": usage}
    chunk["choices"] = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish, **choice}]
    return b"data: " + orjson.dumps(chunk) + b"\n\n"


def said(*words: str, finish: str = "stop") -> list[bytes]:
    return [
        frame({"role": "assistant", "content": ""}),
        *(frame({"content": outcome}) for outcome in words),
        frame({}, finish=finish),
        frame(usage=USAGE),
    ]


def called(index: int, **pieces: Any) -> bytes:
    function = {name: pieces[name] for name in ("name", "arguments") if name in pieces}
    call: dict[str, Any] = {"index": index, "function": function}
    if "id" in pieces:
        call |= {"id": pieces["id"], "type": "function"}
    return frame({"tool_calls": [call]})


def answer(frames: Iterable[bytes], **fields: Any) -> tuple[list[ResponseEvent], dict[str, Any]]:
    builder = ResponseBuilder(began_as(**fields))
    events = [*builder.created_events(), *builder.in_progress_events()]
    for one in frames:
        events += builder.add_frames(one)
    events += builder.close_items()
    final = builder.final_response(1_800_000_009)
    events.append(builder.final_event(final))
    for event in events:
        ANY_EVENT.validate_python(event.body)  # the SDK's own words for it
        assert event.encode() == b"event: %b\ndata: %b\n\n" % (event.kind.encode(), orjson.dumps(event.body))
    Response.model_validate(final)
    assert [event.number for event in events] == list(range(len(events)))
    assert [event.body["sequence_number"] for event in events] == list(range(len(events)))
    return events, final


def kinds(events: list[ResponseEvent]) -> list[str]:
    return [event.kind.removeprefix("response.") for event in events]


TEXT = ["output_item.added", "content_part.added", "output_text.delta"]
TEXT_END = ["output_text.done", "content_part.done", "output_item.done"]


class TestText:
    def test_the_order_of_events(self) -> None:
        """OpenAI's order, each event once."""
        events, final = answer(said("Hello", " you"))
        assert kinds(events) == ["created", "in_progress", *TEXT, "output_text.delta", *TEXT_END, "completed"]
        item = f"msg_{'0' * 31}1_0"
        assert [event.body["item_id"] for event in events if "item_id" in event.body] == [item] * 5
        assert [event.body["delta"] for event in events if "delta" in event.body] == ["Hello", " you"]
        assert events[2].body["item"] == {
            "id": item,
            "type": "message",
            "status": "in_progress",
            "role": "assistant",
            "content": [],
        }
        assert events[3].body["part"]["text"] == ""
        assert final["output"] == [events[-2].body["item"]]
        assert final["output"][0]["status"] == "completed"
        assert final["output"][0]["content"][0]["text"] == "Hello you"
        assert (final["status"], final["completed_at"]) == ("completed", 1_800_000_009)

    def test_usage(self) -> None:
        """Usage has the field names of the Responses API; no count is invented."""
        assert answer(said("a"))[1]["usage"] == {
            "input_tokens": 5,
            "input_tokens_details": {"cached_tokens": 2, "cache_write_tokens": 0},
            "output_tokens": 7,
            "output_tokens_details": {"reasoning_tokens": 3},
            "total_tokens": 12,
        }
        assert answer([frame({"content": "a"}, finish="stop")])[1]["usage"] is None
        builder = ResponseBuilder(began_as())
        builder.add_frames(frame({"content": "a"}, finish="stop"))
        builder.close_items({"prompt_tokens": 1, "completion_tokens": 2})
        assert builder.final_response(1)["usage"]["total_tokens"] == 3

    @pytest.mark.parametrize(
        ("finish", "reason"), [("length", "max_output_tokens"), ("content_filter", "content_filter")]
    )
    def test_an_end_that_is_none(self, finish: str, reason: str) -> None:
        """A cut answer is incomplete, and so is its last item."""
        events, final = answer(said("a", finish=finish))
        assert kinds(events)[-1] == "incomplete"
        assert (final["status"], final["incomplete_details"]) == ("incomplete", {"reason": reason})
        assert final["output"][0]["status"] == "incomplete"
        assert final["completed_at"] is None

    def test_an_empty_answer(self) -> None:
        """An answer of nothing is a message with an empty text."""
        events, final = answer(said())
        assert kinds(events) == ["created", "in_progress", *TEXT[:2], *TEXT_END, "completed"]
        assert final["output"][0]["content"][0]["text"] == ""

    def test_a_refusal(self) -> None:
        """A refusal is a separate part after the preceding text."""
        events, final = answer([frame({"content": "well"}), frame({"refusal": "no"}), frame({}, finish="stop")])
        assert kinds(events) == [
            "created",
            "in_progress",
            *TEXT,
            *TEXT_END[:2],
            "content_part.added",
            "refusal.delta",
            "refusal.done",
            "content_part.done",
            "output_item.done",
            "completed",
        ]
        assert final["output"][0]["content"][1] == {"type": "refusal", "refusal": "no"}

    def test_reasoning(self) -> None:
        """Thoughts are an item before the message, by either of the names that servers have for them."""
        frames = [
            frame({"reasoning_content": "let"}),
            frame({"reasoning": " me"}),
            frame({"content": "42"}),
            frame({}, finish="stop"),
        ]
        events, final = answer(frames)
        assert kinds(events) == [
            "created",
            "in_progress",
            "output_item.added",
            "content_part.added",
            "reasoning_text.delta",
            "reasoning_text.delta",
            "reasoning_text.done",
            "content_part.done",
            "output_item.done",
            *TEXT,
            *TEXT_END,
            "completed",
        ]
        assert [item["type"] for item in final["output"]] == ["reasoning", "message"]
        assert final["output"][0]["content"] == [{"type": "reasoning_text", "text": "let me"}]
        assert [event.body["output_index"] for event in events if "output_index" in event.body] == [0] * 7 + [1] * 6

    def test_logprobs(self) -> None:
        """Log probabilities come with the text they belong to."""
        token = {"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": []}
        events, final = answer([frame({"content": "a"}, logprobs={"content": [token]}), frame({}, finish="stop")])
        assert [e.body["logprobs"] for e in events if e.kind == "response.output_text.delta"] == [[token]]
        assert final["output"][0]["content"][0]["logprobs"] == [token]

    def test_background(self) -> None:
        """A background response is queued first."""
        events, final = answer(said("a"), background=True)
        assert kinds(events)[:3] == ["created", "queued", "in_progress"]
        assert [event.body["response"]["status"] for event in events[:3]] == ["queued", "queued", "in_progress"]
        assert final["background"] is True

    def test_what_is_no_stream(self) -> None:
        """Comments and `[DONE]` are passed over; nonsense is the server's error."""
        builder = ResponseBuilder(began_as())
        assert builder.add_frames(b": ping\n\ndata: [DONE]\n\n") == []
        assert kinds(builder.add_frames(b": ping\n" + frame({"content": "a"}) + frame({"content": "b"}))) == [
            "in_progress",
            *TEXT,
            "output_text.delta",
        ]
        for nonsense in (b"data: {\n\n", b"data: 5\n\n"):
            with pytest.raises(BackendFailed):
                builder.add_frames(nonsense)


class TestCalls:
    def test_a_call_in_pieces(self) -> None:
        """Arguments come as they are made, and whole at the end."""
        frames = [
            called(0, id="c1", name="f", arguments=""),
            called(0, arguments='{"a"'),
            called(0, arguments=":1}"),
            frame({}, finish="tool_calls"),
        ]
        events, final = answer(frames)
        assert kinds(events) == [
            "created",
            "in_progress",
            "output_item.added",
            "function_call_arguments.delta",
            "function_call_arguments.delta",
            "function_call_arguments.done",
            "output_item.done",
            "completed",
        ]
        assert final["output"] == [
            {
                "id": f"fc_{'0' * 31}1_0",
                "type": "function_call",
                "status": "completed",
                "call_id": "c1",
                "name": "f",
                "arguments": '{"a":1}',
            }
        ]

    def test_parallel_calls_in_turns(self) -> None:
        """Pieces of several calls may come in turns; each call is whole, in the order in which they began."""
        frames = [
            frame({"content": "I look"}),
            called(0, id="a", name="f", arguments="{"),
            called(1, id="b", name="g", arguments="["),
            called(0, arguments="}"),
            called(1, arguments="]"),
            frame({}, finish="tool_calls"),
        ]
        events, final = answer(frames)
        assert [item.get("arguments") for item in final["output"]] == [None, "{}", "[]"]
        assert [item["id"].rpartition("_")[2] for item in final["output"]] == ["0", "1", "2"]
        # The message ends before the first call begins.
        assert kinds(events).index("output_item.done") < kinds(events).index("function_call_arguments.delta")

    def test_all_at_once(self) -> None:
        """Some servers send a call in one piece, without an index, or without arguments."""
        calls = [{"id": name, "type": "function", "function": {"name": name}} for name in ("f", "g")]
        calls[0]["function"] = {"name": "f", "arguments": '{"a":1}'}
        events, final = answer([frame({"tool_calls": calls}), frame({}, finish="tool_calls")])
        assert [(item["name"], item["arguments"]) for item in final["output"]] == [("f", '{"a":1}'), ("g", "{}")]
        deltas = [event.body["delta"] for event in events if "delta" in event.body]
        assert deltas == ['{"a":1}', "{}"]

    def test_a_late_name_and_no_id(self) -> None:
        """A call has no events before its name; a missing id is derived deterministically."""
        frames = [called(0, arguments="{"), called(0, name="f", arguments="}"), frame({}, finish="tool_calls")]
        _, final = answer(frames)
        assert (final["output"][0]["name"], final["output"][0]["arguments"]) == ("f", "{}")
        assert final["output"][0]["call_id"] == f"call_{'0' * 31}1_0"

    def test_a_call_that_is_cut(self) -> None:
        """Of several calls the last one is incomplete; half of its arguments is all there is."""
        frames = [
            called(0, id="a", name="f", arguments="{}"),
            called(1, id="b", name="g", arguments="{"),
            frame({}, finish="length"),
        ]
        _, final = answer(frames)
        assert [item["status"] for item in final["output"]] == ["completed", "incomplete"]
        assert final["output"][1]["arguments"] == "{"


PIECES = st.one_of(
    st.text(max_size=8).map(lambda text: frame({"content": text})),
    st.text(max_size=8).map(lambda text: frame({"reasoning_content": text})),
    st.text(max_size=8).map(lambda text: frame({"refusal": text})),
    st.tuples(st.integers(0, 2), st.text(max_size=5)).map(
        lambda call: called(call[0], id=f"c{call[0]}", name="f", arguments=call[1])
    ),
)


class TestAnyStream:
    @given(st.lists(PIECES, max_size=25), st.sampled_from(["stop", "tool_calls", "length", "content_filter"]))
    def test_deltas_add_up(self, pieces: list[bytes], finish: str) -> None:
        """For any stream, the deltas add up to the final events and the final response."""
        events, final = answer([*pieces, frame({}, finish=finish)])
        told: dict[tuple[Any, ...], str] = {}
        whole: dict[tuple[Any, ...], str] = {}
        for event in events:
            body = event.body
            place = (body.get("output_index"), body.get("content_index"))
            if event.kind.endswith(".delta"):
                told[place] = told.get(place, "") + body["delta"]
            elif event.kind.endswith(("text.done", "refusal.done", "arguments.done")):
                whole[place] = next(body[name] for name in ("text", "refusal", "arguments") if name in body)
        held: dict[tuple[Any, ...], str] = {}
        for index, item in enumerate(final["output"]):
            if item["type"] == "function_call":
                held[index, None] = item["arguments"]
            for at, part in enumerate(item.get("content", ())):
                held[index, at] = part.get("text", part.get("refusal"))
        assert whole == held
        assert {place: text for place, text in whole.items() if text} == told
        added = [event.body["item"]["id"] for event in events if event.kind == "response.output_item.added"]
        done = [event.body["item"] for event in events if event.kind == "response.output_item.done"]
        assert added == [item["id"] for item in final["output"]]
        assert sorted(done, key=lambda item: added.index(item["id"])) == final["output"]

    @given(st.lists(PIECES, max_size=12), st.data())
    def test_the_same_each_time(self, pieces: list[bytes], data: Any) -> None:
        """Cut into other pieces of whole frames, the stream gives the same events."""
        frames = [*pieces, *said("x")]
        joined, rest = [], list(frames)
        while rest:
            count = data.draw(st.integers(1, len(rest)))
            joined.append(b"".join(rest[:count]))
            rest = rest[count:]
        assert answer(frames) == answer(joined)


class TestWithoutAnswer:
    def test_failed(self) -> None:
        """A failure has one of OpenAI's codes."""
        info = BackendFailed("out of memory").info
        final = unanswered_response(began_as(), JobStatus.FAILED, info)
        assert (final["status"], final["output"]) == ("failed", [])
        assert final["error"] == {"code": "server_error", "message": "out of memory"}
        Response.model_validate(final)
        builder = ResponseBuilder(began_as())
        builder.created_events()
        assert builder.final_event(final).kind == "response.failed"
        assert error_object(InvalidRequest("x").info)["code"] == "invalid_prompt"
        assert error_object(QueueFull("x").info)["code"] == "rate_limit_exceeded"

    def test_cancelled_and_expired(self) -> None:
        """Cancelled is no error; one that waited too long has failed."""
        cancelled = unanswered_response(began_as(), JobStatus.CANCELLED, InvalidRequest("x").info)
        assert (cancelled["status"], cancelled["error"]) == ("cancelled", None)
        late = ErrorInfo(status=504, type="timeout_error", message="too late")
        expired = unanswered_response(began_as(), JobStatus.EXPIRED, late)
        assert (expired["status"], expired["error"]["message"]) == ("failed", "too late")
