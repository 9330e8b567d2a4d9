"""Stores batches as documents of their owners, changed by compare-and-set."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from backbone.store.documents import DocumentStore
from gateway.pagination import read_page
from schemas.batches import BATCH_TRANSITIONS, Batch
from schemas.errors import NotFound

KIND = "batch"
UNFINISHED_KIND = "batch-unfinished"
UNFINISHED_MARGIN_S = 3600.0
"""Time after the end of its window at which a batch counts as ended, whatever happened to it."""


class BatchNotFound(NotFound):
    """The batch does not exist or belongs to another owner."""

    code = "batch_not_found"


class IllegalBatchTransition(Exception):
    """A change would give a batch a status that may not follow its current one."""


class BatchRepository:
    """Reads and writes batches. Every method raises Unavailable while the store does not answer."""

    def __init__(self, documents: DocumentStore, keep_s: float) -> None:
        """Create a repository. `keep_s` is the retention time of a batch after the end of its window."""
        self._documents = documents
        self._keep_s = keep_s

    async def add(self, batch: Batch) -> bool:
        """Store a new batch. Return False if it already exists."""
        keep_s = self._keep_s + batch.expires_at - batch.created_at
        unfinished_s = batch.expires_at - batch.created_at + UNFINISHED_MARGIN_S
        await self._documents.put(UNFINISHED_KIND, batch.owner, batch.id, b"{}", ttl_s=unfinished_s)
        return await self._documents.add(KIND, batch.owner, batch.id, _encode(batch), ttl_s=keep_s)

    async def has_room(self, owner: str, most: int) -> bool:
        """Return whether an owner has at most `most` unfinished batches. Of racing additions beyond it, all may see none."""
        found = await self._documents.page(UNFINISHED_KIND, owner, limit=most + 1, newest_first=False)
        return len(found) <= most

    async def is_unfinished(self, owner: str, batch_id: str) -> bool:
        """Return whether an owner's batch has not ended."""
        return await self._documents.get(UNFINISHED_KIND, owner, batch_id) is not None

    async def unfinished(self, owner: str) -> list[Batch]:
        """Return an owner's unfinished batches, oldest first."""
        found: list[Batch] = []
        after = ""
        while page := await self._documents.page(UNFINISHED_KIND, owner, after=after, newest_first=False):
            after = page[-1][0]
            for batch_id, _ in page:
                with suppress(BatchNotFound):
                    found.append(await self.get(owner, batch_id))
        return [batch for batch in found if not batch.is_final]

    async def get(self, owner: str, batch_id: str) -> Batch:
        """Return a batch. Raises BatchNotFound."""
        return (await self._read(owner, batch_id))[1]

    async def change(self, owner: str, batch_id: str, change: Callable[[Batch], Batch]) -> Batch:
        """Apply `change` to the current batch, store the result and return it.

        `change` may be called several times. Returning its argument unchanged stores nothing. Raises BatchNotFound,
        IllegalBatchTransition and the errors of `change`.
        """
        while True:
            old, batch = await self._read(owner, batch_id)
            new = change(batch)
            if new.status is not batch.status and new.status not in BATCH_TRANSITIONS[batch.status]:
                raise IllegalBatchTransition(f"Batch '{batch_id}' cannot go from {batch.status} to {new.status}.")
            if new is batch or await self._documents.swap(KIND, owner, batch_id, old, _encode(new)):
                if new.is_final and not batch.is_final:
                    await self._documents.remove(UNFINISHED_KIND, owner, batch_id)
                return new

    async def page(
        self, owner: str, *, after: str, limit: int, endpoint: str = "", newest_first: bool = True
    ) -> tuple[list[Batch], bool]:
        """Return up to `limit` batches after the id `after`, and whether there are more. `endpoint`: empty for any."""
        return await read_page(
            self._documents,
            KIND,
            owner,
            Batch.model_validate_json,
            after=after,
            limit=limit,
            newest_first=newest_first,
            wanted=(lambda batch: batch.endpoint == endpoint) if endpoint else None,
        )

    async def remove(self, batch: Batch) -> None:
        """Delete a batch that has ended."""
        await self._documents.remove(KIND, batch.owner, batch.id)

    async def _read(self, owner: str, batch_id: str) -> tuple[bytes, Batch]:
        found = await self._documents.get(KIND, owner, batch_id)
        if found is None:
            raise BatchNotFound(f"Batch '{batch_id[:100]}' does not exist. `GET /v1/batches` lists your batches.")
        return found, Batch.model_validate_json(found)


def _encode(batch: Batch) -> bytes:
    return batch.model_dump_json(exclude_defaults=True).encode()
