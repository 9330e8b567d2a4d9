"""Write one streamed answer: server-sent events, or raw bytes such as sound."""

from __future__ import annotations

from gateway.http.asgi import STREAM_HEADERS, Reply, adapted_header
from gateway.sse_frames import adapted_frame, error_frame
from schemas.errors import ErrorInfo


class StreamWriter:
    """Begins an answer with its first bytes, and ends it or breaks it off.

    An error before the first bytes is an HTTP status. A stream that fails later never looks complete: events end with an event of the
    error, without `[DONE]`; other streams are cut off, because clients would take a clean end for success.
    """

    __slots__ = ("_adapted", "_content_type", "_is_sse", "_reply")

    def __init__(self, reply: Reply, content_type: bytes) -> None:
        self._reply = reply
        self._content_type = content_type
        self._is_sse = content_type.startswith(b"text/event-stream")
        self._adapted: tuple[str, ...] = ()

    async def adapt(self, parameters: tuple[str, ...]) -> None:
        """Name adapted parameters in the head, or in a comment if the head was sent."""
        self._adapted = parameters
        if parameters and self._reply.started and self._is_sse:
            await self._reply.send_chunk(adapted_frame(parameters))

    async def begin(self) -> None:
        """Send the head, unless it was sent."""
        if not self._reply.started:
            head = [(b"content-type", self._content_type), *STREAM_HEADERS, *adapted_header(self._adapted)]
            await self._reply.send_head(200, head)

    async def write(self, data: bytes) -> None:
        """Send bytes of the answer, if there are any."""
        if data:
            await self.begin()
            await self._reply.send_chunk(data)

    async def comment(self, frame: bytes) -> None:
        """Send a comment between two events; other streams have no place for it."""
        if self._is_sse:
            await self.write(frame)

    async def end(self, last_event: bytes = b"") -> None:
        """End the answer as complete, server-sent events with `last_event`."""
        await self.begin()
        await self._reply.send_end(last_event if self._is_sse else b"")

    async def abort(self, info: ErrorInfo, last_event: bytes = b"") -> None:
        """End the answer with an error. `last_event` reports it in place of OpenAI's error object."""
        reply = self._reply
        if not reply.started:
            await reply.send_error(info)
        elif self._is_sse:
            await reply.send_end(last_event or error_frame(info))
        elif reply.exchange is not None:
            reply.exchange.truncate()
        else:
            raise ConnectionAbortedError(info.message)
