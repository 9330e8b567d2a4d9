"""Carry audit events to NATS, and from there into the ledger's database."""

from __future__ import annotations

from collections.abc import Iterator

import structlog

from backbone.bus.job_log import WorkItem, WorkQueue
from backbone.ledger.audit_store import AuditStore
from gateway.audit.events import HEADER, decode_audit
from gateway.metrics import GatewayMetrics
from gateway.usage.emitter import UsageEmitter
from gateway.usage.writer import LedgerEventWriter
from schemas.audit import AuditEvent

log = structlog.get_logger(__name__)


class AuditEmitter(UsageEmitter):
    """Makes messages of audit events, as `UsageEmitter` does of usage: nothing that was emitted is lost when the gateway is killed."""

    KIND = "audit"
    HEADER = HEADER
    SUFFIX = ".audit"


class AuditWriter(LedgerEventWriter):
    """Writes the audit events into the database."""

    def __init__(self, queue: WorkQueue, store: AuditStore, metrics: GatewayMetrics, *, keep_s: float) -> None:
        super().__init__(queue, metrics, keep_s=keep_s)
        self._store_of_events = store

    async def write(self, items: list[WorkItem]) -> int:
        return await self._store_of_events.store(self._decode(items))

    def count_written(self, written: int) -> None:
        self._metrics.audit_rows.inc(written)

    async def delete_old(self, before_ms: int, limit: int) -> int:
        return await self._store_of_events.delete(before_ms, limit)

    def _decode(self, items: list[WorkItem]) -> Iterator[AuditEvent]:
        for item in items:
            for event in decode_audit(item.data):
                if isinstance(event, ValueError):
                    log.error("audit.event_malformed", message=item.id, error=str(event))
                    self._metrics.audit_dropped.inc()
                else:
                    yield event
