"""Deletes the oldest recorded outcomes before their stream is full: a full stream refuses new outcomes."""

from __future__ import annotations

import asyncio

import structlog

from backbone.bus.nats.requests import JetStreamError, RequestInbox, call_api_until_answered
from backbone.bus.nats.stream_reader import StreamReader
from backbone.bus.subjects import OUTCOME_CONSUMER, OUTCOMES_STREAM
from schemas.errors import Unavailable

log = structlog.get_logger(__name__)

CHECK_INTERVAL_S = 1.0
FREE_SHARE = 0.1
"""The share of the stream's bytes that is kept free for the outcomes of the next second."""
MIN_FREE_BYTES = 4 * 1024 * 1024
DROPPED_SHARE = 0.1
"""The share of the stream's outcomes that is dropped together, oldest first."""


class OutcomeRetention:
    """Keeps the stream of outcomes below its limit. Every gateway runs it; concurrent runs do no harm."""

    def __init__(self, inbox: RequestInbox, max_bytes: int, *, replicated: bool) -> None:
        self._inbox = inbox
        self._outcomes = StreamReader(inbox, OUTCOMES_STREAM, replicated=replicated)
        self._max_bytes = max_bytes - max(FREE_SHARE * max_bytes, min(MIN_FREE_BYTES, max_bytes / 2))

    async def run(self) -> None:
        """Check at intervals until cancelled."""
        while True:
            await asyncio.sleep(CHECK_INTERVAL_S)
            try:
                await self.drop_recorded()
            except Unavailable as error:
                log.debug("outcomes.drop_failed", error=error.info.message)
            except Exception:
                log.exception("outcomes.retention_crashed")

    async def drop_recorded(self) -> None:
        """Drop the oldest recorded outcomes until the stream is below its limit. Raises Unavailable."""
        while (state := await self._outcomes.state())["bytes"] > self._max_bytes:
            first: int = state["first_seq"]
            upto = min(first + max(1, int(DROPPED_SHARE * (state["last_seq"] - first))), await self._recorded() + 1)
            if upto <= first:
                log.warning("outcomes.stream_full", bytes=state["bytes"])
                return
            await self._drop_before(upto)
            log.warning("outcomes.dropped", before=upto)

    async def _recorded(self) -> int:
        """Return the sequence up to which all outcomes are recorded."""
        try:
            info = await call_api_until_answered(self._inbox, f"CONSUMER.INFO.{OUTCOMES_STREAM}.{OUTCOME_CONSUMER}")
        except JetStreamError:
            return 0
        return int(info["ack_floor"]["stream_seq"])

    async def _drop_before(self, seq: int) -> None:
        try:
            await call_api_until_answered(self._inbox, f"STREAM.PURGE.{OUTCOMES_STREAM}", {"seq": seq})
        except JetStreamError as error:
            raise Unavailable(f"NATS cannot drop old outcomes: {error}") from error
