"""Multipart forms for servers that take files: the length is known in advance, and no file is completely in memory."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from workers.backends.base import UploadedFile

DEFAULT_CONTENT_TYPE = "application/octet-stream"
# As browsers escape names; some servers take a backslash for an escape, others do not.
NAME_ESCAPES = str.maketrans({'"': "%22", "\r": "%0D", "\n": "%0A", "\\": "%5C", "\0": "%00"})


@dataclass(frozen=True, slots=True)
class FilePart:
    """A file of a form."""

    field: str
    filename: str
    content_type: str
    size: int
    pieces: Callable[[], AsyncIterator[bytes]]

    @classmethod
    def from_file(cls, file: UploadedFile, field: str | None = None) -> FilePart:
        """Return a part for a caller's file. `field`: the server's name for it, where that differs from the caller's."""
        return cls(field or file.field, file.filename, file.content_type, file.size, file.pieces)

    @classmethod
    def from_bytes(cls, field: str, filename: str, content_type: str, data: bytes) -> FilePart:
        """Return a part for bytes in memory."""

        async def pieces() -> AsyncIterator[bytes]:
            yield data

        return cls(field, filename, content_type, len(data), pieces)


@dataclass(frozen=True, slots=True)
class MultipartForm:
    """A form, ready to be sent."""

    content_type: str
    length: int
    """Bytes, if every file has its declared size."""
    pieces: Callable[[], AsyncIterator[bytes]]
    """Reads the form from its beginning; may be called again if the files may be read again."""


def encode_multipart(fields: Sequence[tuple[str, str]], files: Sequence[FilePart]) -> MultipartForm:
    """Return the form: fields in their order, then files. Names may repeat, and are escaped in the headers."""
    boundary = secrets.token_hex(16)
    start = "".join(
        f'--{boundary}\r\ncontent-disposition: form-data; name="{_escape_name(name)}"\r\n\r\n{value}\r\n'
        for name, value in fields
    ).encode()
    heads = [_file_head(boundary, file).encode() for file in files]
    end = f"--{boundary}--\r\n".encode()

    async def pieces() -> AsyncIterator[bytes]:
        before = start
        for head, file in zip(heads, files, strict=True):
            yield before + head
            async for piece in file.pieces():
                yield piece
            before = b"\r\n"
        yield before + end

    length = len(start) + sum(len(head) + file.size + 2 for head, file in zip(heads, files, strict=True)) + len(end)
    return MultipartForm(f"multipart/form-data; boundary={boundary}", length, pieces)


def _file_head(boundary: str, file: FilePart) -> str:
    # Servers take a part without a file name for a field.
    name = _escape_name(file.filename) or "file"
    kind = (
        file.content_type if file.content_type.isascii() and file.content_type.isprintable() else DEFAULT_CONTENT_TYPE
    )
    return (
        f'--{boundary}\r\ncontent-disposition: form-data; name="{_escape_name(file.field)}"; filename="{name}"\r\n'
        f"content-type: {kind or DEFAULT_CONTENT_TYPE}\r\n\r\n"
    )


def _escape_name(name: str) -> str:
    return name.translate(NAME_ESCAPES)
