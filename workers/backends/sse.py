r"""Server-sent events, as inference servers send them: pure, on bytes.

`SseSplitter` cuts a stream into blocks of complete events with `\n` line ends; `payloads` reads a block. They are
apart so that a relay can pass a block on as it is, without looking at its lines.
"""

from __future__ import annotations

from collections.abc import Iterator

EVENT_LIMIT = 16 * 1024 * 1024


class EventTooLarge(ValueError):
    """An event is larger than the limit."""


class SseSplitter:
    """Cuts a byte stream behind complete events. How the bytes arrive makes no difference to the events."""

    def __init__(self, limit: int = EVENT_LIMIT) -> None:
        self._limit = limit
        self._rest = b""
        self._after_cr = False

    def feed(self, data: bytes) -> bytes:
        r"""The events completed by `data`, as one block that ends with an empty line; b"" if there are none.

        Line ends (`\n`, `\r\n`, `\r`) become `\n`. Raises EventTooLarge.
        """
        if not data:
            return b""
        if self._after_cr or b"\r" in data:
            data = self._line_feeds(data)
        rest = self._rest
        seen = max(0, len(rest) - 1)
        if rest:
            data = rest + data
        end = data.rfind(b"\n\n", seen)
        cut = end + 2 if end >= 0 else 0
        self._rest = data[cut:]
        if len(self._rest) > self._limit:
            raise EventTooLarge(f"an event is larger than {self._limit} bytes")
        return data[:cut]

    def _line_feeds(self, data: bytes) -> bytes:
        r"""A `\r` is a line end at once; a `\n` that follows it belongs to it, also in the next read."""
        if self._after_cr and data.startswith(b"\n"):
            data = data[1:]
        self._after_cr = data.endswith(b"\r")
        return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")


def payloads(block: bytes) -> Iterator[bytes]:
    """What each event of a block says: its `data` lines, joined. Comments and events without data say nothing.

    `error: {…}`, which llama.cpp used to send, counts as data.
    """
    for event in block.split(b"\n\n"):
        if event.startswith(b"data: ") and b"\n" not in event:
            payload = event[6:]
        else:
            lines = event.split(b"\n")
            payload = b"\n".join([_value(line) for line in lines if line.startswith((b"data:", b"error:"))])
        if payload:
            yield payload


def _value(line: bytes) -> bytes:
    return line.partition(b":")[2].removeprefix(b" ")


def is_json_content_type(value: str) -> bool:
    """Whether a content type says JSON, where a stream of events was asked for."""
    return value.partition(";")[0].strip().lower().endswith("json")
