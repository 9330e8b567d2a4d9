"""Answers that need no repair, read in one pass when they are complete. Pure.

Most answers that a caller does not stream are one choice of text in ordinary events, which differ only in their text. Their texts are
cut out and joined, so that one event is parsed for all of them. Everything else is left to `CompletionCollector`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import orjson

from workers.adapter_kit.text import unicode_repair
from workers.adapter_kit.text.token_usage import final_usage, standard_usage

JSON = dict[str, Any]

EVENT_START = b"data: "
BETWEEN_EVENTS = b"\n\ndata: "
TEXT_MARKER = "\ue000nexus\ue000"
"""Stands for the joined texts while the rest is parsed, and so shows that they are the choice's text."""
MIN_RUN = 3
"""Fewer equal events are parsed one by one."""
END_MARKER = b"\n\ndata: [DONE]"
EVENT_FIELDS_TO_REPAIR = frozenset({"error", "x_groq"})
CHOICE_FIELDS = frozenset({"index", "delta", "logprobs", "finish_reason"})
TEXT_CHOICE_FIELDS = frozenset({"index", "text", "logprobs", "finish_reason"})
DELTA_FIELDS = frozenset({"role", "content"})
TEXT_FIELD = {True: re.compile(rb'"content": ?"'), False: re.compile(rb'"text": ?"')}
"""The beginning of a choice's text, by whether it is a chat's."""
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
    run = _find_run(data[:end], chat=chat)
    try:
        # In JSON, a line end stands only between tokens: what is no event of its own makes the list invalid.
        if run is None:
            return _read_events(_parse_events(data[len(EVENT_START) : end]), chat=chat)
        text, count = orjson.loads(b'"%b"' % run.text), run.tokens
        return _read_events(_parse_events(run.others), chat=chat, run_text=text, run_count=count)
    except orjson.JSONDecodeError:
        return None


class _Run(NamedTuple):
    """Events in a row that differ only in their text."""

    text: bytes
    """The joined texts, as JSON writes them."""
    tokens: int
    """Events with a text that is not empty."""
    others: bytes
    """All events, where one with TEXT_MARKER stands for the run."""


def _find_run(data: bytes, *, chat: bool) -> _Run | None:
    """Return the run of equal events that begins with the second one; None where it is short or cannot be told from the others.

    A quote is always escaped within a text, and a line end never stands there: what is cut at both is structure.
    """
    start = data.find(BETWEEN_EVENTS)
    stop = data.find(BETWEEN_EVENTS, start + 1)
    if start < 0 or stop < 0:
        return None
    field = TEXT_FIELD[chat].search(data, start, stop)
    if field is None:
        return None
    head, tail = data[start : field.end()], data[data.find(b'"', field.end()) : stop]
    texts = data[field.end() :].split(tail + head)
    if len(texts) < MIN_RUN:
        return None
    texts[-1], found, rest = texts[-1].partition(tail)
    text = b"".join(texts)
    if not found or b"\n" in text or b'"' in text.replace(rb"\\", b"").replace(rb"\"", b""):
        return None
    others = b"".join((data[len(EVENT_START) : start], head, TEXT_MARKER.encode(), tail, rest))
    return _Run(text, len(texts) - texts.count(b""), others)


def _parse_events(data: bytes) -> Any:
    return orjson.loads(b"[%b]" % data.replace(BETWEEN_EVENTS, b","))


def _read_events(events: list[Any], *, chat: bool, run_text: str = "", run_count: int = 0) -> PlainAnswer | None:
    texts: list[str] = []
    usages: list[JSON] = []
    tokens = 0
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
        if text == TEXT_MARKER:
            text, tokens, run_count = run_text, tokens + run_count, 0
        else:
            tokens += bool(text)
        first = first or event
        if new_reason is not None:
            reason = new_reason
        if text:
            texts.append(text)
        elif reason is not None:
            last |= event
            continue
        top |= event if None not in event.values() else {k: v for k, v in event.items() if v is not None}
    if first is None or run_count:
        return None
    usage = final_usage([standard_usage(usage) for usage in usages]) if usages else None
    return PlainAnswer("".join(texts), reason or "stop", tokens, usage, first, last | top)


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
