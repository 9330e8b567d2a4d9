"""Parse multipart forms as they arrive: fields into memory, files into the job's message or, when large, into blobs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from backbone.bus.blobs import CHUNK_BYTES, INLINE_LIMIT_BYTES, BlobWriter
from gateway.http.body_memory import BodyShare
from schemas.errors import InvalidRequest
from schemas.jobs import Upload

MAX_PARTS = 128
MAX_FIELDS = 1024 * 1024
"""Bytes of all fields that are not files."""
MAX_PART_HEAD = 8 * 1024

MakeWriter = Callable[[], BlobWriter]


@dataclass(slots=True)
class ParsedForm:
    """Fields and files of a form."""

    fields: dict[str, Any] = field(default_factory=dict)
    """Text by name; a list if a name came more than once or ends in `[]`, which is dropped."""
    uploads: list[Upload] = field(default_factory=list)
    inline: list[bytes] = field(default_factory=list)
    """Bytes of the uploads that are not blobs, in order."""
    blobs: list[BlobWriter] = field(default_factory=list)
    """Every blob that was begun. A caller that does not use the form must abort them."""


async def read_form(
    content_type: bytes,
    pieces: AsyncIterator[bytes],
    files: tuple[str, ...],
    make_writer: MakeWriter,
    form: ParsedForm,
    *,
    inline_limit: int = INLINE_LIMIT_BYTES,
    share: BodyShare | None = None,
) -> None:
    """Fill `form` from a body of `content_type`. `pieces` are charged to `share`; bytes that leave memory are removed from it.

    `files`: fields that may hold files. Files become blobs beyond `inline_limit` bytes in total.
    Raises InvalidRequest, Unavailable, and the errors of `pieces`; `form.blobs` then holds the blobs that were begun.
    """
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise InvalidRequest(
            f"Send this request as multipart/form-data (with a boundary), not as '{kind[:80].decode('latin-1')}'."
        )
    reader = _FormReader(files, make_writer, form, inline_limit)
    try:
        parser = MultipartParser(boundary, reader.callbacks())  # type: ignore[arg-type]
        async for data in pieces:
            before = reader.buffered
            parser.write(data)
            await reader.flush()
            if share is not None:
                share.remove(min(share.reserved, len(data) - (reader.buffered - before)))
        parser.finalize()
    except FormParserError as error:
        raise InvalidRequest(f"The request's body is not a valid multipart form: {error}") from error
    if not reader.ended:
        raise InvalidRequest("The multipart form ended before it was complete.")
    for name in files[:1]:
        if not any(upload.field == name for upload in form.uploads):
            raise InvalidRequest(f"The form lacks the file '{name}'.", param=name)


class _FormReader:
    """Receives the parser's callbacks for one form and queues its parts; `flush` stores them."""

    def __init__(self, files: tuple[str, ...], make_writer: MakeWriter, form: ParsedForm, inline_limit: int) -> None:
        self._files = files
        self._inline_limit = inline_limit
        self._make_writer = make_writer
        self._form = form
        self._part: _FormPart | None = None
        self._parts = 0
        self._fields_size = 0
        self._inline_size = 0
        self._name = b""
        self._value = b""
        self._headers: dict[bytes, bytes] = {}
        self._events: list[tuple[_FormPart, bytes | None]] = []
        self.ended = False

    def callbacks(self) -> dict[str, Callable[..., None]]:
        """Return the parser's callbacks."""
        return {
            "on_part_begin": self._on_part_begin,
            "on_header_field": self._on_header_field,
            "on_header_value": self._on_header_value,
            "on_header_end": self._on_header_end,
            "on_headers_finished": self._on_headers_finished,
            "on_part_data": self._on_part_data,
            "on_part_end": self._on_part_end,
            "on_end": self._on_end,
        }

    def _on_part_begin(self) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise InvalidRequest(f"The form has more than {MAX_PARTS} parts.")
        self._headers = {}

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]
        self._bound_head()

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]
        self._bound_head()

    def _bound_head(self) -> None:
        if len(self._name) + len(self._value) > MAX_PART_HEAD:
            raise InvalidRequest(f"A part of the form has a header larger than {MAX_PART_HEAD} bytes.")

    def _on_header_end(self) -> None:
        self._headers[self._name.lower()] = self._value
        self._name = self._value = b""

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition"))
        raw = options.get(b"name", b"").decode("utf-8", "replace")
        if not raw:
            raise InvalidRequest("A part of the form has no name.")
        name = raw.removesuffix("[]")
        filename = options.get(b"filename")
        is_file = name in self._files
        if filename is not None and not is_file:
            raise InvalidRequest(
                f"'{name[:100]}' is not a file of this endpoint. It accepts {', '.join(self._files)}.", param=name[:100]
            )
        self._part = _FormPart(
            name,
            raw.endswith("[]"),
            (filename or b"").decode("utf-8", "replace") if is_file else None,
            self._headers.get(b"content-type", b"application/octet-stream").decode("latin-1"),
        )

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        assert self._part is not None
        self._events.append((self._part, data[start:end]))

    def _on_part_end(self) -> None:
        assert self._part is not None
        self._events.append((self._part, None))

    def _on_end(self) -> None:
        self.ended = True

    @property
    def buffered(self) -> int:
        """Bytes of the form in memory."""
        part = self._part
        writing = min(part.size, CHUNK_BYTES) if part is not None and part.writer is not None else 0
        return self._fields_size + self._inline_size + writing

    async def flush(self) -> None:
        """Store the queued parts: fields into the form, files inline or into blobs."""
        events, self._events = self._events, []
        for part, data in events:
            if data is None:
                await self._end(part)
            elif part.filename is None:
                self._fields_size += len(data)
                if self._fields_size > MAX_FIELDS:
                    raise InvalidRequest(f"The form's fields are larger than {MAX_FIELDS} bytes.", param=part.name)
                part.pieces.append(data)
            else:
                await self._file_data(part, data)

    async def _file_data(self, part: _FormPart, data: bytes) -> None:
        part.size += len(data)
        if part.writer is None:
            part.pieces.append(data)
            self._inline_size += len(data)
            if self._inline_size <= self._inline_limit:
                return
            part.writer = self._make_writer()
            self._form.blobs.append(part.writer)
            self._inline_size -= part.size
            data = b"".join(part.pieces)
            part.pieces = []
        await part.writer.write(data)

    async def _end(self, part: _FormPart) -> None:
        form = self._form
        if part.filename is None:
            self._add_field(part, b"".join(part.pieces))
            return
        if part.size == 0:
            raise InvalidRequest(f"The file '{part.name}' is empty.", param=part.name)
        blob: str | None = None
        if part.writer is not None:
            blob = (await part.writer.close()).name
        else:
            form.inline.extend(part.pieces)
        form.uploads.append(
            Upload(field=part.name, filename=part.filename, content_type=part.content_type, size=part.size, blob=blob)
        )

    def _add_field(self, part: _FormPart, data: bytes) -> None:
        try:
            value = data.decode()
        except UnicodeDecodeError as error:
            raise InvalidRequest(f"The field '{part.name[:100]}' is not UTF-8 text.", param=part.name[:100]) from error
        fields = self._form.fields
        if part.name in fields:
            old = fields[part.name]
            fields[part.name] = [*old, value] if isinstance(old, list) else [old, value]
        else:
            fields[part.name] = [value] if part.listed else value


@dataclass(slots=True)
class _FormPart:
    """A part of a form that is being read."""

    name: str
    listed: bool
    filename: str | None
    """Name of the file; None for a field."""
    content_type: str
    size: int = 0
    pieces: list[bytes] = field(default_factory=list)
    writer: BlobWriter | None = None
