"""Writes webhook deliveries into job records, in the background: deliveries never wait for the store."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from dataclasses import dataclass
from typing import Literal

import structlog

from backbone.store.store import Store
from schemas.errors import Unavailable
from schemas.jobs import WebhookDelivery, WebhookState

log = structlog.get_logger(__name__)

DeliveryState = Literal["pending", "delivered", "failed"]
MAX_DELIVERIES = 10
"""The number of newest deliveries that a record holds."""
MAX_PENDING_NOTES = 10_000
"""The maximum number of notes that wait for the store. Further notes displace the oldest; only the records lose them."""
RETRY_DELAY_S = 2.0
FINAL_FLUSH_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class DeliveryNote:
    """One delivery attempt and the resulting state of the webhook."""

    owner: str
    job: str
    run: int
    delivery: WebhookDelivery
    state: DeliveryState


class DeliveryRecorder:
    """Writes notes in order. While the store is unavailable, notes wait in memory."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._notes: deque[DeliveryNote] = deque(maxlen=MAX_PENDING_NOTES)
        self._has_notes = asyncio.Event()

    def add(self, note: DeliveryNote) -> None:
        """Queue a note to be written."""
        self._notes.append(note)
        self._has_notes.set()

    async def run(self) -> None:
        """Write notes until cancelled. Try once more to write pending notes before returning."""
        try:
            while True:
                await self._has_notes.wait()
                self._has_notes.clear()
                while not await self._flush():
                    await asyncio.sleep(RETRY_DELAY_S)
        finally:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FINAL_FLUSH_TIMEOUT_S):
                    await self._flush()

    async def _flush(self) -> bool:
        """Write pending notes. Return False if the store is unavailable and notes remain."""
        while self._notes:
            note = self._notes[0]
            try:
                await self._write(note)
            except Unavailable:
                return False
            except Exception:
                log.exception("webhook.record_defect", job=note.job)
            if self._notes and self._notes[0] is note:
                self._notes.popleft()
        return True

    async def _write(self, note: DeliveryNote) -> None:
        record = await self._store.get(note.owner, note.job)
        if record is None or record.webhook_state is None or record.run != note.run:
            return  # the record has expired or belongs to another run
        deliveries = (*record.webhook_state.deliveries, note.delivery)[-MAX_DELIVERIES:]
        state = WebhookState(url=record.webhook, state=note.state, deliveries=deliveries)
        await self._store.update(note.owner, note.job, webhook_state=state)
