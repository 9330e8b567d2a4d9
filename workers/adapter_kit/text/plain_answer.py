"""Answers that need no repair, read in one pass when they are complete. Pure.

Most answers that a caller does not stream are one choice of text in ordinary events. Parsing the events of a short one at once takes
half the time that `CompletionCollector` takes for one after another. Everything else is left to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import orjson

from workers.adapter_kit.text import unicode_repair
from workers.adapter_kit.text.token_usage import final_usage, standard_usage

JSON = dict[str, Any]

EVENT_START = b"data: "
BETWEEN_EVENTS = b"\n\ndata: "
END_MARKER = b"\n\ndata: [DONE]"
EVENT_FIELDS_TO_REPAIR = frozenset({"error", "x_groq"})
CHOICE_FIELDS = frozenset({"index", "delta", "logprobs", "finish_reason"})
TEXT_CHOICE_FIELDS = frozenset({"index", "text", "logprobs", "finish_reason"})
DELTA_FIELDS = frozenset({"role", "content"})
PLAIN_REASONS = frozenset({"stop", "length", "content_filter"})


@dataclass(slots=True)
class PlainAnswer:
    """One choice of text, as the events of a stream gave it."""

    text: str
    reason: str
    tokens: int
    """Events with text."""
    usage: JSON | None
    first: JSON
    """The first event with a choice: its `id`, `created` and `system_fingerprint` are the answer's."""
    fields: JSON
    """The other fields of the events; a later event's value counts."""


def read_plain_answer(data: bytes, *, chat: bool) -> PlainAnswer | None:
    """Return the answer in a complete stream of server-sent events; None where anything in it is out of the ordinary."""
    end = data.rfind(END_MARKER)
    if end < 0 or not data.startswith(EVENT_START) or data[end + len(END_MARKER) :].strip(b"\n"):
        return None
    if b"\r" in data or not unicode_repair.has_whole_characters(data):
        return None
    try:
        # In JSON, a line end stands only between tokens: what is no event of its own makes the list invalid.
        events = orjson.loads(b"[%b]" % data[len(EVENT_START) : end].replace(BETWEEN_EVENTS, b","))
    except orjson.JSONDecodeError:
        return None
    return _read_events(events, chat=chat)


def _read_events(events: list[Any], *, chat: bool) -> PlainAnswer | None:
    texts: list[str] = []
    usages: list[JSON] = []
    reason: str | None = None
    first: JSON | None = None
    top: JSON = {}
    last: JSON = {}
    for event in events:
        if type(event) is not dict or not EVENT_FIELDS_TO_REPAIR.isdisjoint(event):
            return None
        choices = event.pop("choices", None)
        usage = event.pop("usage", None)
        if usage:
            if type(usage) is not dict:
                return None
            usages.append(usage)
        if type(choices) is not list or len(choices) > 1:
            return None
        if not choices:
            last |= event
            continue
        found = _read_choice(choices[0], chat=chat)
        if found is None:
            return None
        text, new_reason = found
        first = first or event
        if new_reason is not None:
            reason = new_reason
        if text:
            texts.append(text)
        elif reason is not None:
            last |= event
            continue
        top |= event if None not in event.values() else {k: v for k, v in event.items() if v is not None}
    if first is None:
        return None
    usage = final_usage([standard_usage(usage) for usage in usages]) if usages else None
    return PlainAnswer("".join(texts), reason or "stop", len(texts), usage, first, last | top)


def _read_choice(choice: Any, *, chat: bool) -> tuple[str, str | None] | None:
    """Return the text and the reason of a choice that holds nothing else; None for any other choice."""
    if type(choice) is not dict or not choice.keys() <= (CHOICE_FIELDS if chat else TEXT_CHOICE_FIELDS):
        return None
    reason = choice.get("finish_reason")
    if choice.get("logprobs") is not None or (reason is not None and reason not in PLAIN_REASONS):
        return None
    holder = choice.get("delta") if chat else choice
    if type(holder) is not dict or (chat and not holder.keys() <= DELTA_FIELDS):
        return None
    text = holder.get("content") if chat else holder.get("text")
    if type(text) is not str and not (chat and text is None):
        return None
    return text or "", reason
