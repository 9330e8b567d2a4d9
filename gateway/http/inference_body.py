"""Read the body of an inference request into the form that travels to workers: validated, large parts by reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import orjson

from backbone.bus.blobs import INLINE_LIMIT_BYTES, BlobStore, BlobWriter
from backbone.store.byte_quotas import ByteQuotas
from gateway.http.asgi import Headers
from gateway.http.body_memory import BodyMemory, BodyShare
from gateway.http.body_storage import CountedBlobWriter
from gateway.http.multipart import ParsedForm, read_form
from gateway.http.remote_media import RemoteMedia
from gateway.http.request_body import (
    UNCHARGED_BYTES,
    Receive,
    parse_normalized,
    read_body,
    read_body_head,
    read_complete_body,
    stream_body,
    validate_body,
)
from schemas.endpoints import EndpointSpec, Translation
from schemas.errors import RequestTooLarge
from schemas.jobs import Upload

LARGE_BYTES = 1024 * 1024
"""Size above which a JSON body is charged to the check pool."""
PARSED_SIZE_FACTOR = 4
"""Memory that a JSON body takes while it is validated, in multiples of its size."""


@dataclass(slots=True)
class ReceivedRequest:
    """An inference request that was read and validated."""

    request: Any
    """An instance of the endpoint's schema."""
    body: bytes
    """Bytes that follow the envelope in the job's message."""
    body_size: int | None = None
    body_blob: str | None = None
    uploads: tuple[Upload, ...] = ()
    blobs: list[BlobWriter] = field(default_factory=list)
    body_blob_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """Bytes of the body and the files."""
        return len(self.body) + self.body_blob_bytes + sum(one.size for one in self.uploads if one.blob is not None)

    async def discard(self) -> None:
        """Remove the blobs that were stored for the request. Idempotent, never raises."""
        blobs, self.blobs = self.blobs, []
        for blob in blobs:
            await blob.abort()


