"""Define the position in a trace that crosses processes: W3C Trace Context (https://www.w3.org/TR/trace-context/)."""

from __future__ import annotations

import re
from typing import Annotated, NamedTuple

from pydantic import StringConstraints

TRACEPARENT = r"^00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}$"
TRACESTATE = r"^[ -~]{0,512}$"
Traceparent = Annotated[str, StringConstraints(max_length=55)]
Tracestate = Annotated[str, StringConstraints(max_length=512)]
_TRACEPARENT = re.compile(TRACEPARENT.encode())
_TRACESTATE = re.compile(TRACESTATE.encode())


class TraceContext(NamedTuple):
    """The span below which a trace goes on."""

    traceparent: str
    tracestate: str = ""

    @property
    def trace_id(self) -> str:
        """32 hex digits."""
        return self.traceparent[3:35]

    @property
    def span_id(self) -> str:
        """16 hex digits."""
        return self.traceparent[36:52]


def read_trace_context(traceparent: bytes | str, tracestate: bytes | str = b"") -> TraceContext | None:
    """Return the context that headers hold; None for headers that are no trace context. A wrong `tracestate` alone is left out."""
    parent, state = (
        text.encode(errors="replace") if isinstance(text, str) else text for text in (traceparent, tracestate)
    )
    if _TRACEPARENT.fullmatch(parent) is None:
        return None
    return TraceContext(parent.decode(), state.decode() if _TRACESTATE.fullmatch(state) else "")
