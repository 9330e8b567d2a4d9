"""Comments between the chunks of a streamed answer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from gateway.sync.handler import _InferenceExchange
from gateway.sync.request_state import RequestState


class Pieces:
    """A call whose pieces come one by one, with news of progress before each of them."""

    def __init__(self, *pieces: bytes) -> None:
        self._pieces, self._here = list(pieces), list[bytes]()
        self.envelope, self.error, self.done = SimpleNamespace(model="m"), None, object()
        self.state, self.progress, self.direct_writer = RequestState.RUNNING, b"0", None

    def take_output(self) -> bytes:
        return self._here.pop() if self._here else b""

    def take_blob(self) -> None:
        return None

    async def wait(self) -> None:
        if self._pieces:
            self._here.append(self._pieces.pop(0))
            self.progress = b"%d" % len(self._pieces)
        else:
            self.state = RequestState.ENDED


class Writes:
    """A reply that keeps what is written."""

    def __init__(self) -> None:
        self.out, self.started = b"", True

    async def send_chunk(self, data: bytes) -> None:
        self.out += data

    send_end = send_chunk


async def test_progress_never_splits_an_event() -> None:
    """A large event comes in several pieces: news of progress waits for its end."""

    class Request(_InferenceExchange):
        async def _begin_with_output(self, request: Any, writer: Any) -> bool:
            return True

        async def _send_comment(self, request: Any, writer: Any) -> None:
            await self._reply.send_chunk(b": progress\n\n")

    request: Any = object.__new__(Request)
    request._reply, request._exchange, request._stream_type = Writes(), None, b"application/json"
    request._usage = request._reservation = request._inspection = None
    request._handler = SimpleNamespace(_metrics=SimpleNamespace(itl=SimpleNamespace(observe=lambda *_: None)))
    await request._send_stream(Pieces(b"data: one\n\n", b'data: {"b64":"', b"AAAA", b'"}\n\n', b"data: two\n\n"))
    events = request._reply.out.split(b"\n\n")
    assert [event for event in events if event and event != b": progress"] == [
        b"data: one",
        b'data: {"b64":"AAAA"}',
        b"data: two",
    ]
    assert b": progress" in events
