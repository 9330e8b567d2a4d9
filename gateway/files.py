"""Store callers' files: a blob for the bytes and a document for the record, both until `expires_at`; and resolve file ids in requests."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from backbone.bus.blobs import BlobStore, BlobWriter
from backbone.ids import new_job_id
from backbone.store.byte_quotas import ByteQuotas
from backbone.store.documents import DocumentStore
from gateway import clock
from gateway.http.asgi import Headers
from gateway.http.body_memory import BodyMemory, BodyShare
from gateway.http.multipart import ParsedForm, read_form
from gateway.http.request_body import CallerDisconnected, Receive, stream_body, validate_body
from gateway.pagination import read_page
from schemas.endpoints import EndpointSpec
from schemas.errors import InvalidRequest, NotFound, RequestTooLarge, Unavailable
from schemas.files import UPLOAD_PURPOSES, ExpiresAfter, FileRecord, UploadFields
from schemas.jobs import Upload

KIND = "file"
FORM_MARGIN = 64 * 1024
"""Bytes of an upload's form beside its file."""
RECORD_BYTES = 1024
"""Bytes that a file or a batch takes beside its content."""
RESERVED_STEP_BYTES = 4 * 1024 * 1024
"""Bytes that an upload reserves at a time: it asks the store once for so many."""
MAX_UPLOAD_S = 86_400.0
"""Time after which the reservation of an upload whose gateway died ends."""
MAX_NAME = 255
"""Bytes of a filename."""
CONTROL = frozenset({"Cc", "Cs", "Zl", "Zp"})
"""Unicode's categories of characters that would break a line or a terminal."""

_INNER = re.compile(r"([^\[\]]+)\[([^\[\]]+)\]")


class StorageFull(RequestTooLarge):
    """The team has no room for the file. Delete other files first."""

    code = "storage_limit_reached"
    should_retry = False


class FileNotFound(NotFound):
    """There is no such file, or it has expired."""

    code = "file_not_found"


def new_file_id() -> str:
    """Return a new file id: `file-` and a UUIDv7 in hex."""
    return "file-" + new_job_id().removeprefix("job_")


