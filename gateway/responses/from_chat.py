"""Translates a chat stream into a response's events and the final response.

The output depends only on the initial response, the chat frames and the job's outcome. So any gateway builds the same events with
the same numbers, any number of times.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import orjson

from gateway.chat_chunks import call_index, read_chunks
from gateway.responses.output_items import FunctionCallItem, ItemEvent, OutputItem, TextItem
from gateway.responses.resource import usage

JSON = dict[str, Any]

INCOMPLETE_REASONS = {"length": "max_output_tokens", "content_filter": "content_filter"}
"""Chat's finish reasons of incomplete answers, and their names in the Responses API."""


class ResponseEvent(NamedTuple):
    """One event of a response's stream."""

    number: int
    """The sequence number, from 0."""
    body: JSON

    @property
    def kind(self) -> str:
        """Return the event's type."""
        return str(self.body["type"])

    def encode(self) -> bytes:
        """Encode the event as a server-sent event."""
        return b"event: %b\ndata: %b\n\n" % (self.kind.encode(), orjson.dumps(self.body))


class ResponseBuilder:
    """Builds the events and the final response of one attempt."""

    def __init__(self, shell: JSON) -> None:
        self._initial = shell
        self._hex = str(shell["id"]).removeprefix("resp_")
        self._next = 0
        self._in_progress = False
        self._items: list[OutputItem] = []
        self._open_text: TextItem | None = None
        self._calls: dict[int, FunctionCallItem] = {}
        self._finish: str | None = None
        self._usage: JSON | None = None

    @property
    def next_number(self) -> int:
        """Return the number of the next event."""
        return self._next

    @property
    def has_output(self) -> bool:
        """Return whether there are events that belong to this attempt alone."""
        return bool(self._items)

    def created_events(self) -> list[ResponseEvent]:
        """Return the first events, which are the same for every attempt."""
        events = [self._event("response.created", response=self._initial)]
        if self._initial["background"]:
            events.append(self._event("response.queued", response=self._initial))
        return events

    def in_progress_events(self) -> list[ResponseEvent]:
        """Return `response.in_progress` once, which is the same for every attempt."""
        if self._in_progress:
            return []
        self._in_progress = True
        return [self._event("response.in_progress", response=self._initial | {"status": "in_progress"})]

    def add_frames(self, data: bytes) -> list[ResponseEvent]:
        """Translate chat frames into events. Raises BackendFailed for malformed frames."""
        item_events: list[ItemEvent] = []
        for chunk in read_chunks(data):
            item_events += self._add_chunk(chunk)
        return [*self.in_progress_events(), *self._number(item_events)] if item_events else []

    def close_items(self, counted: JSON | None = None) -> list[ResponseEvent]:
        """Close all items of a complete job. `counted` is the job's usage, in case the frames contain none."""
        events = self.in_progress_events()
        item_events: list[ItemEvent] = []
        if not self._items:
            item_events += self._add_text("output_text", "", [])
        for item in self._items:
            cut = self._finish in INCOMPLETE_REASONS and item is self._items[-1]
            item_events += item.close("incomplete" if cut else "completed")
        self._usage = self._usage or counted
        return [*events, *self._number(item_events)]

    def final_response(self, completed_at: int) -> JSON:
        """Return the final response of a complete job. Call `close_items` first."""
        final = self._initial | {"output": [item.shape() for item in self._items], "usage": usage(self._usage)}
        if self._finish in INCOMPLETE_REASONS:
            return final | {
                "status": "incomplete",
                "incomplete_details": {"reason": INCOMPLETE_REASONS[str(self._finish)]},
            }
        return final | {"status": "completed", "completed_at": completed_at}

    def final_event(self, final: JSON) -> ResponseEvent:
        """Return the event that ends the stream."""
        status = final["status"]
        return self._event(f"response.{status if status in ('completed', 'incomplete') else 'failed'}", response=final)

    def error_event(self, code: str | None, message: str) -> ResponseEvent:
        """Return the `error` event, which ends the stream while the response may continue."""
        return self._event("error", code=code, message=message, param=None)

    def _add_chunk(self, chunk: JSON) -> list[ItemEvent]:
        if isinstance(chunk.get("usage"), dict):
            self._usage = chunk["usage"]
        item_events: list[ItemEvent] = []
        for choice in chunk.get("choices") or ():
            if choice.get("index", 0) != 0:
                continue
            item_events += self._add_delta(choice.get("delta") or {}, _logprobs(choice))
            self._finish = choice.get("finish_reason") or self._finish
        return item_events

    def _add_delta(self, delta: JSON, logprobs: list[JSON]) -> list[ItemEvent]:
        item_events: list[ItemEvent] = []
        if text := delta.get("reasoning_content") or delta.get("reasoning"):
            item_events += self._add_text("reasoning_text", str(text), [])
        if text := delta.get("content"):
            item_events += self._add_text("output_text", str(text), logprobs)
        if text := delta.get("refusal"):
            item_events += self._add_text("refusal", str(text), [])
        for call in delta.get("tool_calls") or ():
            item_events += self._add_call(call)
        return item_events

    def _add_text(self, kind: str, text: str, logprobs: list[JSON]) -> list[ItemEvent]:
        item_events: list[ItemEvent] = []
        reasoning = kind == "reasoning_text"
        if self._open_text is None or self._open_text.reasoning is not reasoning:
            item_events += self._close_text()
            self._open_text = TextItem(len(self._items), self._hex, reasoning=reasoning)
            self._items.append(self._open_text)
            item_events += self._open_text.open()
        return item_events + self._open_text.add(kind, text, logprobs)

    def _close_text(self) -> list[ItemEvent]:
        item_events = self._open_text.close("completed") if self._open_text is not None else []
        self._open_text = None
        return item_events

    def _add_call(self, call: JSON) -> list[ItemEvent]:
        """Add a piece of a function call. Calls stay open to the end, since their pieces may be interleaved."""
        item_events = self._close_text()
        function = call.get("function") or {}
        index = call_index(call, len(self._calls))
        if index not in self._calls:
            self._calls[index] = FunctionCallItem(len(self._items), self._hex)
            self._items.append(self._calls[index])
        pieces = (call.get("id"), function.get("name"), function.get("arguments"))
        return item_events + self._calls[index].add(*(str(piece or "") for piece in pieces))

    def _number(self, item_events: Iterable[ItemEvent]) -> list[ResponseEvent]:
        return [self._event(kind, **fields) for kind, fields in item_events]

    def _event(self, kind: str, **fields: Any) -> ResponseEvent:
        number = self._next
        self._next += 1
        return ResponseEvent(number, {"type": kind, "sequence_number": number, **fields})


def _logprobs(choice: JSON) -> list[JSON]:
    logprobs = choice.get("logprobs")
    tokens = logprobs.get("content") if isinstance(logprobs, dict) else None
    return [
        {
            "token": token.get("token", ""),
            "bytes": token.get("bytes") or [],
            "logprob": token.get("logprob", 0.0),
            "top_logprobs": token.get("top_logprobs") or [],
        }
        for token in tokens or ()
    ]
