"""Multipart forms, in whatever pieces they arrive."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backbone.bus.blobs import INLINE_LIMIT_BYTES
from backbone.testing.blobs import MemoryBlobStore
from gateway.http.multipart import MAX_PARTS, ParsedForm, read_form
from schemas.errors import InvalidRequest

TYPE = b"multipart/form-data; boundary=XX"


def part(name: str, data: bytes, filename: str | None = None, content_type: str = "") -> bytes:
    head = f'--XX\r\nContent-Disposition: form-data; name="{name}"'
    head += f'; filename="{filename}"' if filename is not None else ""
    head += f"\r\nContent-Type: {content_type}" if content_type else ""
    return head.encode() + b"\r\n\r\n" + data + b"\r\n"


def form(*parts: bytes) -> bytes:
    return b"".join(parts) + b"--XX--\r\n"


async def read(body: bytes, step: int = 65536, files: tuple[str, ...] = ("file",), kind: bytes = TYPE) -> ParsedForm:
    async def pieces() -> AsyncIterator[bytes]:
        for at in range(0, len(body), step):
            yield body[at : at + step]

    blobs = MemoryBlobStore()
    result = ParsedForm()
    await read_form(kind, pieces(), files, lambda: blobs.writer(ttl_s=60), result)
    for upload in result.uploads:
        if upload.blob is not None:
            result.inline.append(b"".join([piece async for piece in blobs.read(upload.blob)]))
    return result


@settings(max_examples=60, deadline=None)
@given(step=st.integers(1, 200), data=st.binary(min_size=1, max_size=300))
async def test_pieces_of_any_size_give_the_same_form(step: int, data: bytes) -> None:
    body = form(part("model", b"whisper"), part("file", data, "a.wav", "audio/wav"), part("language", b"en"))
    found = await read(body, step)
    assert found.fields == {"model": "whisper", "language": "en"}
    assert b"".join(found.inline) == data
    [upload] = found.uploads
    assert (upload.field, upload.filename, upload.content_type, upload.size, upload.blob) == (
        "file", "a.wav", "audio/wav", len(data), None,
    )  # fmt: skip


async def test_a_large_file_goes_by_reference_whole_and_in_order() -> None:
    data = bytes(range(256)) * (INLINE_LIMIT_BYTES // 256 + 100)
    found = await read(form(part("file", data, "big.wav"), part("model", b"m")))
    assert found.uploads[0].blob is not None
    assert found.uploads[0].size == len(data)
    assert found.inline == [data]


async def test_names_that_repeat_or_say_so_are_lists() -> None:
    body = form(
        part("file", b"x", "a"), part("timestamp_granularities[]", b"word"), part("tag", b"a"), part("tag", b"b")
    )
    assert (await read(body)).fields == {"timestamp_granularities": ["word"], "tag": ["a", "b"]}


async def test_several_files_of_one_name() -> None:
    body = form(part("image[]", b"1", "a.png"), part("image[]", b"22", "b.png"), part("mask", b"3", "m.png"))
    found = await read(body, files=("image", "mask"))
    assert [(upload.field, upload.size) for upload in found.uploads] == [("image", 1), ("image", 2), ("mask", 1)]


async def test_a_file_without_a_filename_is_a_file() -> None:
    assert (await read(form(part("file", b"x")))).uploads[0].size == 1


@pytest.mark.parametrize(
    ("body", "kind", "message"),
    [
        (form(part("model", b"m")), TYPE, "lacks the file 'file'"),
        (form(part("file", b"", "a.wav")), TYPE, "is empty"),
        (form(part("file", b"x", "a"), part("image", b"x", "b.png")), TYPE, "not a file of this endpoint"),
        (form(part("file", b"x", "a"))[:-10], TYPE, "ended before"),
        (b"", TYPE, "ended before"),
        (b"nonsense", TYPE, "not a valid multipart form"),
        (b"{}", b"application/json", "multipart/form-data"),
        (b"{}", b"", "multipart/form-data"),
        (form(part("file", b"x", "a")), b"multipart/form-data", "boundary"),
        (form(part("file", b"x", "a"), part("model", b"\xff\xfe")), TYPE, "not UTF-8"),
        (form(*[part("a", b"x")] * (MAX_PARTS + 1)), TYPE, "more than"),
        (form(part("file", b"x", "a"), part("a", b"x" * 2_000_000)), TYPE, "larger than"),
        (form(part("file", b"x", "a" * 20_000)), TYPE, "header"),
    ],
)
async def test_errors_of_malformed_forms(body: bytes, kind: bytes, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        await read(body, kind=kind)