@dataclass(frozen=True, slots=True)
class FileStore:
    """Uploads, reads, lists and deletes files. Every method raises Unavailable while NATS or Redis is unavailable."""

    documents: DocumentStore
    blobs: BlobStore
    max_bytes: int
    keep_s: float
    """Longest lifetime of a file."""
    memory: BodyMemory
    quotas: ByteQuotas
    timeout_s: float
    """Timeout of an upload's first bytes; later bytes extend it at `request_body.MIN_UPLOAD_RATE`."""

    async def upload(
        self, owner: str, headers: Headers, receive: Receive, max_stored_bytes: int | None = None
    ) -> FileRecord:
        """Store the file of a multipart form, which is never whole in memory. `max_stored_bytes`: of all files of the owner.

        Raises InvalidRequest, UnsupportedEncoding, RequestTooLarge, StorageFull, RequestTimeout, Unavailable; no file is stored then.
        """
        form = ParsedForm()
        file_id = new_file_id()
        reservation = _Reservation(self.quotas, owner, file_id, max_stored_bytes)
        with self.memory.share(owner) as share:
            try:
                return await self._read(owner, file_id, headers, receive, form, share, reservation)
            except BaseException:
                with suppress(Unavailable):
                    await self.quotas.release(owner, file_id)
                raise

    async def write(
        self,
        owner: str,
        pieces: AsyncIterator[bytes],
        *,
        filename: str,
        purpose: str,
        content_type: str,
        max_stored_bytes: int | None,
    ) -> FileRecord:
        """Store bytes that came in another form than an upload. Raises StorageFull, Unavailable and the errors of `pieces`; no file is stored then."""
        file_id = new_file_id()
        writer, size = self.writer(owner, self.keep_s), 0
        try:
            async for piece in _Reservation(self.quotas, owner, file_id, max_stored_bytes).counted(pieces):
                size += len(piece)
                await writer.write(piece)
            return await self.add(
                owner,
                blob=(await writer.close()).name,
                size=size,
                filename=filename,
                purpose=purpose,
                keep_s=self.keep_s,
                content_type=content_type,
                file_id=file_id,
            )
        except BaseException:
            await writer.abort()
            with suppress(Unavailable):
                await self.quotas.release(owner, file_id)
            raise

    async def _read(
        self,
        owner: str,
        file_id: str,
        headers: Headers,
        receive: Receive,
        form: ParsedForm,
        share: BodyShare,
        reservation: _Reservation,
    ) -> FileRecord:
        content_type = next((value for name, value in headers if name == b"content-type"), b"")
        pieces = reservation.counted(stream_body(headers, receive, self.max_bytes + FORM_MARGIN, self.timeout_s, share))

        def writer() -> BlobWriter:
            # A lifetime that comes behind the file in the form applies to the record alone, not to the bytes.
            return self.writer(owner, _requested_keep_s(form.fields, self.keep_s))

        try:
            await read_form(content_type, pieces, ("file",), writer, form, inline_limit=0, share=share)
            return await self._store(owner, file_id, form)
        except BaseException as error:
            for blob in form.blobs:
                await blob.abort()
            if isinstance(error, CallerDisconnected):
                raise InvalidRequest("The upload is not complete: the connection was closed.") from None
            raise

    async def _store(self, owner: str, file_id: str, form: ParsedForm) -> FileRecord:
        fields = validate_body(_nest_fields(form.fields), UploadFields)
        if fields.purpose not in UPLOAD_PURPOSES:
            raise InvalidRequest(
                f"'{fields.purpose[:100]}' is not a purpose of an upload. Use one of: {', '.join(UPLOAD_PURPOSES)}.",
                param="purpose",
            )
        if len(form.uploads) > 1:
            raise InvalidRequest(f"The form has {len(form.uploads)} files. Upload one file per request.", param="file")
        upload = form.uploads[0]
        if upload.size > self.max_bytes:
            raise RequestTooLarge(f"The file is larger than the limit of {self.max_bytes} bytes.", param="file")
        keep_s = self.granted_keep_s(fields.expires_after)
        return await self.add(
            owner,
            blob=upload.blob or "",
            size=upload.size,
            filename=_filename(upload),
            purpose=fields.purpose,
            content_type=upload.content_type,
            keep_s=keep_s,
            file_id=file_id,
        )

    def granted_keep_s(self, wanted: ExpiresAfter | None) -> float:
        """Return the lifetime of a file in seconds: the requested one, up to the longest."""
        return min(self.keep_s, wanted.seconds) if wanted is not None else self.keep_s

    def writer(self, owner: str, keep_s: float) -> BlobWriter:
        """Return the writer of a file's bytes."""
        return self.blobs.writer(ttl_s=keep_s, owner=owner)

    async def add(
        self,
        owner: str,
        *,
        blob: str,
        size: int,
        filename: str,
        purpose: str,
        keep_s: float,
        content_type: str = "application/octet-stream",
        file_id: str = "",
    ) -> FileRecord:
        """Make a written blob a file. An existing file with this `file_id` is replaced, and its bytes are removed."""
        now = int(clock.now())
        file_id = file_id or new_file_id()
        # It is stored already.
        await self.quotas.reserve(owner, file_id, size + RECORD_BYTES, ttl_s=keep_s, most=None)
        record = FileRecord(
            id=file_id,
            filename=filename,
            purpose=purpose,
            size=size,
            blob=blob,
            content_type=content_type,
            created_at=now,
            expires_at=now + int(keep_s),
        )
        old = await self.documents.get(KIND, owner, file_id)
        await self.documents.put(KIND, owner, record.id, record.model_dump_json().encode(), ttl_s=keep_s)
        if old is not None:
            self.blobs.remove(FileRecord.model_validate_json(old).blob)
        return record

    async def count_record(self, owner: str, item: str, keep_s: float, most: int | None) -> None:
        """Count a record that is stored beside an owner's files for `keep_s`. Raises StorageFull."""
        if not await self.quotas.reserve(owner, item, RECORD_BYTES, ttl_s=keep_s, most=most):
            raise StorageFull(_full(most))

    async def open(self, owner: str, file_id: str, *, param: str | None = None) -> FileRecord:
        """Return a file's record. The file owns its blob: pass it to a job only as `Upload.kept`. Raises FileNotFound."""
        found = await self.documents.get(KIND, owner, file_id)
        if found is None:
            raise FileNotFound(f"There is no file '{file_id[:100]}'. It may have expired.", param=param)
        return FileRecord.model_validate_json(found)

    def read(self, record: FileRecord) -> AsyncGenerator[bytes, None]:
        """Yield a file's bytes, as `BlobStore.read` does."""
        return self.blobs.read(record.blob)

    async def page(
        self, owner: str, *, after: str, limit: int, newest_first: bool, purpose: str
    ) -> tuple[list[FileRecord], bool]:
        """Return up to `limit` files after the id `after`, and whether there are more. `purpose`: empty for any."""
        return await read_page(
            self.documents,
            KIND,
            owner,
            FileRecord.model_validate_json,
            after=after,
            limit=limit,
            newest_first=newest_first,
            wanted=(lambda record: record.purpose == purpose) if purpose else None,
        )

    async def remove(self, owner: str, file_id: str) -> None:
        """Delete a file. Raises FileNotFound."""
        record = await self.open(owner, file_id)
        if not await self.documents.remove(KIND, owner, file_id):
            raise FileNotFound(f"There is no file '{file_id[:100]}'. It may have expired.")
        self.blobs.remove(record.blob)
        await self.quotas.release(owner, file_id)


