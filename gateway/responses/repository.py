"""Stores responses: the initial response, the conversation so far, and finally the response itself.

A response is a document of its owner. Its large parts are blobs with the same retention time.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import orjson
import structlog
from pydantic import BaseModel, ConfigDict

from backbone.bus.blobs import INLINE_LIMIT_BYTES, BlobNotFound, BlobStore
from backbone.store.byte_quotas import ByteQuotas
from backbone.store.documents import DocumentStore
from gateway.responses.resource import response_id_of
from schemas.errors import NotFound

log = structlog.get_logger(__name__)

JSON = dict[str, Any]

KIND = "response"
MAX_DROPPED = 64
"""Responses that are deleted for one new response at most; the next one goes on."""
OVERHEAD_BYTES = 1024
"""Bytes that a stored response takes beside its parts."""
RESPONSE_ID = re.compile(r"resp_[0-9a-f]{32}")


class ResponseNotFound(NotFound):
    """The response does not exist, was not stored, or belongs to another owner."""

    code = "response_not_found"


class ResponseDocument(BaseModel):
    """A response as it is stored. One of each pair of fields is set."""

    model_config = ConfigDict(frozen=True)

    job: str
    head: JSON | None = None
    head_blob: str | None = None
    talk: JSON | None = None
    talk_blob: str | None = None
    talk_bytes: int = 0

    @property
    def blobs(self) -> list[str]:
        """Return the names of the parts that are blobs."""
        return [name for name in (self.head_blob, self.talk_blob) if name]


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A stored response."""

    owner: str
    raw: bytes
    """The stored bytes of the document."""
    document: ResponseDocument
    initial: JSON
    final: JSON | None
    """The final response. None until the job has ended and the response was read."""

    @property
    def id(self) -> str:
        """Return the response's id."""
        return str(self.initial["id"])

    @property
    def job(self) -> str:
        """Return the job's id."""
        return self.document.job


@dataclass(frozen=True, slots=True)
class CreatedResponse:
    """A response whose job is submitted."""

    owner: str
    job: str
    initial: JSON
    stored: StoredResponse | None
    """The stored response. None if the request set `store` to false."""
    bound_to_connection: bool
    """Whether the response ends with its caller's connection, because no other caller waits for it."""
    retain_none: bool = False
    """Nothing of the response is kept once it was delivered."""

    @property
    def id(self) -> str:
        """Return the response's id."""
        return str(self.initial["id"])


class _StoredPart(NamedTuple):
    """A stored part of a response: it is in the document, or in a blob."""

    inline: JSON | None
    blob: str | None
    size: int


