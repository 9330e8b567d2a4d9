"""Stores responses: the initial response, the conversation so far, and finally the response itself.

A response is a document of its owner. Its large parts are blobs with the same retention time.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import orjson
from pydantic import BaseModel, ConfigDict

from backbone.bus.blobs import INLINE_LIMIT_BYTES, BlobNotFound, BlobStore
from backbone.store.documents import DocumentStore
from gateway.responses.resource import response_id_of
from schemas.errors import NotFound

JSON = dict[str, Any]

KIND = "response"
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


class ResponseRepository:
    """Reads and writes stored responses."""

    def __init__(self, documents: DocumentStore, blobs: BlobStore, keep_s: float) -> None:
        self._documents = documents
        self._blobs = blobs
        self._keep_s = keep_s

    async def add(self, owner: str, job: str, initial: JSON, talk: JSON) -> StoredResponse:
        """Store a new response, or return the one that already has its id. Raises Unavailable."""
        head = {"shell": initial, "final": None}
        head_inline, head_blob = await self._store_part(head)
        document = ResponseDocument(job=job, head=head_inline, head_blob=head_blob)
        try:
            talk_inline, talk_blob = await self._store_part(talk)
            document = document.model_copy(update={"talk": talk_inline, "talk_blob": talk_blob})
            raw = _encode(document)
            added = await self._documents.add(KIND, owner, response_id_of(job), raw, ttl_s=self._keep_s)
        except BaseException:
            self._remove_blobs(document.blobs)
            raise
        if not added:
            self._remove_blobs(document.blobs)
            return await self.get(owner, response_id_of(job))
        return StoredResponse(owner, raw, document, initial, None)

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
        inline, blob = await self._store_part({"shell": stored.initial, "final": final})
        document = stored.document.model_copy(update={"head": inline, "head_blob": blob})
        while not await self._documents.swap(KIND, stored.owner, stored.id, stored.raw, _encode(document)):
            try:
                stored = await self.get(stored.owner, stored.id)
            except ResponseNotFound:  # deleted in the meantime
                self._remove_blobs([blob])
                return final
            if stored.final is not None and stored.final["status"] != "failed":
                self._remove_blobs([blob])
                return stored.final
        self._remove_blobs([stored.document.head_blob])
        return final

    async def remove(self, stored: StoredResponse) -> bool:
        """Delete a response. Return False if it was already deleted. Raises Unavailable."""
        self._remove_blobs(stored.document.blobs)
        return await self._documents.remove(KIND, stored.owner, stored.id)

    async def _store_part(self, value: JSON) -> tuple[JSON | None, str | None]:
        """Store a part and return it inline, or the name of its blob."""
        data = orjson.dumps(value)
        if len(data) <= INLINE_LIMIT_BYTES // 4:
            return value, None
        writer = self._blobs.writer(ttl_s=self._keep_s)
        try:
            await writer.write(data)
            return None, (await writer.close()).name
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
