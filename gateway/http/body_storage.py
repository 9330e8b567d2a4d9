"""Count the bytes of large request bodies against their owner's limit while they are stored for their jobs."""

from __future__ import annotations

from contextlib import suppress

from backbone.bus.blobs import BlobInfo, BlobWriter
from backbone.ids import new_token
from backbone.store.byte_quotas import ByteQuotas
from schemas.errors import RateLimited, Unavailable

STEP_BYTES = 4 * 1024 * 1024
"""Bytes that are reserved at a time: the quotas are asked once for so many."""


class BodyStorageFull(RateLimited):
    """The large request bodies of a team have reached its limit. Retry when some of them have been answered."""

    code = "storage_limit_reached"
    retry_after_s = 5.0


def stored_item(blob: str) -> str:
    """Return the name under which a stored blob counts: its name without its key."""
    return blob.rpartition(".")[0] or blob


class CountedBlobWriter:
    """Writes a blob as `inner` does, and counts it. It counts until it is aborted, or the job that it belongs to has ended.

    While the quotas are unavailable nothing is counted: a request never fails because of that.
    """

    def __init__(self, inner: BlobWriter, quotas: ByteQuotas, owner: str, most: int, ttl_s: float) -> None:
        self._inner = inner
        self._quotas = quotas
        self._owner = owner
        self._most = most
        self._ttl_s = ttl_s
        self._item = new_token()
        self._size = self._reserved = 0

    async def write(self, data: bytes) -> None:
        """Append bytes; see `BlobWriter`. Raises BodyStorageFull."""
        self._size += len(data)
        if self._size > self._reserved:
            await self._reserve()
        await self._inner.write(data)

    async def close(self) -> BlobInfo:
        """Make the blob readable; see `BlobWriter`. From now on it counts under its name."""
        info = await self._inner.close()
        before, self._item = self._item, stored_item(info.name)
        with suppress(Unavailable):
            await self._quotas.reserve(self._owner, self._item, info.size, ttl_s=self._ttl_s, most=None)
            await self._quotas.release(self._owner, before)
        return info

    async def abort(self) -> None:
        """Delete what was written; see `BlobWriter`."""
        await self._inner.abort()
        with suppress(Unavailable):
            await self._quotas.release(self._owner, self._item)

    async def _reserve(self) -> None:
        with suppress(Unavailable):
            for wanted in (self._size + STEP_BYTES, self._size):
                if await self._quotas.reserve(self._owner, self._item, wanted, ttl_s=self._ttl_s, most=self._most):
                    self._reserved = wanted
                    return
            raise BodyStorageFull(
                f"The request bodies over 512 KiB that your team has in flight would take more than {self._most} bytes, its "
                "limit. Retry when some of them have been answered."
            )
