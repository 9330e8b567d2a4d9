"""What a job's record says about its webhook: written behind the deliveries, which never wait for it."""

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
"""Deliveries that a record shows: the newest."""
MAX_PENDING_NOTES = 10_000
"""That wait for the store; beyond it the oldest are lost, which nobody but a reader of the record notices."""
RETRY_DELAY_S = 2.0
FINAL_FLUSH_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class DeliveryNote:
    """One try at telling a webhook, and where that leaves it."""

    owner: str
    job: str
    run: int
    delivery: WebhookDelivery
    state: DeliveryState


class DeliveryRecorder:
    """Notes in the order in which they came; while the store is away they wait, in memory."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._notes: deque[DeliveryNote] = deque(maxlen=MAX_PENDING_NOTES)
        self._has_notes = asyncio.Event()

    def add(self, note: DeliveryNote) -> None:
        """Write this as soon as that is possible."""
        self._notes.append(note)
        self._has_notes.set()

    async def run(self) -> None:
        """Write notes until cancelled; what is left then gets one more short chance."""
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
        """Write what waits. False: the store is away, and the rest still waits."""
        while self._notes:
            note = self._notes[0]
            try:
                await self._write(note)
            except Unavailable:
                return False
            except Exception:
                log.exception("defect in notes on webhooks", job=note.job)
            if self._notes and self._notes[0] is note:
                self._notes.popleft()
        return True

    async def _write(self, note: DeliveryNote) -> None:
        record = await self._store.get(note.owner, note.job)
        if record is None or record.webhook is None or record.run != note.run:
            return  # it has expired, or its next run tells of itself
        deliveries = (*record.webhook.deliveries, note.delivery)[-MAX_DELIVERIES:]
        state = WebhookState(url=record.webhook.url, state=note.state, deliveries=deliveries)
        await self._store.update(note.owner, note.job, webhook=state)
