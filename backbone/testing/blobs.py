"""Implement blobs in memory, for fast tests, with the guarantees of NATS's within one event loop."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from hashlib import sha256

from backbone.bus.blobs import CHUNK_BYTES, BlobCorrupted, BlobInfo, BlobNotFound
from backbone.ids import new_token
from schemas.errors import Unavailable


@dataclass(slots=True)
class _Blob:
    """The chunks stored under a name. A blob without `info` is still being written."""

    expires_at: float
    chunks: list[bytes] = field(default_factory=list)
    info: BlobInfo | None = None
    digest: bytes = b""


class MemoryBlobStore:
    """Blobs that all sides share: see `backbone.bus.blobs.BlobStore`. `available = False` simulates an outage of NATS."""

    def __init__(self, *, max_bytes: int = 1024**3) -> None:
        self.available = True
        self.max_bytes = max_bytes
        self._blobs: dict[str, _Blob] = {}

    async def start(self) -> None:
        """Check that the store is available."""
        self.require()

    async def close(self) -> None:
        """Do nothing: there is no connection to close."""

    @property
    def connected(self) -> bool:
        return self.available

    def require(self) -> None:
        if not self.available:
            raise Unavailable("The memory store is away.")

    def chunks_by_name(self) -> dict[str, list[bytes]]:
        """Return the stored chunks of every blob that has not expired, finished or not. Tests damage them."""
        now = time.monotonic()
        self._blobs = {name: blob for name, blob in self._blobs.items() if blob.expires_at > now}
        return {name: blob.chunks for name, blob in self._blobs.items()}

    def find(self, name: str) -> _Blob | None:
        """Return a blob that has not expired, finished or not."""
        return self._blobs[name] if name in self.chunks_by_name() else None

    def create(self, name: str, ttl_s: float) -> _Blob:
        """Create an empty blob under a name."""
        self._blobs[name] = _Blob(time.monotonic() + ttl_s)
        return self._blobs[name]

    def writer(
        self, *, ttl_s: float, content_type: str = "application/octet-stream", owner: str = ""
    ) -> MemoryBlobWriter:
        return MemoryBlobWriter(self, ttl_s, content_type, owner)

    async def info(self, name: str) -> BlobInfo | None:
        self.require()
        blob = self.find(name)
        return blob.info if blob else None

    async def read(self, name: str) -> AsyncGenerator[bytes, None]:
        self.require()
        blob = self.find(name)
        if blob is None or blob.info is None:
            raise BlobNotFound
        digest, count = sha256(), len(blob.chunks)
        for number, chunk in enumerate(list(blob.chunks), 1):
            self.require()
            digest.update(chunk)
            if number == count and digest.digest() != blob.digest:
                raise BlobCorrupted
            yield chunk
        if digest.digest() != blob.digest:
            raise BlobCorrupted

    def remove(self, name: str, *, if_opened: bool = False) -> None:
        if self.available and (not if_opened or name in self._blobs):
            self._blobs.pop(name, None)


class MemoryBlobWriter:
    """Writes one blob: see `backbone.bus.blobs.BlobWriter`."""

    def __init__(self, store: MemoryBlobStore, ttl_s: float, content_type: str, owner: str) -> None:
        self._store = store
        self._ttl_s = ttl_s
        self._content_type = content_type
        self._owner = owner
        self.name = new_token()
        self._buffer = b""
        self._digest = sha256()
        self._blob: _Blob | None = None
        self._error: Unavailable | None = None
        self._info: BlobInfo | None = None
        self._aborted = False

    async def write(self, data: bytes) -> None:
        """Store whole chunks and buffer the rest."""
        self._require_open()
        self._buffer += data
        while len(self._buffer) >= CHUNK_BYTES:
            chunk, self._buffer = self._buffer[:CHUNK_BYTES], self._buffer[CHUNK_BYTES:]
            self._store_chunk(chunk)

    def _store_chunk(self, chunk: bytes) -> None:
        try:
            self._store.require()
            if (
                sum(len(one) for chunks in self._store.chunks_by_name().values() for one in chunks)
                > self._store.max_bytes
            ):
                raise Unavailable("The memory store is full. Raise max_bytes to give it more room.")
        except Unavailable as error:
            self._error = error
            raise
        self._digest.update(chunk)
        self._blob_in_progress().chunks.append(chunk)

    def _blob_in_progress(self) -> _Blob:
        if self._blob is None:
            self._blob = self._store.create(self.name, self._ttl_s)
        return self._blob

    async def close(self) -> BlobInfo:
        """Store the buffered rest and make the blob readable."""
        if self._info is not None:
            return self._info
        self._require_open()
        self._store.require()
        if self._buffer:
            self._store_chunk(self._buffer)
        blob = self._blob_in_progress()
        if self._store.find(self.name) is not blob:
            raise Unavailable(f"Writing the blob took longer than its lifetime of {self._ttl_s:g} s.")
        self._info = BlobInfo(
            name=self.name,
            size=sum(map(len, blob.chunks)),
            content_type=self._content_type,
            owner=self._owner,
        )
        blob.info, blob.digest = self._info, self._digest.digest()
        return self._info

    async def abort(self) -> None:
        self._aborted = True
        self._store.remove(self.name)

    def _require_open(self) -> None:
        if self._error is not None:
            raise self._error
        if self._info is not None or self._aborted:
            raise RuntimeError("The blob was closed or aborted. Create another writer.")
