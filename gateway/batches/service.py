"""Creates, reads, lists and cancels batches for the routes. `gateway.batches.scheduler` runs them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

from backbone.bus.job_log import WorkQueue
from backbone.ids import new_job_id
from backbone.team_keys import TeamKeys
from gateway import clock
from gateway.auth.authenticator import Principal
from gateway.batches.input_file import line_jobs
from gateway.batches.repository import BatchRepository
from gateway.files import FileStore
from schemas.batches import FINAL_STATUSES, Batch, BatchError, BatchRequest, BatchStatus, RequestCounts, parse_window_s
from schemas.errors import InvalidRequest, NotFound, RateLimited, Unavailable
from schemas.files import BATCH_PURPOSE
from schemas.jobs import Lane
from schemas.keys import Scope

MIN_WINDOW_S = 60
PICKUP_GRACE_S = 600
"""The time after the end of its window within which a gateway may still take a batch."""


def max_window_s(keep_s: float) -> float:
    """Return the maximum window of a batch whose results are stored for `keep_s`: its first results must last to its end."""
    return keep_s - min(3600.0, keep_s / 10)


class BatchService:
    """Manages batches. Every method raises Unavailable if NATS or Redis does not answer."""

    def __init__(
        self,
        repository: BatchRepository,
        files: FileStore,
        queue: WorkQueue,
        endpoints: Collection[str],
        *,
        max_window_s: float,
        team_keys: TeamKeys | None = None,
    ) -> None:
        """Create a service. `endpoints` are the supported paths, `max_window_s` the maximum completion window."""
        self._repository = repository
        self._files = files
        self._queue = queue
        self._endpoints = endpoints
        self._max_window_s = max_window_s
        self._team_keys = team_keys or TeamKeys({})

    async def create(self, caller: Principal, request: BatchRequest, base_url: str, *, total: int = 0) -> Batch:
        """Create a batch and queue it. `total`: how many requests it has, where that is known. Raises PermissionDenied, InvalidRequest,
        FileNotFound, StorageFull, RateLimited.
        """
        caller.require(Scope.INFERENCE)
        caller.limits.require_retention("Send the lines as requests of their own.")
        caller.limits.require_lane(Lane.FLEX)
        if request.endpoint not in self._endpoints:
            raise InvalidRequest(
                f"'{request.endpoint}' does not support batches. Use one of: {', '.join(sorted(self._endpoints))}.",
                param="endpoint",
            )
        window_s = self._window(request.completion_window)
        file = await self._files.open(caller.owner, request.input_file_id, param="input_file_id")
        if file.purpose != BATCH_PURPOSE:
            raise InvalidRequest(
                f"The input file has the purpose '{file.purpose}'. Upload it with the purpose '{BATCH_PURPOSE}'.",
                param="input_file_id",
            )
        now = int(clock.now())
        batch = Batch(
            id="batch_" + new_job_id().removeprefix("job_"),
            endpoint=request.endpoint,
            input_file_id=file.id,
            completion_window=request.completion_window,
            metadata=request.metadata,
            created_at=now,
            expires_at=now + window_s,
            owner=caller.owner,
            key=caller.key_id,
            blob=file.blob,
            output_keep_s=self._files.granted_keep_s(request.output_expires_after),
            base_url=base_url,
            counts=RequestCounts(total=total),
        )
        # Its output is stored with the team's files, and never refused: no more batches begin above their limit.
        await self._files.count_record(batch.owner, batch.id, batch.output_keep_s, caller.limits.stored_bytes)
        await self._enqueue(batch, caller.limits.batches)
        return batch

    def _window(self, text: str) -> int:
        seconds = parse_window_s(text)
        if seconds is None or not MIN_WINDOW_S <= seconds <= self._max_window_s:
            raise InvalidRequest(
                f"'{text}' is not a valid completion window. Use '24h' or another number of m, h or d, "
                f"from {MIN_WINDOW_S} to {self._max_window_s:.0f} seconds.",
                param="completion_window",
            )
        return seconds

    async def _enqueue(self, batch: Batch, most: int | None) -> None:
        await self._repository.add(batch)
        try:
            await self._require_room(batch, most)
            item = batch.model_dump_json(exclude_defaults=True).encode()
            await self._queue.put(batch.id, self._team_keys.seal(batch.owner, f"batch {batch.id}", item))
        except (Unavailable, RateLimited):
            # NATS may have stored it all the same. The gateway that takes it finds that it has failed.
            await self._repository.change(batch.owner, batch.id, _not_accepted)
            raise

    async def _require_room(self, batch: Batch, most: int | None) -> None:
        """Raise RateLimited if the owner has `most` other unfinished batches."""
        if most is not None and not await self._repository.has_room(batch.owner, most):
            raise RateLimited(
                f"Your team has {most} unfinished batches, its limit. Retry when one has ended.", retry_after_s=30.0
            )

    async def get(self, owner: str, batch_id: str) -> Batch:
        """Return a batch. Raises BatchNotFound."""
        batch = await self._repository.get(owner, batch_id)
        return await self._repository.change(owner, batch_id, _overdue) if _overdue(batch) is not batch else batch

    async def line_jobs(self, owner: str, batch_id: str) -> Callable[[bool], Iterator[str]]:
        """Return a function that yields the ids of the batch's jobs, newest first or oldest first. Raises BatchNotFound."""
        return partial(line_jobs, (await self.get(owner, batch_id)).id)

    async def page(
        self, owner: str, *, after: str, limit: int, endpoint: str = "", newest_first: bool = True
    ) -> tuple[list[Batch], bool]:
        """Return up to `limit` batches after the id `after`, and whether there are more. `endpoint`: empty for any."""
        return await self._repository.page(
            owner, after=after, limit=limit, endpoint=endpoint, newest_first=newest_first
        )

    async def delete(self, owner: str, batch_id: str) -> None:
        """Delete a batch that has ended, with its files. Raises BatchNotFound, and InvalidRequest if it has not ended."""
        batch = await self.get(owner, batch_id)
        if not batch.is_final:
            raise InvalidRequest(
                f"The batch is {batch.status}. Cancel it, and delete it when it has ended.", code="batch_not_ended"
            )
        for file_id in (batch.output_file_id, batch.error_file_id, batch.input_file_id):
            if file_id:
                with suppress(NotFound):
                    await self._files.remove(owner, file_id)
        await self._repository.remove(batch)

    async def unfinished(self, owner: str) -> list[Batch]:
        """Return an owner's unfinished batches, oldest first."""
        return await self._repository.unfinished(owner)

    async def cancel(self, owner: str, batch_id: str) -> Batch:
        """Cancel a batch. Idempotent. Raises BatchNotFound, and InvalidRequest if it has already ended."""
        return await self._repository.change(owner, batch_id, _cancelling)


