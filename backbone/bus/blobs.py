"""The blob seam: what is too large for a message, by reference, in the object store `nexus-blobs`.

Guarantees, for every implementation:
- Nothing is whole in memory: a writer holds a few chunks, and waits for the store; a reader holds a few chunks, and
  fetches more only when they were taken.
- A blob can be read only once its writer was closed; before that it does not exist. Its bytes are checked against their digest.
- Names are unguessable (128 random bits). Whoever knows a name may read it.
- A blob vanishes after its `ttl_s`, whoever has died; `remove` makes it vanish now. A writer that was aborted, or whose
  process died, leaves nothing behind after `ttl_s` either.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

from pydantic import BaseModel, ConfigDict

INLINE_LIMIT = 512 * 1024
"""Bytes up to which bodies and answers travel in messages."""
CHUNK = 128 * 1024
"""Bytes of a blob in one message."""


class BlobInfo(BaseModel):
    """What is known of a blob without reading it."""

    model_config = ConfigDict(frozen=True)

    name: str
    size: int
    """Bytes."""
    content_type: str = "application/octet-stream"
    owner: str = ""


class BlobWriter(Protocol):
    """One blob in the making. `close` it or `abort` it."""

    async def write(self, data: bytes) -> None:
        """Append. Returns when few enough chunks are under way. Raises Unavailable, also when the store is full."""

    async def close(self) -> BlobInfo:
        """Make it readable. Raises Unavailable."""

    async def abort(self) -> None:
        """Remove what was written. Idempotent, also after `close`; never raises."""


class Blobs(Protocol):
    """See the module's docstring."""

    def writer(self, *, ttl_s: float, content_type: str = "application/octet-stream", owner: str = "") -> BlobWriter:
        """Begin a blob under a new name. Nothing is sent yet."""

    async def info(self, name: str) -> BlobInfo | None:
        """What is known of it; None when it does not exist (any more). Raises Unavailable."""

    def read(self, name: str) -> AsyncIterator[bytes]:
        """Its bytes, in chunks. Raises BlobGone before the first when it does not exist, Unavailable; BlobBroken in the middle."""

    def remove(self, name: str) -> None:
        """Delete it soon. Best effort; never raises."""
