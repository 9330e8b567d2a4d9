"""Taking batches from their backlog and running them. All gateways share the work; each batch is one gateway's at a time."""

from __future__ import annotations

import asyncio
from contextlib import aclosing, suppress

import structlog

from backbone.bus.job_log import WorkItem, WorkQueue
from gateway.batches.executor import BatchExecutor, BatchSuperseded
from gateway.batches.line_jobs import BatchDependencies
from schemas.batches import BatchError
from schemas.errors import NexusError

log = structlog.get_logger(__name__)

MAX_CONCURRENCY = 16
"""Batches that one gateway runs at once; the others wait."""
ACK_WAIT_S = 15.0
"""A batch whose gateway is silent for this long is another one's."""
RETRY_DELAY_S = 2.0
DEFECT_RETRY_DELAY_S = 30.0
MAX_DEFECT_DELIVERIES = 10
"""A batch that has come so often, and still fails by a defect of ours, has failed."""


class BatchScheduler:
    """See the module's docstring."""

    def __init__(self, queue: WorkQueue, dependencies: BatchDependencies) -> None:
        self._queue = queue
        self._dependencies = dependencies
        self._tasks: set[asyncio.Task[None]] = set()
        self._consumer: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Take batches from now on. The backlog is up."""
        self._consumer = asyncio.create_task(self._consume())

    async def close(self) -> None:
        """Leave the batches under way to other gateways."""
        if self._consumer is not None:
            self._consumer.cancel()
            with suppress(asyncio.CancelledError):
                await self._consumer

    async def _consume(self) -> None:
        try:
            async with aclosing(self._queue.consume(max_unacked=MAX_CONCURRENCY, ack_wait_s=ACK_WAIT_S)) as items:
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
            log.warning("a batch for an endpoint that is not known here", batch=item.id, endpoint=str(error))
            item.nak(DEFECT_RETRY_DELAY_S)
            return
        except ValueError:
            log.exception("malformed batch dropped", batch=item.id)
            with suppress(NexusError):
                await item.ack()
            return
        log.info("batch taken", batch=item.id, delivery=item.delivery)
        try:
            batch = await run.run()
            await item.ack()
            log.info("batch ended", batch=item.id, status=batch.status.value, **batch.counts.model_dump())
        except BatchSuperseded:
            log.info("batch is another gateway's", batch=item.id)
        except asyncio.CancelledError:
            item.nak(0)
            raise
        except NexusError as error:
            log.info("batch waits", batch=item.id, error=error.info.message)
            item.nak(RETRY_DELAY_S)
        except Exception:
            log.exception("defect in a batch", batch=item.id)
            await self._after_defect(run, item)

    async def _after_defect(self, run: BatchExecutor, item: WorkItem) -> None:
        if item.delivery < MAX_DEFECT_DELIVERIES:
            item.nak(DEFECT_RETRY_DELAY_S)
            return
        with suppress(NexusError, BatchSuperseded):
            await run.fail(BatchError(code="internal_error", message="Nexus failed at this batch; its logs say why."))
            await item.ack()