def _overdue(batch: Batch) -> Batch:
    """Expire a batch that no gateway has taken, because its gateway died before it was queued."""
    now = int(clock.now())
    if batch.runner or batch.is_final or now < batch.expires_at + PICKUP_GRACE_S:
        return batch
    return batch.model_copy(update={"status": BatchStatus.EXPIRED, "expired_at": now})


def _cancelling(batch: Batch) -> Batch:
    if batch.status in (BatchStatus.CANCELLING, BatchStatus.CANCELLED):
        return batch
    if batch.status in FINAL_STATUSES:
        raise InvalidRequest(
            f"The batch has already ended as {batch.status}, so it cannot be cancelled.", code="batch_ended"
        )
    now = int(clock.now())
    if not batch.runner:  # no gateway has started it
        update: dict[str, Any] = {"status": BatchStatus.CANCELLED, "cancelling_at": now, "cancelled_at": now}
    else:
        update = {"status": BatchStatus.CANCELLING, "cancelling_at": now}
    return batch.model_copy(update=update)


def _not_accepted(batch: Batch) -> Batch:
    error = BatchError(code="unavailable", message="The batch could not be queued. Create it again.")
    update = {"status": BatchStatus.FAILED, "failed_at": int(clock.now()), "errors": (error,)}
    return batch.model_copy(update=update)
