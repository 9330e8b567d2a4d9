"""Ollama's lines as the events of an OpenAI stream: pure. `CompletionReader` turns those into the response."""

from __future__ import annotations

from secrets import token_hex
from typing import Any

import orjson

JSON = dict[str, Any]

FINISH_REASONS = {"length": "length"}
"""Any other reason of Ollama (`stop`, `load`, none) is `stop` for OpenAI."""


class OllamaEventConverter:
    """Convert the lines of one answer to events."""

    def __init__(self, chat: bool) -> None:
        self._chat = chat
        self._calls = 0
        self.hidden_lines = 0
        """Lines without output for the caller: a text completion has no field for thoughts."""

    def convert(self, lines: list[JSON]) -> bytes:
        """Return the events of lines. The last line, `done`, gives the end of the stream."""
        out: list[bytes] = []
        for line in lines:
            choice = self._chat_piece(line) if self._chat else self._text_piece(line)
            if choice is not None:
                out.append(_event({"choices": [{"index": 0, **choice, "finish_reason": None}]}))
            elif not line.get("done"):
                self.hidden_lines += 1
            if line.get("done"):
                out += self._end(line)
        return b"".join(out)

    def _text_piece(self, line: JSON) -> JSON | None:
        text = line.get("response")
        return {"text": text} if text else None

    def _chat_piece(self, line: JSON) -> JSON | None:
        """Return the choice that a line adds to the answer; None where it adds nothing."""
        message = line.get("message")
        if not isinstance(message, dict):
            message = {}
        delta: JSON = {}
        if message.get("thinking"):
            delta["reasoning_content"] = message["thinking"]
        if message.get("content"):
            delta["content"] = message["content"]
        if message.get("tool_calls"):
            calls = message["tool_calls"]
            delta["tool_calls"] = [
                self._call(call) for call in (calls if isinstance(calls, list) else [calls]) if isinstance(call, dict)
            ]
        logprobs = line.get("logprobs")
        if logprobs:
            return {"delta": delta, "logprobs": {"content": [_logprob(one) for one in logprobs], "refusal": None}}
        return {"delta": delta} if delta else None

    def _call(self, call: JSON) -> JSON:
        """Return a tool call as a delta. Ollama sends each call in one line; its own index may begin at 0 in each line."""
        function = call.get("function")
        if not isinstance(function, dict):
            function = call
        index, self._calls = self._calls, self._calls + 1
        arguments = function.get("arguments") or {}
        if not isinstance(arguments, str):  # servers that imitate Ollama send OpenAI's string
            arguments = orjson.dumps(arguments).decode()
        return {
            "index": index,
            "id": call.get("id") or f"call_{token_hex(4)}",
            "type": "function",
            "function": {"name": function.get("name"), "arguments": arguments},
        }

    def _end(self, line: JSON) -> list[bytes]:
        reason = "tool_calls" if self._calls else FINISH_REASONS.get(str(line.get("done_reason")), "stop")
        last: JSON = {"delta": {}} if self._chat else {"text": ""}
        # Ollama omits counts of 0.
        prompt, completion = int(line.get("prompt_eval_count") or 0), int(line.get("eval_count") or 0)
        usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        return [
            _event({"choices": [{"index": 0, **last, "finish_reason": reason}]}),
            _event({"choices": [], "usage": usage}),
            b"data: [DONE]\n\n",
        ]


def _logprob(one: JSON) -> JSON:
    top = [_token(other) for other in one.get("top_logprobs") or ()]
    return {**_token(one), "top_logprobs": top}


def _token(one: JSON) -> JSON:
    return {"token": one.get("token"), "logprob": one.get("logprob"), "bytes": one.get("bytes")}


def _event(event: JSON) -> bytes:
    return b"data: %b\n\n" % orjson.dumps(event)
