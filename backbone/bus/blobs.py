"""The blob protocol: payloads that are too large for a message are stored in the object store `nexus-blobs`, and passed by
name.

Guarantees of every implementation:
- No blob is whole in memory: a writer holds a few chunks and waits for the store; a reader holds a few chunks and fetches more
  once they were consumed.
- A blob can be read once its writer was closed; before that it does not exist. Its bytes are verified.
- Names are unguessable (128 random bits) and hold the key that decrypts the blob: only the holder of a name can read its blob.
  A gateway writes anywhere; a worker only below its own name.
- A blob is deleted about `ttl_s` after its first byte was written, even if every process has died; `remove` deletes it now. An
  aborted writer, or one whose process died, leaves nothing behind after `ttl_s` either.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import ClassVar, Protocol

from pydantic import BaseModel, ConfigDict

from schemas.errors import BackendFailed, NotFound

INLINE_LIMIT_BYTES = 512 * 1024
"""Larger bodies and answers travel as blobs."""
CHUNK_BYTES = 128 * 1024
"""Bytes of a blob in one message."""


class BlobInfo(BaseModel):
    """What the store knows about a blob without reading it."""

    model_config = ConfigDict(frozen=True)

    name: str
    size: int
    """Bytes."""
    content_type: str = "application/octet-stream"
    owner: str = ""


class BlobNotFound(NotFound):
    """This content does not exist any more: its lifetime has ended, or it was deleted."""

    code = "content_gone"


class BlobCorrupted(BackendFailed):
    """Stored content was lost or damaged, or its time ended while it was read; send the request again."""

    code: ClassVar[str | None] = "content_broken"


class BlobWriter(Protocol):
    """A blob that is being written. `close` or `abort` it; if `write` or `close` raised, `abort` it."""

    async def write(self, data: bytes) -> None:
        """Append bytes, and return when few enough chunks are unconfirmed. Raises Unavailable, also when the store is full."""

    async def close(self) -> BlobInfo:
        """Make the blob readable: every byte is stored when this returns. Raises Unavailable."""

    async def abort(self) -> None:
        """Delete what was written. Idempotent, also after `close`; never raises."""


class BlobStore(Protocol):
    """Stores blobs; see the module's docstring for the guarantees."""

    def writer(self, *, ttl_s: float, content_type: str = "application/octet-stream", owner: str = "") -> BlobWriter:
        """Return a writer for a blob with a new name. Nothing is sent yet."""

    async def info(self, name: str) -> BlobInfo | None:
        """Return what is known about a blob; None: it does not exist (any more). Raises Unavailable."""

    def read(self, name: str) -> AsyncGenerator[bytes, None]:
        """Yield the bytes in chunks.

        Raises BlobNotFound before the first chunk, Unavailable, and BlobCorrupted in the middle; in that case at least the last
        chunk was not yielded. Close the generator (`aclosing`) if it may not be read to its end.
        """

    def remove(self, name: str, *, if_opened: bool = False) -> None:
        """Delete the blob soon. Best effort; never raises. `if_opened`: only if the key in the name decrypts it, for names that
        workers gave.
        """
