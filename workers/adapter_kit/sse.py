r"""Server-sent events, as inference servers send them. Pure, on bytes.

`SseSplitter` cuts a stream into blocks of complete events with `\n` line ends; `payloads` reads a block. They are separate so
that a relay can pass a block on without reading its lines.
"""

from __future__ import annotations

from collections.abc import Iterator

import orjson

EVENT_LIMIT = 16 * 1024 * 1024
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
FIELDS = (b"data:", b"event:", b"id:", b"retry:", b"error:", b":")
MAX_DONE_LENGTH = 12


class EventTooLarge(ValueError):
    """An event is larger than the limit."""


class SseSplitter:
    """Cuts a byte stream after complete events, in whatever pieces the bytes arrive."""

    def __init__(self, limit: int = EVENT_LIMIT, *, single_lines: bool = False) -> None:
        """Create a splitter. `single_lines`: lines of data that each hold complete JSON are events, without an empty line between them."""
        self._limit = limit
        self._single_lines = single_lines
        self._at_start = True
        self._rest = b""
        self._after_cr = False

    def feed(self, data: bytes) -> bytes:
        r"""Return the events that `data` completes, as one block that ends with an empty line; b"" if there are none.

        Line ends (`\n`, `\r\n`, `\r`) become `\n`. Raises EventTooLarge.
        """
        if not data:
            return b""
        if self._at_start:
            data = self._strip_byte_order_mark(data)
        if self._after_cr or b"\r" in data:
            data = self._normalize_line_ends(data)
        rest = self._rest
        seen = max(0, len(rest) - 1)
        if rest:
            data = rest + data
        end = data.rfind(b"\n\n", seen)
        if end < 0 and self._single_lines and data.find(b"\ndata:", max(0, seen - 6)) >= 0:
            return self._split_single_lines(data)
        cut = end + 2 if end >= 0 else 0
        self._rest = data[cut:]
        if len(self._rest) > self._limit:
            raise EventTooLarge(f"an event is larger than {self._limit} bytes")
        return data[:cut]

    @property
    def is_between_events(self) -> bool:
        """Whether the next byte begins an event."""
        return not (self._rest or self._after_cr or self._at_start)

    def _strip_byte_order_mark(self, data: bytes) -> bytes:
        """Remove a byte order mark, which may stand before the first event."""
        data, self._rest = self._rest + data, b""
        if len(data) < len(BYTE_ORDER_MARK) and BYTE_ORDER_MARK.startswith(data):
            self._rest = data
            return b""
        self._at_start = False
        return data.removeprefix(BYTE_ORDER_MARK)

    def _split_single_lines(self, data: bytes) -> bytes:
        """Return the lines that are events; nothing while one line is not."""
        *lines, rest = data.split(b"\n")
        if not all(map(_is_event, lines)):
            rest, lines = data, []
        self._rest = rest
        if len(rest) > self._limit:
            raise EventTooLarge(f"an event is larger than {self._limit} bytes")
        return b"".join(line + b"\n\n" for line in lines if line)

    def _normalize_line_ends(self, data: bytes) -> bytes:
        r"""Convert line ends: `\r` is one at once, and a `\n` after it belongs to it, even in the next read."""
        if self._after_cr and data.startswith(b"\n"):
            data = data[1:]
        self._after_cr = data.endswith(b"\r")
        return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")


def payloads(block: bytes) -> Iterator[bytes]:
    """Yield the data of each event of a block: its `data` lines, joined. Comments and events without data yield nothing.

    `error: {…}`, which llama.cpp used to send, counts as data.
    """
    for event in block.split(b"\n\n"):
        if event.startswith(b"data: ") and b"\n" not in event:
            payload = event[6:]
        else:
            lines = event.split(b"\n")
            payload = b"\n".join([_field_value(line) for line in lines if line.startswith((b"data:", b"error:"))])
        if payload:
            yield payload


def lenient_payloads(block: bytes) -> Iterator[bytes]:
    """Yield the data of each event, as `payloads` does, from servers that deviate from the format.

    Also an event: JSON without `data:`, or on the line after it; each of several lines of complete JSON without an empty line
    between them; and `event: error`, whose data becomes an `error` object.
    """
    for event in block.split(b"\n\n"):
        if event.startswith(b"data: ") and b"\n" not in event:
            if len(event) > len(b"data: "):
                yield event[6:]
        elif event:
            yield from _lenient_event(event.split(b"\n"))


def is_done_marker(payload: bytes) -> bool:
    """Return whether an event is the end marker `[DONE]`, in any spelling."""
    return len(payload) <= MAX_DONE_LENGTH and payload.strip(b" \t\"'").upper() == b"[DONE]"


def _lenient_event(lines: list[bytes]) -> Iterator[bytes]:
    values = [_field_value(line) for line in lines if line.startswith((b"data:", b"error:"))]
    if not any(values):
        values = [b"\n".join(line for line in lines if not line.startswith(FIELDS)).strip()]
        if not values[0].startswith((b"{", b"[")):
            return
    if len(values) > 1 and all(_is_json(value) or is_done_marker(value) for value in values):
        yield from values
        return
    payload = b"\n".join(values)
    if any(line.replace(b" ", b"") == b"event:error" for line in lines):
        payload = _wrap_in_error(payload)
    if payload:
        yield payload


def _wrap_in_error(payload: bytes) -> bytes:
    try:
        parsed = orjson.loads(payload)
    except orjson.JSONDecodeError:
        parsed = payload.decode("utf-8", "replace")
    return payload if isinstance(parsed, dict) and parsed.get("error") else orjson.dumps({"error": parsed})


def _is_event(line: bytes) -> bool:
    """Return whether a line is a complete event, or empty, or a comment."""
    if line.startswith(b"data:"):
        value = _field_value(line)
        return _is_json(value) or is_done_marker(value)
    return not line or line.startswith(b":")


def _is_json(text: bytes) -> bool:
    try:
        orjson.loads(text)
    except orjson.JSONDecodeError:
        return False
    return True


def _field_value(line: bytes) -> bytes:
    return line.partition(b":")[2].removeprefix(b" ")


def is_json_content_type(value: str) -> bool:
    """Return whether a content type is one of JSON."""
    return value.partition(";")[0].strip().lower().endswith("json")
