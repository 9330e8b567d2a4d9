"""Blobs in memory, for fast tests: the same guarantees as NATS's, within one event loop."""

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
    """What is stored under a name; without `info` it is still being written."""

    expires_at: float
    chunks: list[bytes] = field(default_factory=list)
    info: BlobInfo | None = None
    digest: bytes = b""


class MemoryBlobStore:
    """See backbone.bus.blobs.BlobStore. Share one among all sides. `available = False` is a NATS that is away."""

    def __init__(self, *, max_bytes: int = 1024**3) -> None:
        self.available = True
        self.max_bytes = max_bytes
        self._blobs: dict[str, _Blob] = {}

    async def start(self) -> None:
        """As NATS's: fails while the store is away."""
        self.require()

    async def close(self) -> None:
        """Nothing to close."""

    @property
    def connected(self) -> bool:
        """Whether the store is there."""
        return self.available

    def require(self) -> None:
        """Raise Unavailable while the store is away."""
        if not self.available:
            raise Unavailable("the memory store is away")

    def stored(self) -> dict[str, list[bytes]]:
        """The chunks of every blob and half-written blob whose time has not ended, as they are kept: tests damage them."""
        now = time.monotonic()
        self._blobs = {name: blob for name, blob in self._blobs.items() if blob.expires_at > now}
        return {name: blob.chunks for name, blob in self._blobs.items()}

    def find(self, name: str) -> _Blob | None:
        """A blob or half-written blob whose time has not ended."""
        return self._blobs[name] if name in self.stored() else None

    def begin(self, name: str, ttl_s: float) -> _Blob:
        """Keep what will be written under a name."""
        self._blobs[name] = _Blob(time.monotonic() + ttl_s)
        return self._blobs[name]

    def writer(
        self, *, ttl_s: float, content_type: str = "application/octet-stream", owner: str = ""
    ) -> MemoryBlobWriter:
        """Begin a blob."""
        return MemoryBlobWriter(self, ttl_s, content_type, owner)

    async def info(self, name: str) -> BlobInfo | None:
        """What is known of it."""
        self.require()
        blob = self.find(name)
        return blob.info if blob else None

    async def read(self, name: str) -> AsyncGenerator[bytes, None]:
        """Its chunks, if they are still what was written."""
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
        """Forget it: here a name is its key."""
        if self.available and (not if_opened or name in self._blobs):
            self._blobs.pop(name, None)


class MemoryBlobWriter:
    """See backbone.bus.blobs.BlobWriter."""

    def __init__(self, store: MemoryBlobStore, ttl_s: float, content_type: str, owner: str) -> None:
        self._store = store
        self._ttl_s = ttl_s
        self._content_type = content_type
        self._owner = owner
        self.name = new_token()
        self._rest = b""
        self._digest = sha256()
        self._blob: _Blob | None = None
        self._error: Unavailable | None = None
        self._info: BlobInfo | None = None
        self._aborted = False

    async def write(self, data: bytes) -> None:
        """Store whole chunks, keep the rest."""
        self._require_open()
        self._rest += data
        while len(self._rest) >= CHUNK_BYTES:
            chunk, self._rest = self._rest[:CHUNK_BYTES], self._rest[CHUNK_BYTES:]
            self._send(chunk)

    def _send(self, chunk: bytes) -> None:
        try:
            self._store.require()
            if sum(len(one) for chunks in self._store.stored().values() for one in chunks) > self._store.max_bytes:
                raise Unavailable("the memory store is full; give it more room (max_bytes)")
        except Unavailable as error:
            self._error = error
            raise
        self._digest.update(chunk)
        self._begun().chunks.append(chunk)

    def _begun(self) -> _Blob:
        if self._blob is None:
            self._blob = self._store.begin(self.name, self._ttl_s)
        return self._blob

    async def close(self) -> BlobInfo:
        """Store what is left, and make it readable."""
        if self._info is not None:
            return self._info
        self._require_open()
        self._store.require()
        if self._rest:
            self._send(self._rest)
        blob = self._begun()
        if self._store.find(self.name) is not blob:
            raise Unavailable(f"writing took longer than the {self._ttl_s:g} s for which this was to be kept")
        self._info = BlobInfo(
            name=self.name,
            size=sum(map(len, blob.chunks)),
            content_type=self._content_type,
            owner=self._owner,
        )
        blob.info, blob.digest = self._info, self._digest.digest()
        return self._info

    async def abort(self) -> None:
        """Forget what was written."""
        self._aborted = True
        self._store.remove(self.name)

    def _require_open(self) -> None:
        if self._error is not None:
            raise self._error
        if self._info is not None or self._aborted:
            raise RuntimeError("this blob was closed or aborted")
