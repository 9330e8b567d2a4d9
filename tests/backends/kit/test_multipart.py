"""Forms, read back by the parser that servers use."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator
from typing import Any

import pytest
from python_multipart import parse_form

from workers.adapter_kit.multipart import FilePart, MultipartForm, encode_multipart


async def body_of(form: MultipartForm) -> bytes:
    return b"".join([piece async for piece in form.pieces()])


async def parsed(form: MultipartForm) -> tuple[list[tuple[str, str]], list[tuple[str, str, bytes]]]:
    fields: list[tuple[str, str]] = []
    files: list[tuple[str, str, bytes]] = []

    def on_file(file: Any) -> None:
        file.file_object.seek(0)
        files.append((file.field_name.decode(), file.file_name.decode(), file.file_object.read()))

    body = await body_of(form)
    assert len(body) == form.length
    headers: Any = {"Content-Type": form.content_type, "Content-Length": str(form.length).encode()}
    parse_form(
        headers,
        io.BytesIO(body),
        lambda field: fields.append(((field.field_name or b"").decode(), (field.value or b"").decode())),
        on_file,
    )
    return fields, files


async def test_fields_and_files_arrive() -> None:
    """Names may repeat, any text is allowed, bytes stay unchanged; the form can be sent again."""
    sound = bytes(range(256)) * 5
    form = encode_multipart(
        [("timestamp_granularities[]", "word"), ("timestamp_granularities[]", "segment"), ("prompt", "é\r\n--x\n")],
        [
            FilePart.from_bytes("file", "a.wav", "audio/wav", sound),
            FilePart.from_bytes("mask", "m.png", "image/png", b""),
        ],
    )
    for _ in range(2):
        fields, files = await parsed(form)
        assert fields == [
            ("timestamp_granularities[]", "word"),
            ("timestamp_granularities[]", "segment"),
            ("prompt", "é\r\n--x\n"),
        ]
        assert files == [("file", "a.wav", sound), ("mask", "m.png", b"")]


async def test_a_form_of_nothing_is_a_form() -> None:
    body = await body_of(encode_multipart([], []))
    assert body.startswith(b"--")
    assert body.endswith(b"--\r\n")


@pytest.mark.parametrize("name", ['a"; name="model', "a\r\nx-evil: 1\r\n\r\nb", "a\n", "ä 日本.wav", "a\\", ""])
async def test_a_name_cannot_break_out(name: str) -> None:
    """The form arrives as one file in one field, whatever its name."""
    form = encode_multipart([("model", "m")], [FilePart.from_bytes("file", name, "audio/wav\r\nx-evil: 1", b"data")])
    assert b"x-evil: 1\r\n" not in await body_of(form)
    fields, files = await parsed(form)
    assert fields == [("model", "m")]
    assert [(field, data) for field, _, data in files] == [("file", b"data")]


async def test_a_file_is_never_whole_in_memory() -> None:
    """Each piece is read only when it is sent."""
    taken = 0

    async def pieces() -> AsyncIterator[bytes]:
        nonlocal taken
        for _ in range(4):
            taken += 1
            yield b"x" * 10

    stream = encode_multipart([], [FilePart("file", "a", "audio/wav", 40, pieces)]).pieces()
    await anext(stream)
    assert taken == 0
    assert await anext(stream) == b"x" * 10
    assert taken == 1
