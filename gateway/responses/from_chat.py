"""From a chat stream to a response's events and the final response.

What comes out depends only on the shell, the chat frames and the words said about the job: any gateway makes the same
events, under the same numbers, as often as it is asked to.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import orjson

from gateway.responses.output_items import FunctionCallItem, ItemEvent, OutputItem, TextItem
from gateway.responses.resource import usage
from schemas.errors import BackendFailed

JSON = dict[str, Any]

INCOMPLETE = {"length": "max_output_tokens", "content_filter": "content_filter"}
"""Reasons of chat for an end that is none, in the words of responses."""


class ResponseEvent(NamedTuple):
    """One event of a response."""

    number: int
    """0, 1, 2 …"""
    body: JSON

    @property
    def kind(self) -> str:
        """Its type."""
        return str(self.body["type"])

    def encode(self) -> bytes:
        """As server-sent event."""
        return b"event: %b\ndata: %b\n\n" % (self.kind.encode(), orjson.dumps(self.body))


class ResponseBuilder:
    """One attempt at an answer, from its first event to its last."""

    def __init__(self, shell: JSON) -> None:
        self._shell = shell
        self._hex = str(shell["id"]).removeprefix("resp_")
        self._next = 0
        self._begun = False
        self._items: list[OutputItem] = []
        self._speaking: TextItem | None = None
        self._calls: dict[int, FunctionCallItem] = {}
        self._finish: str | None = None
        self._usage: JSON | None = None

    @property
    def next_number(self) -> int:
        """What the next event will be called."""
        return self._next

    @property
    def shown(self) -> bool:
        """There are events that belong to this attempt alone."""
        return bool(self._items)

    def created(self) -> list[ResponseEvent]:
        """The first events, the same for every attempt."""
        events = [self._event("response.created", response=self._shell)]
        if self._shell["background"]:
            events.append(self._event("response.queued", response=self._shell))
        return events

    def started(self) -> list[ResponseEvent]:
        """A worker has begun; once, also the same for every attempt."""
        if self._begun:
            return []
        self._begun = True
        return [self._event("response.in_progress", response=self._shell | {"status": "in_progress"})]

    def frames(self, data: bytes) -> list[ResponseEvent]:
        """What chat's frames say. Raises BackendFailed where they are none."""
        told: list[ItemEvent] = []
        for chunk in _payloads(data):
            told += self._chunk(chunk)
        return [*self.started(), *self._number(told)] if told else []

    def closed(self, counted: JSON | None = None) -> list[ResponseEvent]:
        """The job is complete: the ends of all items. `counted` is the job's usage, where the frames held none."""
        events = self.started()
        told: list[ItemEvent] = []
        if not self._items:
            told += self._say("output_text", "", [])
        for item in self._items:
            cut = self._finish in INCOMPLETE and item is self._items[-1]
            told += item.close("incomplete" if cut else "completed")
        self._usage = self._usage or counted
        return [*events, *self._number(told)]

    def response(self, completed_at: int) -> JSON:
        """The final response of a complete job, after `closed`."""
        final = self._shell | {"output": [item.shape() for item in self._items], "usage": usage(self._usage)}
        if self._finish in INCOMPLETE:
            return final | {"status": "incomplete", "incomplete_details": {"reason": INCOMPLETE[str(self._finish)]}}
        return final | {"status": "completed", "completed_at": completed_at}

    def last(self, final: JSON) -> ResponseEvent:
        """The event that ends the stream."""
        status = final["status"]
        return self._event(f"response.{status if status in ('completed', 'incomplete') else 'failed'}", response=final)

    def error(self, code: str | None, message: str) -> ResponseEvent:
        """The event that breaks the stream off, while the response itself may go on."""
        return self._event("error", code=code, message=message, param=None)

    def _chunk(self, chunk: JSON) -> list[ItemEvent]:
        if isinstance(chunk.get("usage"), dict):
            self._usage = chunk["usage"]
        told: list[ItemEvent] = []
        for choice in chunk.get("choices") or ():
            if choice.get("index", 0) != 0:
                continue
            told += self._delta(choice.get("delta") or {}, _logprobs(choice))
            self._finish = choice.get("finish_reason") or self._finish
        return told

    def _delta(self, delta: JSON, logprobs: list[JSON]) -> list[ItemEvent]:
        told: list[ItemEvent] = []
        if text := delta.get("reasoning_content") or delta.get("reasoning"):
            told += self._say("reasoning_text", str(text), [])
        if text := delta.get("content"):
            told += self._say("output_text", str(text), logprobs)
        if text := delta.get("refusal"):
            told += self._say("refusal", str(text), [])
        for call in delta.get("tool_calls") or ():
            told += self._call(call)
        return told

    def _say(self, kind: str, text: str, logprobs: list[JSON]) -> list[ItemEvent]:
        told: list[ItemEvent] = []
        reasoning = kind == "reasoning_text"
        if self._speaking is None or self._speaking.reasoning is not reasoning:
            told += self._stop_speaking()
            self._speaking = TextItem(len(self._items), self._hex, reasoning=reasoning)
            self._items.append(self._speaking)
            told += self._speaking.open()
        return told + self._speaking.add(kind, text, logprobs)

    def _stop_speaking(self) -> list[ItemEvent]:
        told = self._speaking.close("completed") if self._speaking is not None else []
        self._speaking = None
        return told

    def _call(self, call: JSON) -> list[ItemEvent]:
        """Calls stay open to the end: pieces of several of them may come in turns."""
        told = self._stop_speaking()
        function = call.get("function") or {}
        index = call.get("index")
        if not isinstance(index, int):
            index = len(self._calls) if call.get("id") else max(len(self._calls) - 1, 0)
        if index not in self._calls:
            self._calls[index] = FunctionCallItem(len(self._items), self._hex)
            self._items.append(self._calls[index])
        pieces = (call.get("id"), function.get("name"), function.get("arguments"))
        return told + self._calls[index].add(*(str(piece or "") for piece in pieces))

    def _number(self, told: Iterable[ItemEvent]) -> list[ResponseEvent]:
        return [self._event(kind, **fields) for kind, fields in told]

    def _event(self, kind: str, **fields: Any) -> ResponseEvent:
        number = self._next
        self._next += 1
        return ResponseEvent(number, {"type": kind, "sequence_number": number, **fields})


def _payloads(data: bytes) -> Iterator[JSON]:
    """What the `data:` lines of whole frames hold."""
    for frame in data.split(b"\n\n"):
        text = b"\n".join(line[5:].strip() for line in frame.splitlines() if line.startswith(b"data:"))
        if not text or text == b"[DONE]":
            continue
        try:
            value = orjson.loads(text)
        except orjson.JSONDecodeError as error:
            raise BackendFailed("the backend's stream is not JSON") from error
        if not isinstance(value, dict):
            raise BackendFailed("the backend's stream holds no objects")
        yield value


def _logprobs(choice: JSON) -> list[JSON]:
    held = choice.get("logprobs")
    tokens = held.get("content") if isinstance(held, dict) else None
    return [
        {
            "token": token.get("token", ""),
            "bytes": token.get("bytes") or [],
            "logprob": token.get("logprob", 0.0),
            "top_logprobs": token.get("top_logprobs") or [],
        }
        for token in tokens or ()
    ]
