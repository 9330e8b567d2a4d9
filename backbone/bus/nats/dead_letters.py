"""Reads the stream of dead letters, newest first."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator

import structlog

from backbone.bus.job_log import StoredDeadLetter
from backbone.bus.nats.requests import RequestInbox
from backbone.bus.nats.stream_reader import StoredMessage, StreamReader
from backbone.bus.subjects import DEAD_LETTERS_STREAM
from schemas.outcome import Outcome

log = structlog.get_logger(__name__)

BATCH_SIZE = 16
"""Messages that are in memory during a search."""
MAX_WINDOW_SIZE = 1 << 20


class DeadLetterStream:
    """The stream of dead letters, any of which may have been deleted."""

    def __init__(self, inbox: RequestInbox, *, replicated: bool) -> None:
        self._reader = StreamReader(inbox, DEAD_LETTERS_STREAM, replicated=replicated)

    async def newest(self, before: int | None, limit: int) -> list[StoredDeadLetter]:
        """Return the newest `limit` dead letters below sequence `before`. Raises Unavailable."""
        letters: list[StoredDeadLetter] = []
        if limit > 0:
            async with contextlib.aclosing(self._backwards(before)) as messages:
                async for message in messages:
                    letter = _decode_dead_letter(message)
                    if letter is not None:
                        letters.append(letter)
                    if len(letters) == limit:
                        break
        return letters

    async def find(self, job: str) -> StoredDeadLetter | None:
        """Search all dead letters for the newest one of a job. Raises Unavailable."""
        async with contextlib.aclosing(self._backwards(None)) as messages:
            async for message in messages:
                id_ = (message.header(b"Nats-Msg-Id") or b"").decode()
                if id_.rpartition(".")[0] == job:
                    return _decode_dead_letter(message)
        return None

    async def delete(self, seq: int) -> bool:
        """Delete one dead letter. Raises Unavailable."""
        return await self._reader.delete(seq)

    async def _backwards(self, before: int | None) -> AsyncGenerator[StoredMessage, None]:
        """Yield messages backward. NATS reads forward only: read windows of sequences, sized to hold few enough messages."""
        state = await self._reader.state()
        first, high = state["first_seq"], state["last_seq"]
        if before is not None:
            high = min(high, before - 1)
        window = BATCH_SIZE
        while high >= max(first, 1):
            low = max(first, high - window + 1)
            found, left = await self._reader.batch(low, None, BATCH_SIZE)
            if found and found[-1].seq < high and left != 0:
                window = max(1, window // 2)
                continue
            inside = [message for message in found if message.seq <= high]
            for message in reversed(inside):
                yield message
            high = low - 1
            if len(inside) <= BATCH_SIZE // 2:
                window = min(2 * window, MAX_WINDOW_SIZE)


def _decode_dead_letter(message: StoredMessage) -> StoredDeadLetter | None:
    try:
        outcome, job_message = Outcome.decode(message.data)
    except ValueError as error:
        log.warning("dead_letter.unreadable", seq=message.seq, error=str(error))
        return None
    return StoredDeadLetter(message.seq, outcome, job_message, message.stored_at)
