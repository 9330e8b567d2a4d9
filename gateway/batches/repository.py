"""Where batches are written down: documents of their owners, changed by compare-and-set."""

from __future__ import annotations

from collections.abc import Callable

from backbone.store.documents import DocumentStore
from gateway.pagination import read_page
from schemas.batches import Batch
from schemas.errors import NotFound

KIND = "batch"


class BatchNotFound(NotFound):
    """There is no such batch."""

    code = "batch_not_found"


class BatchRepository:
    """Every call raises Unavailable while the store is away."""

    def __init__(self, documents: DocumentStore, keep_s: float) -> None:
        """`keep_s`: how long a batch is kept behind the end of its window."""
        self._documents = documents
        self._keep_s = keep_s

    async def add(self, batch: Batch) -> bool:
        """Write down a new batch. False: it is there."""
        keep_s = self._keep_s + batch.expires_at - batch.created_at
        return await self._documents.add(KIND, batch.owner, batch.id, _encode(batch), ttl_s=keep_s)

    async def get(self, owner: str, batch_id: str) -> Batch:
        """Raises BatchNotFound."""
        return (await self._read(owner, batch_id))[1]

    async def change(self, owner: str, batch_id: str, change: Callable[[Batch], Batch]) -> Batch:
        """What `change` makes of the batch as it stands, which is written, unless it is the same. `change` may be called again.

        Raises BatchNotFound, and what `change` raises.
        """
        while True:
            old, batch = await self._read(owner, batch_id)
            new = change(batch)
            if new is batch or await self._documents.swap(KIND, owner, batch_id, old, _encode(new)):
                return new

    async def page(self, owner: str, *, after: str, limit: int) -> tuple[list[Batch], bool]:
        """Up to `limit` batches behind the id `after`, newest first; whether there are more."""
        return await read_page(self._documents, KIND, owner, Batch.model_validate_json, after=after, limit=limit)

    async def _read(self, owner: str, batch_id: str) -> tuple[bytes, Batch]:
        found = await self._documents.get(KIND, owner, batch_id)
        if found is None:
            raise BatchNotFound(f"there is no batch '{batch_id[:100]}'")
        return found, Batch.model_validate_json(found)


def _encode(batch: Batch) -> bytes:
    return batch.model_dump_json(exclude_defaults=True).encode()