class _Reservation:
    """Reserves an owner's bytes for an upload while it arrives, some ahead of those that came."""

    def __init__(self, quotas: ByteQuotas, owner: str, file_id: str, most: int | None) -> None:
        self._quotas = quotas
        self._owner = owner
        self._file_id = file_id
        self._most = most
        self._reserved = 0

    async def counted(self, pieces: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
        """Yield the pieces. Raises StorageFull before one that has no room."""
        size = 0
        async for piece in pieces:
            size += len(piece)
            if size > self._reserved:
                await self._reserve(size)
            yield piece

    async def _reserve(self, size: int) -> None:
        step = RESERVED_STEP_BYTES if size > FORM_MARGIN else 0  # a small file reserves what it needs
        for wanted in (size + step, size):
            if await self._quotas.reserve(self._owner, self._file_id, wanted, ttl_s=MAX_UPLOAD_S, most=self._most):
                self._reserved = wanted
                return
        raise StorageFull(_full(self._most), param="file")


def _full(most: int | None) -> str:
    return f"The files and batches of your team would take more than {most} bytes, its limit. Delete some of the files first."


def _nest_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """Return a form's fields with `a[b]` as `{"a": {"b": …}}`. Raises InvalidRequest."""
    found: dict[str, Any] = {}
    for name, value in fields.items():
        match = _INNER.fullmatch(name)
        if match is None:
            found[name] = value
            continue
        outer = found.setdefault(match[1], {})
        if not isinstance(outer, dict):
            raise InvalidRequest(
                f"The form has both a field '{match[1][:100]}' and fields '{match[1][:100]}[…]'. Send one form of it.",
                param=match[1][:100],
            )
        outer[match[2]] = value
    return found


def _requested_keep_s(fields: dict[str, Any], longest: float) -> float:
    seconds = fields.get("expires_after[seconds]")
    if isinstance(seconds, str) and seconds.isascii() and seconds.isdigit() and len(seconds) < 10:
        return max(60.0, min(longest, float(seconds)))
    return longest


def _filename(upload: Upload) -> str:
    """Return the last segment of the uploaded file's path. Raises InvalidRequest."""
    name = re.split(r"[/\\]", upload.filename)[-1].strip()
    if not name and not upload.filename:
        return "upload"
    has_control = any(unicodedata.category(character) in CONTROL for character in name)
    if name in ("", ".", "..") or has_control or len(name.encode()) > MAX_NAME:
        raise InvalidRequest(
            f"A file's name must have 1 to {MAX_NAME} bytes without control characters, not {upload.filename[:100]!r}.",
            param="file",
        )
    return name


MAX_FILES = 16
"""Files of one field: as many as OpenAI accepts images for an edit."""


class StoredFile(Protocol):
    """The part of an uploaded file that a job needs."""

    @property
    def filename(self) -> str:
        """Name of the uploaded file."""

    @property
    def content_type(self) -> str:
        """Content type of the uploaded file."""

    @property
    def size(self) -> int:
        """Size in bytes."""

    @property
    def blob(self) -> str:
        """Name of the blob with the file's bytes."""


OpenFile = Callable[[str, str], Awaitable[StoredFile]]
"""Returns the file with an id that an owner has: `(owner, file_id)`. Raises NotFound."""


class FileReferences:
    """Replaces file ids in a request's JSON body by the files' blobs, for endpoints that take forms."""

    def __init__(self, open_file: OpenFile) -> None:
        self._open = open_file

    async def resolve(
        self, owner: str, endpoint: EndpointSpec, body: dict[str, Any]
    ) -> tuple[dict[str, Any], tuple[Upload, ...]]:
        """Return the body without its file fields, and the files as uploads. Raises InvalidRequest, NotFound."""
        fields = {name: value for name, value in body.items() if name not in endpoint.files}
        uploads: list[Upload] = []
        for name in endpoint.files:
            given = body.get(name)
            ids = given if isinstance(given, list) else [given] if given is not None else []
            if len(ids) > MAX_FILES:
                raise InvalidRequest(f"'{name}' names more than {MAX_FILES} files.", param=name)
            for file_id in ids:
                if not isinstance(file_id, str):
                    raise InvalidRequest(
                        f"'{name}' must be the id of an uploaded file. Upload the file with POST /v1/files first.",
                        param=name,
                    )
                file = await self._open(owner, file_id)
                uploads.append(_upload(name, file))
        if not any(upload.field == endpoint.files[0] for upload in uploads):
            raise InvalidRequest(
                f"'{endpoint.files[0]}' is missing. Upload the file with POST /v1/files, and set it to the file's id.",
                param=endpoint.files[0],
            )
        return fields, tuple(uploads)


def _upload(field: str, file: StoredFile) -> Upload:
    kind = file.content_type
    return Upload(field=field, filename=file.filename, content_type=kind, size=file.size, blob=file.blob, kept=True)