@dataclass(frozen=True, slots=True)
class InferenceBodyReader:
    """Reads bodies of inference requests within bounds of size, time and memory."""

    blobs: BlobStore
    max_bytes: int
    timeout_s: float
    blob_ttl_s: float
    memory: BodyMemory
    media: RemoteMedia
    quotas: ByteQuotas | None = None
    """Counts the bodies that are stored as blobs."""
    owner: str = ""
    max_pending_bytes: int | None = None

    async def read(
        self,
        endpoint: EndpointSpec,
        headers: Headers,
        receive: Receive,
        *,
        has_arrived: bool,
        owner: str = "",
        max_pending_bytes: int | None = None,
    ) -> ReceivedRequest:
        """Read and validate a request's body.

        `has_arrived`: the body has arrived already. `owner`: whose memory it takes. `max_pending_bytes`: of all bodies of the owner
        that are stored as blobs.
        Raises InvalidRequest, UnsupportedEncoding, RequestTooLarge, RequestTimeout, RateLimited, Unavailable, CallerDisconnected; no blob is
        stored then.
        """
        new_writer = partial(self._writer, owner, max_pending_bytes)
        if endpoint.files:
            with self.memory.share(owner) as share:
                return await self._form(endpoint, headers, receive, share, new_writer)
        if has_arrived and not read_body_head(headers, self.max_bytes).encoding:
            return await self._json(endpoint, await read_complete_body(receive, self.max_bytes), new_writer)
        with self.memory.share(owner) as share:
            body = await self.read_body(headers, receive, share, has_arrived=has_arrived)
            return await self._json(endpoint, body, new_writer)

    def read_small(self, endpoint: EndpointSpec, body: bytes) -> ReceivedRequest | None:
        """Validate a small JSON body that has arrived. None: only `read` can read the request. Raises InvalidRequest."""
        if endpoint.files or len(body) > min(UNCHARGED_BYTES, self.max_bytes):
            return None
        request: Any
        request, body = parse_normalized(body, endpoint.schema)
        return None if self.media.find(request) else ReceivedRequest(request, body)

    async def read_body(self, headers: Headers, receive: Receive, share: BodyShare, *, has_arrived: bool) -> bytes:
        """Return the whole body of a JSON request. Keep `share` open while the body is in memory, parsed or not. Raises as `read`."""
        body = await read_body(headers, receive, self.max_bytes, self.timeout_s, has_arrived=has_arrived, share=share)
        if len(body) > LARGE_BYTES:
            await share.check(PARSED_SIZE_FACTOR * len(body))
        return body

    async def read_value(
        self, endpoint: EndpointSpec, value: dict[str, Any], uploads: tuple[Upload, ...] = ()
    ) -> ReceivedRequest:
        """Validate a request whose JSON body is part of another one: of a job, a batch's line, a response.

        Raises InvalidRequest, RequestTooLarge, RateLimited, Unavailable.
        """
        request: Any = validate_body(value, endpoint.schema)
        if endpoint.translation is not None:
            request, value = _translate(request, endpoint.translation)
        body = orjson.dumps(value)
        if len(body) > self.max_bytes:
            raise RequestTooLarge(f"The request is larger than the limit of {self.max_bytes} bytes.")
        body = await self.media.inline(request, body)
        received = ReceivedRequest(request, body, uploads=uploads, body_size=len(body) if uploads else None)
        if len(body) > INLINE_LIMIT_BYTES:
            await self._store_body(received, partial(self._writer, self.owner, self.max_pending_bytes))
        return received

    def with_blob_ttl(self, blob_ttl_s: float) -> InferenceBodyReader:
        """Return a reader that stores blobs for `blob_ttl_s`."""
        return replace(self, blob_ttl_s=blob_ttl_s)

    def of(self, owner: str, max_pending_bytes: int | None) -> InferenceBodyReader:
        """Return a reader whose `read_value` counts the bodies that it stores for `owner`; see `read`."""
        return replace(self, owner=owner, max_pending_bytes=max_pending_bytes)

    async def _json(self, endpoint: EndpointSpec, body: bytes, new_writer: Callable[[], BlobWriter]) -> ReceivedRequest:
        request: Any
        request, body = parse_normalized(body, endpoint.schema)
        if endpoint.translation is not None:
            request, value = _translate(request, endpoint.translation)
            body = orjson.dumps(value)
        body = await self.media.inline(request, body)
        received = ReceivedRequest(request, body)
        if len(body) > INLINE_LIMIT_BYTES:
            await self._store_body(received, new_writer)
        return received

    async def _store_body(self, received: ReceivedRequest, new_writer: Callable[[], BlobWriter]) -> None:
        """Store the body as a blob, so that it travels by reference."""
        writer = new_writer()
        received.blobs.append(writer)
        try:
            await writer.write(received.body)
            received.body_blob = (await writer.close()).name
            received.body_blob_bytes, received.body = len(received.body), b""
        except BaseException:
            await received.discard()
            raise

    async def _form(
        self,
        endpoint: EndpointSpec,
        headers: Headers,
        receive: Receive,
        share: BodyShare,
        new_writer: Callable[[], BlobWriter],
    ) -> ReceivedRequest:
        content_type = next((value for name, value in headers if name == b"content-type"), b"")
        form = ParsedForm()
        received = ReceivedRequest(None, b"", blobs=form.blobs)
        pieces = stream_body(headers, receive, self.max_bytes, self.timeout_s, share)
        try:
            await read_form(content_type, pieces, endpoint.files, new_writer, form, share=share)
            received.request = validate_body(form.fields, endpoint.schema)
            body = orjson.dumps(received.request.model_dump(mode="json", exclude_unset=True))
            body = await self.media.inline(received.request, body)
        except BaseException:
            await received.discard()
            raise
        received.uploads = tuple(form.uploads)
        received.body_size = len(body)
        received.body = b"".join((body, *form.inline))
        return received

    def _writer(self, owner: str, max_pending_bytes: int | None) -> BlobWriter:
        writer = self.blobs.writer(ttl_s=self.blob_ttl_s)
        if self.quotas is None or max_pending_bytes is None:
            return writer
        return CountedBlobWriter(writer, self.quotas, owner, max_pending_bytes, self.blob_ttl_s)


def _translate(request: Any, translation: Translation) -> tuple[Any, dict[str, Any]]:
    """Return the request that travels to the workers, checked, and its body. Raises InvalidRequest."""
    value = translation.request(request)
    return validate_body(value, translation.target.schema), value
