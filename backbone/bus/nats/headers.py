"""Parsers for what JetStream says about a message: status headers and acknowledgement subjects."""

from __future__ import annotations

from typing import NamedTuple


class StatusHeader(NamedTuple):
    """A status message, such as `404 No Messages`."""

    code: int
    text: str
    unused: int | None
    """Messages that a pull requested and did not get, where the server says so."""


def parse_status(headers: bytes) -> StatusHeader | None:
    """Return the status in raw headers; None when they hold none."""
    line, _, rest = headers.partition(b"\r\n")
    parts = line.split(b" ", 2)
    if len(parts) < 2 or not parts[1].isdigit():
        return None
    unused = None
    for header in rest.split(b"\r\n"):
        name, _, value = header.partition(b":")
        if name.lower() == b"nats-pending-messages":
            unused = int(value)
    return StatusHeader(int(parts[1]), parts[2].decode() if len(parts) > 2 else "", unused)


class AckSubject(NamedTuple):
    """The parts of an acknowledgement subject."""

    delivery: int
    stream_seq: int
    stored_ns: int
    """When NATS stored the message, in nanoseconds since the epoch, by its own clock."""
    pending: int


def parse_ack_subject(subject: bytes) -> AckSubject:
    """Parse `$JS.ACK.[domain.account.]stream.consumer.delivered.sseq.cseq.time.pending[.token]`. Raises ValueError."""
    tokens = subject.split(b".")
    base = 4 if len(tokens) == 9 else 6
    return AckSubject(int(tokens[base]), int(tokens[base + 1]), int(tokens[base + 3]), int(tokens[base + 4]))
