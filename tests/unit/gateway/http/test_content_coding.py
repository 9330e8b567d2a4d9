"""Compressed bodies: decoded in whatever pieces they come, within the bounds of plain ones, or refused with what to do."""

from __future__ import annotations

import gzip
import sys
import tracemalloc
import zlib
from collections.abc import Callable, MutableMapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.http.asgi import Headers
from gateway.http.body_memory import BodyMemory
from gateway.http.content_coding import FREE_OUTPUT_BYTES, MAX_MEMBERS, MAX_RATIO, ZSTD_WINDOW_BYTES, BodyDecoder
from gateway.http.request_body import MAX_JSON_BYTES, read_body
from schemas.errors import InvalidRequest, NexusError, RequestTooLarge, UnsupportedEncoding

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

LIMIT = 8 * 1024 * 1024
TEXT = b'{"model": "m", "messages": [{"role": "user", "content": "caf\xc3\xa9"}]}'


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "x-gzip": gzip.compress,
    "deflate": zlib.compress,
    "zstd": zstd.compress,
}


async def read(
    encoding: str | list[str], body: bytes, step: int = 65536, limit: int = LIMIT, *, has_arrived: bool = False
) -> bytes:
    pieces = [body[at : at + step] for at in range(0, len(body), step)] or [b""]

    async def receive() -> MutableMapping[str, Any]:
        piece = pieces.pop(0)
        return {"type": "http.request", "body": piece, "more_body": bool(pieces)}

    names = [encoding] if isinstance(encoding, str) else encoding
    headers: Headers = [(b"content-encoding", name.encode()) for name in names]
    memory = BodyMemory(8 * LIMIT)
    with memory.share("key") as share:
        found = await read_body(headers, receive, limit, 5.0, has_arrived=has_arrived, share=share)
        assert memory.used >= len(found) or has_arrived or not any(names)
    assert memory.used == 0
    return found


@settings(max_examples=60, deadline=None)
@given(
    data=st.binary(max_size=2000),
    names=st.lists(st.sampled_from([*PACKERS, "identity"]), max_size=3),
    step=st.integers(1, 500),
    has_arrived=st.booleans(),
)
async def test_any_codings_in_any_pieces(data: bytes, names: list[str], step: int, has_arrived: bool) -> None:
    """What is packed by any codings one after another comes out as it went in, in whatever pieces it arrives."""
    body = data
    for name in names:
        body = PACKERS[name](body) if name != "identity" else body
    assert await read(", ".join(names), body, step, has_arrived=has_arrived) == data


async def test_how_names_are_written() -> None:
    """Names are taken in any case, in several headers, and beside `identity`; deflate comes with and without zlib's header."""
    assert await read("GZip", gzip.compress(TEXT)) == TEXT
    assert await read(["gzip", "zstd"], zstd.compress(gzip.compress(TEXT))) == TEXT
    assert await read("identity, , deflate", raw_deflate(TEXT)) == TEXT
    assert await read("identity", TEXT, has_arrived=True) == TEXT


async def test_members_follow_each_other() -> None:
    """A gzip or zstd body may be made of several members."""
    assert await read("gzip", gzip.compress(TEXT) + gzip.compress(b" "), 7) == TEXT + b" "
    assert await read("zstd", zstd.compress(TEXT) + zstd.compress(b" "), 7) == TEXT + b" "


@pytest.mark.parametrize("encoding", ["br", "compress", "gzip, br", "gz\xefp", "aws-chunked", "gzip, gzip, gzip, gzip"])
async def test_unsupported_encodings(encoding: str) -> None:
    """Any other coding is 415, and the answer says which are taken."""
    with pytest.raises(UnsupportedEncoding) as caught:
        await read(encoding, b"x")
    assert caught.value.info.headers()["accept-encoding"] == "gzip, deflate, zstd"
    assert caught.value.info.status == 415


@pytest.mark.parametrize("name", ["gzip", "deflate", "zstd"])
async def test_broken_encodings(name: str) -> None:
    """Data that is cut off, is none of that coding, or goes on after its end is 400."""
    whole = PACKERS[name](TEXT)
    flipped = bytes([*whole[:-6], *(byte ^ 255 for byte in whole[-6:])])
    for body in (
        whole[:-1],
        whole[: len(whole) // 2],
        whole[:1],
        TEXT,
        whole + b"garbage",
        flipped if name != "zstd" else TEXT,
    ):
        with pytest.raises(InvalidRequest) as caught:
            await read(name, body)
        assert caught.value.info.code == "invalid_content_encoding"


@pytest.mark.parametrize("name", ["gzip", "deflate", "zstd"])
@pytest.mark.parametrize("layers", [1, 2])
async def test_a_bomb_is_never_whole(name: str, layers: int) -> None:
    """What expands beyond reason is 413, also within another coding, before much of it is in memory."""
    body = PACKERS[name](b"\0" * (256 * 1024 * 1024))
    for _ in range(layers - 1):
        body = PACKERS[name](body)
    tracemalloc.start()
    with pytest.raises(RequestTooLarge):
        await read(name if layers == 1 else f"{name}, {name}", body, limit=1 << 30)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < len(body) * MAX_RATIO * 2 + 2 * FREE_OUTPUT_BYTES + 2 * ZSTD_WINDOW_BYTES


async def test_the_limit_is_of_the_decoded_body() -> None:
    """A body that decodes to more than a route's limit is 413."""
    import os

    body = gzip.compress(os.urandom(MAX_JSON_BYTES // 2) * 3)
    with pytest.raises(RequestTooLarge):
        await read("gzip", body, limit=MAX_JSON_BYTES)


async def test_an_inner_bomb_without_output() -> None:
    """Neither many empty members nor an inner coding that swallows its input costs more than their bounds."""
    with pytest.raises(InvalidRequest, match="members"):
        await read("gzip", gzip.compress(b"") * (MAX_MEMBERS + 1))
    swallowed = gzip.compress(b"\x50\x2a\x4d\x18" + (1 << 26).to_bytes(4, "little") + b"\0" * (1 << 26))
    with pytest.raises(NexusError) as caught:
        await read("zstd, gzip", swallowed)
    assert caught.value.info.status == 413


async def test_a_window_that_is_too_large() -> None:
    """A zstd frame that wants more memory than RFC 9659 lets it is 400."""
    packer = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: 27})
    body = packer.compress(b"x" * 100) + packer.flush()
    with pytest.raises(InvalidRequest, match="zstd"):
        await read("zstd", body)


def test_decoding_makes_slices() -> None:
    """However much one piece expands, it comes in pieces that a loop can take in between."""
    packed = gzip.compress(b"a" * FREE_OUTPUT_BYTES)
    assert max(map(len, BodyDecoder(b"gzip", LIMIT).feed(packed))) <= 64 * 1024
