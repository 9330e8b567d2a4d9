"""Consumes batches from their work queue and runs them. Each batch runs on one gateway at a time."""

from __future__ import annotations

import asyncio
from contextlib import aclosing, suppress

import structlog

from backbone.bus.job_log import WorkItem, WorkQueue
from backbone.team_keys import TeamKeyMissing
from gateway.batches.executor import BatchExecutor, BatchSuperseded
from gateway.batches.line_jobs import BatchDependencies
from gateway.batches.repository import IllegalBatchTransition
from gateway.limits.effective import Bound
from gateway.limits.owner_slots import OwnerSlots
from schemas.batches import BatchError
from schemas.errors import NexusError

log = structlog.get_logger(__name__)

MAX_HELD = 1024
"""The maximum number of batches that one gateway has taken. It runs some of them; the others wait for others of their owner."""
MAX_CONCURRENCY = 128
"""The maximum number of batches that one gateway runs concurrently."""
MAX_CONCURRENCY_PER_OWNER = 16
ACK_WAIT_S = 15.0
"""The time after which another gateway takes over a batch whose gateway is silent."""
RETRY_DELAY_S = 2.0
DEFECT_RETRY_DELAY_S = 30.0
MAX_DEFECT_DELIVERIES = 10
"""The number of deliveries after which a batch that keeps hitting a defect in Nexus fails."""


class BatchScheduler:
    """Runs the batches that this gateway takes from the work queue."""

    def __init__(self, queue: WorkQueue, dependencies: BatchDependencies) -> None:
        self._queue = queue
        self._dependencies = dependencies
        self._slots = OwnerSlots(MAX_CONCURRENCY, ACK_WAIT_S / 3)
        self._tasks: set[asyncio.Task[None]] = set()
        self._consumer: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start to consume batches. The job log must be started."""
        self._consumer = asyncio.create_task(self._consume())

    async def close(self) -> None:
        """Stop. Other gateways continue the running batches."""
        if self._consumer is not None:
            self._consumer.cancel()
            with suppress(asyncio.CancelledError):
                await self._consumer

    async def _consume(self) -> None:
        try:
            async with aclosing(self._queue.consume(max_unacked=MAX_HELD, ack_wait_s=ACK_WAIT_S)) as items:
                async for item in items:
                    task = asyncio.create_task(self._run(item))
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)
        finally:
            for task in self._tasks:
                task.cancel()
            if self._tasks:
                await asyncio.wait(self._tasks)

    async def _run(self, item: WorkItem) -> None:
        try:
            run = BatchExecutor(self._dependencies, item)
        except KeyError as error:
            log.warning("batch.endpoint_unknown", batch=item.id, endpoint=str(error))
            item.nak(DEFECT_RETRY_DELAY_S)
            return
        except TeamKeyMissing as error:
            log.warning("batch.key_missing", batch=item.id, error=error.info.message)
            item.nak(DEFECT_RETRY_DELAY_S)
            return
        except ValueError:
            log.exception("batch.malformed", batch=item.id)
            with suppress(NexusError):
                await item.ack()
            return
        try:
            async with self._slots.hold([Bound(run.owner, MAX_CONCURRENCY_PER_OWNER)], item.extend):
                log.info("batch.started", batch=item.id, delivery=item.delivery)
                batch = await run.run()
            await item.ack()
            log.info("batch.ended", batch=item.id, status=batch.status.value, **batch.counts.model_dump())
        except BatchSuperseded:
            log.info("batch.superseded", batch=item.id)
        except asyncio.CancelledError:
            item.nak(0)
            raise
        except NexusError as error:
            log.info("batch.delayed", batch=item.id, error=error.info.message)
            item.nak(RETRY_DELAY_S)
        except Exception:
            log.exception("batch.defect", batch=item.id)
            await self._after_defect(run, item)

    async def _after_defect(self, run: BatchExecutor, item: WorkItem) -> None:
        if item.delivery < MAX_DEFECT_DELIVERIES:
            item.nak(DEFECT_RETRY_DELAY_S)
            return
        with suppress(NexusError, BatchSuperseded, IllegalBatchTransition):
            await run.fail(
                BatchError(
                    code="internal_error",
                    message="Nexus could not run this batch because of a defect. Search the gateways' logs for the batch id.",
                )
            )
            await item.ack()
