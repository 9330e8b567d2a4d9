"""The translation of chat answers into messages: whole, and as the events of a stream."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.dialects.anthropic.blocks import MAX_BLOCKS
from gateway.dialects.anthropic.from_chat import AnswerFacts, MessageStream, message_of
from schemas.errors import BackendFailed

USAGE: Any = {
    "prompt_tokens": 10,
    "completion_tokens": 5,
    "prompt_tokens_details": {"cached_tokens": 4},
    "completion_tokens_details": {"reasoning_tokens": 2},
}
COUNTED = {
    "input_tokens": 6,
    "cache_creation_input_tokens": 0,
    "cache_read_input_tokens": 4,
    "output_tokens": 5,
    "output_tokens_details": {"thinking_tokens": 2},
}
SHOWN = AnswerFacts()


def call(index: int | None = None, arguments: str = "", **fields: Any) -> dict[str, Any]:
    name = {"name": fields.pop("name")} if "name" in fields else {}
    piece: dict[str, Any] = {"function": {**name, "arguments": arguments}, **fields}
    return piece if index is None else {"index": index, **piece}


def whole(facts: AnswerFacts = SHOWN, finish: str = "stop", **said: Any) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", **said}, "finish_reason": finish}
    return message_of({"model": "m", "choices": [choice], "usage": USAGE}, "msg_1", facts)


def stream(*deltas: Any, finish: str = "stop", facts: AnswerFacts = SHOWN, **final: Any) -> list[dict[str, Any]]:
    made = MessageStream("msg_1", facts)
    chunks: list[Any] = [{"choices": [{"index": 0, "delta": delta}]} for delta in deltas]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": finish, **final}]})
    chunks.append({"choices": [], "usage": USAGE})
    return [event for chunk in chunks for event in made.add({"model": "m", **chunk})] + made.end()


def blocks(events: list[dict[str, Any]]) -> list[list[str]]:
    """Return what each block is and says, checking that one at a time is open."""
    found: list[list[str]] = []
    for event in events:
        if event["type"] == "content_block_start":
            assert event["index"] == len(found)
            found.append([event["content_block"]["type"]])
        elif event["type"] == "content_block_delta":
            assert event["index"] == len(found) - 1
            kind, text = event["delta"].values()
            found[-1].append(f"{kind.removesuffix('_delta')}:{text}")
        elif event["type"] == "content_block_stop":
            assert event["index"] == len(found) - 1
    return found


class TestWhole:
    def test_text(self) -> None:
        """A text is one block, with the reason of its end and the usage."""
        assert whole(content="hello") == {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "model": "m",
            "content": [{"type": "text", "text": "hello"}],
            "stop_reason": "end_turn",
            "stop_sequence": None,
            "usage": COUNTED,
        }

    def test_thoughts_and_calls(self) -> None:
        """Thoughts come first, then the text, then the calls with their arguments as objects."""
        calls = [call(id="t1", name="f", arguments='{"a":1}'), call(id="t2", name="g", arguments="{")]
        content = whole(finish="tool_calls", reasoning_content="hm", content="so", tool_calls=calls)["content"]
        assert [block["type"] for block in content] == ["thinking", "text", "tool_use", "tool_use"]
        assert content[0]["signature"]
        assert [block["input"] for block in content[2:]] == [{"a": 1}, {"INVALID_JSON": "{"}]

    def test_thoughts_that_nobody_asked_for(self) -> None:
        """A caller that did not ask for thoughts takes the first block for the answer."""
        content = whole(AnswerFacts(shows_thinking=False), reasoning="hm", content="so")["content"]
        assert content == [{"type": "text", "text": "so"}]

    @pytest.mark.parametrize(
        ("finish", "reason"),
        [("length", "max_tokens"), ("tool_calls", "tool_use"), ("content_filter", "refusal"), ("x", "end_turn")],
    )
    def test_reasons(self, finish: str, reason: str) -> None:
        assert whole(finish=finish, content="x")["stop_reason"] == reason

    def test_no_content(self) -> None:
        """An answer without content has an empty text, as callers read the first block."""
        assert whole(content=None)["content"] == [{"type": "text", "text": ""}]
        assert message_of({}, "msg_1", SHOWN)["usage"]["input_tokens"] == 0


class TestStream:
    def test_text(self) -> None:
        """The events come in Anthropic's order, and the usage with the last one but one."""
        events = stream({"role": "assistant", "content": ""}, {"content": "he"}, {"content": "llo"})
        assert [event["type"] for event in events] == [
            *("message_start", "ping", "content_block_start", "content_block_delta", "content_block_delta"),
            *("content_block_stop", "message_delta", "message_stop"),
        ]
        assert events[0]["message"].items() >= {"id": "msg_1", "model": "m", "content": [], "stop_reason": None}.items()
        assert blocks(events) == [["text", "text:he", "text:llo"]]
        assert events[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
        assert events[-2]["usage"] == COUNTED

    def test_thoughts_text_and_calls(self) -> None:
        """Each kind is a block of its own; a thought ends with its signature."""
        events = stream(
            {"reasoning_content": "h"},
            {"reasoning": "m"},
            {"content": "so"},
            {"tool_calls": [call(0, id="t1", name="f")]},
            {"tool_calls": [call(0, '{"a"')]},
            {"tool_calls": [call(0, ":1}")]},
            {"tool_calls": [call(1, "{}", id="t2", name="g")]},
            finish="tool_calls",
        )
        assert blocks(events) == [
            ["thinking", "thinking:h", "thinking:m", "signature:unsigned"],
            ["text", "text:so"],
            ["tool_use", 'input_json:{"a"', "input_json::1}"],
            ["tool_use", "input_json:{}"],
        ]
        assert events[-2]["delta"]["stop_reason"] == "tool_use"

    def test_calls_in_turns(self) -> None:
        """Pieces of two calls may come in turns: the second one waits until the first is complete."""
        events = stream(
            {"tool_calls": [call(0, "{", id="t1", name="f"), call(1, "{", id="t2", name="g")]},
            {"content": "and"},
            {"tool_calls": [call(0, "}"), call(1, "}")]},
        )
        assert blocks(events) == [
            ["tool_use", "input_json:{", "input_json:}"],
            ["tool_use", "input_json:{", "input_json:}"],
            ["text", "text:and"],
        ]

    def test_hidden_thoughts(self) -> None:
        """Thoughts that nobody asked for leave no block."""
        assert blocks(stream({"reasoning": "x"}, {"content": "y"}, facts=AnswerFacts(shows_thinking=False))) == [
            ["text", "text:y"]
        ]

    def test_an_empty_answer(self) -> None:
        assert blocks(stream()) == [["text"]]
        assert MessageStream("msg_1", SHOWN).end()[0]["type"] == "message_start"

    def test_a_stop_sequence(self) -> None:
        """Servers that name the sequence which ended the answer give Anthropic's reason; others' words are no sequence."""
        facts = AnswerFacts(stop_sequences=frozenset({"END"}))
        delta = stream({"content": "x"}, facts=facts, stop_reason="END")[-2]["delta"]
        assert delta == {"stop_reason": "stop_sequence", "stop_sequence": "END"}
        assert stream({"content": "x"}, facts=facts, stop_reason="<eos>")[-2]["delta"]["stop_reason"] == "end_turn"

    def test_too_many_blocks(self) -> None:
        """A worker that never stops opening blocks does not fill the gateway's memory."""
        with pytest.raises(BackendFailed, match="blocks of content"):
            stream(*({name: "x"} for _ in range(MAX_BLOCKS) for name in ("content", "reasoning")))
