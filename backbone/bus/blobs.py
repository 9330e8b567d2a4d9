"""The blob seam: what is too large for a message, by reference, in the object store `nexus-blobs`.

Guarantees, for every implementation:
- Nothing is whole in memory: a writer holds a few chunks, and waits for the store; a reader holds a few chunks, and
  fetches more only when they were taken.
- A blob can be read only once its writer was closed; before that it does not exist. Its bytes are checked against their digest.
- Names are unguessable (128 random bits) and hold the key that opens the blob: who knows a name may read it, and nobody
  else can, whatever else he can read. Only gateways write where gateways wrote; a worker, where it wrote itself.
- A blob vanishes `ttl_s` after its first byte was written, whoever has died (give or take a few seconds); `remove` makes
  it vanish now. A writer that was aborted, or whose process died, leaves nothing behind after `ttl_s` either.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import ClassVar, Protocol

from pydantic import BaseModel, ConfigDict

from schemas.errors import BackendFailed, NotFound

INLINE_LIMIT_BYTES = 512 * 1024
"""Bytes up to which bodies and answers travel in messages."""
CHUNK_BYTES = 128 * 1024
"""Bytes of a blob in one message."""


class BlobInfo(BaseModel):
    """What is known of a blob without reading it."""

    model_config = ConfigDict(frozen=True)

    name: str
    size: int
    """Bytes."""
    content_type: str = "application/octet-stream"
    owner: str = ""


class BlobNotFound(NotFound):
    """This content does not exist any more: the time for which it is kept has ended, or it was deleted."""

    code = "content_gone"


class BlobCorrupted(BackendFailed):
    """Stored content was lost or damaged, or its time ended while it was read; send the request again."""

    code: ClassVar[str | None] = "content_broken"


class BlobWriter(Protocol):
    """One blob in the making. `close` it or `abort` it; where either of `write` and `close` raised, `abort` it."""

    async def write(self, data: bytes) -> None:
        """Append. Returns when few enough chunks are under way. Raises Unavailable, also when the store is full."""

    async def close(self) -> BlobInfo:
        """Make it readable: every byte is stored when this returns. Raises Unavailable."""

    async def abort(self) -> None:
        """Remove what was written. Idempotent, also after `close`; never raises."""


class BlobStore(Protocol):
    """See the module's docstring."""

    def writer(self, *, ttl_s: float, content_type: str = "application/octet-stream", owner: str = "") -> BlobWriter:
        """Begin a blob under a new name. Nothing is sent yet."""

    async def info(self, name: str) -> BlobInfo | None:
        """What is known of it; None when it does not exist (any more). Raises Unavailable."""

    def read(self, name: str) -> AsyncGenerator[bytes, None]:
        """Its bytes, in chunks. Raises BlobNotFound before the first when it does not exist, Unavailable; BlobCorrupted in the
        middle, and then at least the last chunk was not given out. Close it (`aclosing`) where it may not be read to its end.
        """

    def remove(self, name: str, *, if_opened: bool = False) -> None:
        """Delete it soon. Best effort; never raises. `if_opened`: only where the name's key opens it; of names that workers give."""