class ResponseRepository:
    """Reads and writes stored responses."""

    def __init__(
        self, documents: DocumentStore, blobs: BlobStore, keep_s: float, quotas: ByteQuotas | None = None
    ) -> None:
        """`quotas` count the bytes of each owner's responses; None: they are not bounded."""
        self._documents = documents
        self._blobs = blobs
        self._keep_s = keep_s
        self._quotas = quotas

    async def add(self, owner: str, job: str, initial: JSON, talk: JSON, most: int | None = None) -> StoredResponse:
        """Store a new response, or return the one that already has its id. Raises Unavailable.

        The owner's oldest responses are deleted where all of them take more than `most` bytes.
        """
        response_id = response_id_of(job)
        head = await self._store_part({"shell": initial, "final": None})
        document = ResponseDocument(job=job, head=head.inline, head_blob=head.blob)
        try:
            conversation = await self._store_part(talk)
            update = {"talk": conversation.inline, "talk_blob": conversation.blob, "talk_bytes": conversation.size}
            document = document.model_copy(update=update)
            raw = _encode(document)
            added = await self._documents.add(KIND, owner, response_id, raw, ttl_s=self._keep_s)
            if added:
                await self._count(owner, response_id, head.size + conversation.size)
        except BaseException:
            self._remove_blobs(document.blobs)
            raise
        if not added:
            self._remove_blobs(document.blobs)
            return await self.get(owner, response_id)
        await self._make_room(owner, most)
        return StoredResponse(owner, raw, document, initial, None)

    async def _count(self, owner: str, response_id: str, size: int) -> None:
        if self._quotas is not None:
            await self._quotas.reserve(owner, response_id, OVERHEAD_BYTES + size, ttl_s=self._keep_s, most=None)

    async def _make_room(self, owner: str, most: int | None) -> None:
        """Delete the oldest responses of an owner that has too many bytes."""
        if self._quotas is None or most is None:
            return
        oldest = await self._quotas.oldest(owner, most, MAX_DROPPED)
        for response_id in oldest:
            raw = await self._documents.get(KIND, owner, response_id)
            await self._remove(owner, response_id, None if raw is None else ResponseDocument.model_validate_json(raw))
        if oldest:
            log.warning("responses.dropped", owner=owner, responses=len(oldest), max_bytes=most)

    async def get(self, owner: str, response_id: str) -> StoredResponse:
        """Return a stored response. Raises ResponseNotFound, Unavailable."""
        try:
            return await self._get(owner, response_id)
        except BlobNotFound:
            pass  # the response ended in the meantime, and its parts were replaced
        try:
            return await self._get(owner, response_id)
        except BlobNotFound:
            raise ResponseNotFound(
                f"Response with id '{response_id}' has been deleted after its retention time."
            ) from None

    async def _get(self, owner: str, response_id: str) -> StoredResponse:
        raw = await self._documents.get(KIND, owner, response_id) if RESPONSE_ID.fullmatch(response_id) else None
        if raw is None:
            raise ResponseNotFound(f"Response with id '{response_id[:100]}' not found.")
        document = ResponseDocument.model_validate_json(raw)
        head = await self._load_part(document.head, document.head_blob)
        return StoredResponse(owner, raw, document, head["shell"], head["final"])

    async def talk(self, stored: StoredResponse) -> JSON:
        """Return the conversation: the chat `messages` so far, and the request's `input`. Raises BlobNotFound, Unavailable."""
        return await self._load_part(stored.document.talk, stored.document.talk_blob)

    async def finish(self, stored: StoredResponse, final: JSON) -> JSON:
        """Store the final response and return the stored one. The first one wins, unless it has failed. Raises Unavailable."""
        head = await self._store_part({"shell": stored.initial, "final": final})
        document = stored.document.model_copy(update={"head": head.inline, "head_blob": head.blob})
        while not await self._documents.swap(KIND, stored.owner, stored.id, stored.raw, _encode(document)):
            try:
                stored = await self.get(stored.owner, stored.id)
            except ResponseNotFound:  # deleted in the meantime
                self._remove_blobs([head.blob])
                return final
            if stored.final is not None and stored.final["status"] != "failed":
                self._remove_blobs([head.blob])
                return stored.final
        self._remove_blobs([stored.document.head_blob])
        await self._count(stored.owner, stored.id, head.size + document.talk_bytes)
        return final

    async def remove(self, stored: StoredResponse) -> bool:
        """Delete a response. Return False if it was already deleted. Raises Unavailable."""
        return await self._remove(stored.owner, stored.id, stored.document)

    async def _remove(self, owner: str, response_id: str, document: ResponseDocument | None) -> bool:
        self._remove_blobs(document.blobs if document is not None else ())
        removed = await self._documents.remove(KIND, owner, response_id)
        if self._quotas is not None:
            await self._quotas.release(owner, response_id)
        return removed

    async def _store_part(self, value: JSON) -> _StoredPart:
        """Store a part."""
        data = orjson.dumps(value)
        if len(data) <= INLINE_LIMIT_BYTES // 4:
            return _StoredPart(value, None, len(data))
        writer = self._blobs.writer(ttl_s=self._keep_s)
        try:
            await writer.write(data)
            return _StoredPart(None, (await writer.close()).name, len(data))
        except BaseException:
            await writer.abort()
            raise

    async def _load_part(self, inline: JSON | None, blob: str | None) -> JSON:
        if blob is None:
            return inline or {}
        value: JSON = orjson.loads(b"".join([piece async for piece in self._blobs.read(blob)]))
        return value

    def _remove_blobs(self, blobs: Iterable[str | None]) -> None:
        for name in blobs:
            if name:
                self._blobs.remove(name)


def _encode(document: ResponseDocument) -> bytes:
    return orjson.dumps(document.model_dump(exclude_none=True))
