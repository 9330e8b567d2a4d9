"""Translates a chat answer into a message: a whole one, or the events of a stream. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from gateway.dialects.anthropic.blocks import SIGNATURE, TEXT, THINKING, BlockSequence, tool_input, tool_use

JSON = dict[str, Any]

STOP_REASONS = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "function_call": "tool_use",
    "content_filter": "refusal",
}
"""Anthropic's reasons for the end of an answer, by those of chat."""
PING: JSON = {"type": "ping"}


@dataclass(frozen=True, slots=True)
class AnswerFacts:
    """What of a request decides how its answer looks."""

    shows_thinking: bool = True
    """Whether the caller has asked for the model's thoughts: other callers expect none in the content."""
    stop_sequences: frozenset[str] = frozenset()


def message_of(completion: JSON, message_id: str, facts: AnswerFacts) -> JSON:
    """Return the message for a chat completion."""
    choices = completion.get("choices") or [{}]
    choice = choices[0]
    answer = choice.get("message") or {}
    calls = [call for call in answer.get("tool_calls") or () if isinstance(call, dict)]
    content = [*_thoughts(answer, facts), *_texts(answer), *map(_call, calls)] or [{"type": TEXT, "text": ""}]
    message = _message(message_id, completion.get("model"), content)
    return message | _stop(choice, facts, has_calls=bool(calls)) | {"usage": usage_of(completion.get("usage"))}


def usage_of(counted: Any) -> JSON:
    """Return Anthropic's usage: tokens read from the cache are no part of `input_tokens`."""
    counted = counted if isinstance(counted, dict) else {}
    cached = min(_count(counted.get("prompt_tokens_details"), "cached_tokens"), _count(counted, "prompt_tokens"))
    usage = {
        "input_tokens": _count(counted, "prompt_tokens") - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": _count(counted, "completion_tokens"),
    }
    thought = _count(counted.get("completion_tokens_details"), "reasoning_tokens")
    return usage | ({"output_tokens_details": {"thinking_tokens": thought}} if thought else {})


class MessageStream:
    """Translates the chunks of one chat stream into events."""

    def __init__(self, message_id: str, facts: AnswerFacts) -> None:
        self._id = message_id
        self._facts = facts
        self._blocks = BlockSequence()
        self._began = False
        self._final: JSON = {}
        """The last choice that says why the answer ended."""
        self._usage: Any = None

    def add(self, chunk: JSON) -> list[JSON]:
        """Translate one chunk. Raises BackendFailed."""
        events = [] if self._began else self._start(chunk)
        if isinstance(chunk.get("usage"), dict):
            self._usage = chunk["usage"]
        for choice in chunk.get("choices") or ():
            if choice.get("index", 0) != 0:
                continue
            events += self._add_delta(choice.get("delta") or {})
            if choice.get("finish_reason"):
                self._final = choice
        return events

    def end(self) -> list[JSON]:
        """Return the last events of a complete stream."""
        events = [] if self._began else self._start({})
        events += self._blocks.close()
        delta = _stop(self._final, self._facts, has_calls=self._blocks.has_calls)
        events.append({"type": "message_delta", "delta": delta, "usage": usage_of(self._usage)})
        return [*events, {"type": "message_stop"}]

    def _start(self, chunk: JSON) -> list[JSON]:
        self._began = True
        message = _message(self._id, chunk.get("model"), [])
        message |= {"stop_reason": None, "stop_sequence": None, "usage": usage_of(None)}
        return [{"type": "message_start", "message": message}, PING]

    def _add_delta(self, delta: JSON) -> list[JSON]:
        blocks = self._blocks
        events: list[JSON] = []
        if self._facts.shows_thinking and (thought := delta.get("reasoning_content") or delta.get("reasoning")):
            events += blocks.add_text(THINKING, str(thought))
        for name in ("content", "refusal"):
            if text := delta.get(name):
                events += blocks.add_text(TEXT, str(text))
        for piece in delta.get("tool_calls") or ():
            if isinstance(piece, dict):
                events += blocks.add_call(piece)
        return events


def _message(message_id: str, model: Any, content: list[JSON]) -> JSON:
    return {
        "id": message_id,
        "type": "message",
        "role": "assistant",
        "model": str(model or ""),
        "content": content,
    }


def _thoughts(answer: JSON, facts: AnswerFacts) -> Iterable[JSON]:
    text = answer.get("reasoning_content") or answer.get("reasoning")
    if text and facts.shows_thinking:
        yield {"type": THINKING, "thinking": str(text), "signature": SIGNATURE}


def _texts(answer: JSON) -> Iterable[JSON]:
    for name in ("content", "refusal"):
        if text := answer.get(name):
            yield {"type": TEXT, "text": str(text)}


def _call(call: JSON) -> JSON:
    function = call.get("function") or {}
    arguments = str(function.get("arguments") or "")
    return tool_use(str(call.get("id") or ""), str(function.get("name") or ""), tool_input(arguments))


def _stop(choice: JSON, facts: AnswerFacts, *, has_calls: bool) -> JSON:
    """Return why the answer ended. Only servers that name the sequence which ended it, as vLLM does, give `stop_sequence`."""
    reason = STOP_REASONS.get(str(choice.get("finish_reason")), "end_turn")
    sequence = choice.get("stop_reason")
    if reason == "end_turn" and has_calls:
        reason = "tool_use"
    elif reason == "end_turn" and isinstance(sequence, str) and sequence in facts.stop_sequences:
        return {"stop_reason": "stop_sequence", "stop_sequence": sequence}
    return {"stop_reason": reason, "stop_sequence": None}


def _count(counted: Any, name: str) -> int:
    value = counted.get(name) if isinstance(counted, dict) else None
    return value if isinstance(value, int) and value > 0 else 0
