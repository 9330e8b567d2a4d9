"""Events that need no parsing: patterns of bytes that are learned from one event and recognize those like it. Pure.

Most events of a stream differ only in their text. Inside a JSON string a quote is always escaped and a line end never stands
alone, so a pattern that holds either can only match structure, never the text of the model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import orjson

from workers.adapter_kit.text import unicode_repair

JSON = dict[str, Any]

MAX_LEARNED_PATTERNS = 3
"""How many patterns in a row may be learned and never match; after them, every event is parsed."""
CALL_FIELDS = (b'"tool_calls"', b'"function_call"')
ROLE_FIELD = b'"role"'
ROLE_FORMS = (b'"role":"assistant",', b'"role": "assistant", ', b',"role":"assistant"', b', "role": "assistant"')
"""How servers write a role that they repeat in every delta."""
UNUSUAL_FIELDS = frozenset({"message", "error", "usage"})
"""Fields of a choice that make its event one to be parsed."""


@dataclass(frozen=True, slots=True)
class EventPattern:
    """The bytes before and after the text of an event that was parsed; events with the same bytes differ only in their text."""

    head: bytes
    """With `data: `."""
    tail: bytes
    """With the empty line."""
    seam: bytes = field(init=False)
    """What lies between the texts of two such events."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "seam", self.tail + self.head)

    def fits(self, block: bytes) -> bool:
        """Return whether `block` may consist of such events only: it begins and ends like one."""
        return (
            block.startswith(self.head) and block.endswith(self.tail) and len(block) >= len(self.head) + len(self.tail)
        )

    def between(self, block: bytes) -> bytes:
        """Return `block` without its first head and its last tail."""
        return block[len(self.head) : -len(self.tail)]


def parse_learnable_event(payload: bytes) -> JSON | None:
    """Return an event with one usual choice, from which a pattern may be learned; None for any other event."""
    if not unicode_repair.has_whole_characters(payload):
        return None
    try:
        event = orjson.loads(payload)
    except orjson.JSONDecodeError:
        return None
    choices = event.get("choices") if isinstance(event, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        return None
    choice = choices[0]
    return event if choice.get("index", 0) == 0 and not choice.keys() & UNUSUAL_FIELDS else None


def split_around_text(written: bytes, choice: JSON, *, chat: bool) -> tuple[bytes, bytes]:
    """Return how a choice is written before and after its first text, with the quotes; two empty values where that is in doubt."""
    target = choice.get("delta") if chat else choice
    if not isinstance(target, dict):
        return b"", b""
    name = next((k for k, v in target.items() if isinstance(v, str) and k != "role"), "") if chat else "text"
    if not isinstance(target.get(name), str):
        return b"", b""
    at = written.find(b'"%b"' % name.encode())
    start = written.find(b'"', at + len(name) + 2) + 1
    end = written.find(b'"', start)
    target[name] = ""
    return (written[:start], written[end:]) if equals_without(written, start, end, choice) else (b"", b"")


def equals_without(payload: bytes, start: int, end: int, expected: JSON) -> bool:
    """Return whether `payload` without [start:end] is the JSON of `expected`."""
    try:
        return bool(orjson.loads(payload[:start] + payload[end:]) == expected)
    except orjson.JSONDecodeError:
        return False


def find_only_text(event: JSON, *, chat: bool) -> JSON | None:
    """Return the object that holds the text of an event that adds nothing but text to choice 0; None for any other event."""
    choice = event["choices"][0]
    if len(event["choices"]) != 1 or choice.get("index", 0) != 0 or isinstance(event.get("usage"), dict):
        return None
    name = "content" if chat else "text"
    target = choice.get("delta") if chat else choice
    if not isinstance(target, dict) or not isinstance(target.get(name), str):
        return None
    others = [v for k, v in target.items() if k != name] + [v for k, v in choice.items() if k not in ("delta", name)]
    return target if all(value is None or value == 0 for value in others) else None


def is_constant(choice: JSON, *, chat: bool) -> bool:
    """Return whether nothing but its text, which is empty now, sets a choice apart from the next one."""
    delta = choice["delta"].items() if chat else ()
    values = [v for k, v in (*choice.items(), *delta) if k not in ("delta", "role")]
    return all(not value for value in values)


def remove_role(text: bytes) -> bytes:
    """Return the bytes of events without their roles."""
    for form in ROLE_FORMS:
        text = text.replace(form, b"")
    return text


def has_no_calls(block: bytes) -> bool:
    """Return whether every `tool_calls` and `function_call` in `block` is null."""
    return all(
        block.count(name) == sum(block.count(name + form) for form in (b":null", b": null")) for name in CALL_FIELDS
    )
