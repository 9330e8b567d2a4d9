"""Responses that a server or proxy compresses without being asked: decoded within bounds, or clear errors."""

from __future__ import annotations

import asyncio
import gzip
import json
import random
import sys
import tracemalloc
import zlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.backends.contract import body_of, chat, check_stream, collect, events
from tests.backends.doubles.openai import OpenAIDouble
from workers.adapter_kit import content_coding
from workers.adapter_kit.content_coding import MAX_RATIO, SLICE_BYTES, UNCHECKED_OUTPUT_BYTES, ResponseDecoder
from workers.adapter_kit.http_client import HttpClient
from workers.backends.base import BackendConfig, BackendError, BackendUnavailable, make_backend

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


PACKERS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "gzip": ("gzip", gzip.compress),
    "x-gzip": ("X-GZIP", gzip.compress),
    "members": ("gzip", lambda data: gzip.compress(data[:7]) + gzip.compress(data[7:])),
    "padded": ("gzip", lambda data: gzip.compress(data) + bytes(64)),
    "deflate": ("deflate", zlib.compress),
    "raw": ("deflate", raw_deflate),
    "zstd": ("zstd", zstd.compress),
    "frames": ("zstd", lambda data: zstd.compress(data[:7]) + zstd.compress(data[7:])),
}


def decoded(encoding: str, pieces: list[bytes]) -> bytes:
    decoder, out = ResponseDecoder(encoding, "http://b"), b""
    for piece in pieces:
        out += decoder.decode(piece)
        while more := decoder.more():
            out += more
    decoder.finish()
    return out


@pytest.mark.parametrize("kind", PACKERS)
@given(data=st.binary(min_size=8, max_size=2000), cut=st.integers(1, 64))
def test_an_answer_is_decoded_however_it_arrives(kind: str, data: bytes, cut: int) -> None:
    encoding, pack = PACKERS[kind]
    packed = pack(data)
    assert decoded(encoding, [packed[at : at + cut] for at in range(0, len(packed), cut)]) == data


@pytest.mark.parametrize("kind", PACKERS)
def test_a_large_answer_comes_in_slices(kind: str) -> None:
    encoding, pack = PACKERS[kind]
    data = random.Random(1).randbytes(100_000) * 30
    decoder = ResponseDecoder(encoding, "http://b")
    out = [decoder.decode(pack(data))]
    while more := decoder.more():
        out.append(more)
    assert b"".join(out) == data
    assert max(map(len, out)) <= SLICE_BYTES


@pytest.mark.parametrize("kind", ["gzip", "deflate", "zstd"])
def test_what_is_cut_short_is_transient_and_what_is_none_is_not(kind: str) -> None:
    encoding, pack = PACKERS[kind]
    packed = pack(b"hello there" * 100)
    with pytest.raises(BackendError, match="before its") as caught:
        decoded(encoding, [packed[:-3]])
    assert caught.value.transient
    with pytest.raises(BackendError, match=f"not valid {kind}") as caught:
        decoded(encoding, [b"\x28\xb5not at all compressed, and long enough to tell"])
    assert not caught.value.transient


@pytest.mark.parametrize("kind", ["gzip", "deflate", "zstd"])
def test_a_bomb_ends_within_bounds_of_memory(kind: str) -> None:
    """A gigabyte of zeros in a megabyte or less is refused within bounds."""
    if kind == "zstd":
        bomb = zstd.compress(bytes(2**28))
    else:
        packer = zlib.compressobj(9, wbits=31 if kind == "gzip" else 15)
        bomb = b"".join([packer.compress(bytes(2**20)) for _ in range(256)]) + packer.flush()
    assert len(bomb) * MAX_RATIO < 2**28
    decoder = ResponseDecoder(kind, "http://b")
    tracemalloc.start()
    try:
        made = len(decoder.decode(bomb))
        with pytest.raises(BackendError, match=f"more than {MAX_RATIO} times"):
            while True:
                made += len(decoder.more())
        assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
    finally:
        tracemalloc.stop()
    assert made <= max(UNCHECKED_OUTPUT_BYTES, MAX_RATIO * len(bomb)) + SLICE_BYTES


# Over HTTP


class Proxy:
    """Compresses what the double behind it answers, as some proxies do whatever the client accepts."""

    def __init__(self, kind: str, target: OpenAIDouble) -> None:
        self.encoding, self.pack = PACKERS[kind]
        self.target = target
        self.url = ""

    async def start(self) -> asyncio.Server:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        return server

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        size = next((int(line[16:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length: ")), 0)
        method, path, _ = head.split(b" ", 2)
        client = HttpClient(self.target.url)
        body = await reader.readexactly(size) if size else None
        answer = await client.request(method.decode(), path.decode(), body)
        kind = answer.headers["content-type"]
        lines = f"HTTP/1.1 {answer.status} X\r\ncontent-type: {kind}\r\ncontent-encoding: {self.encoding}\r\n"
        writer.write(f"{lines}transfer-encoding: chunked\r\nconnection: close\r\n\r\n".encode())
        if kind == "text/event-stream":
            packer: Any = zlib.compressobj(wbits=31) if self.encoding == "gzip" else zstd.ZstdCompressor()
            flush = zlib.Z_SYNC_FLUSH if self.encoding == "gzip" else zstd.ZstdCompressor.FLUSH_BLOCK
            while data := await answer.read():
                chunk(writer, packer.compress(data) + packer.flush(flush))
            chunk(writer, packer.flush())
        else:
            chunk(writer, self.pack(await answer.read_all(1 << 20)))
        writer.write(b"0\r\n\r\n")
        writer.close()
        await client.close()


def chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    if data:
        writer.write(b"%x\r\n%b\r\n" % (len(data), data))


@pytest.fixture(params=["gzip", "zstd"])
async def proxy(double: OpenAIDouble, request: pytest.FixtureRequest) -> AsyncIterator[Proxy]:
    made = Proxy(request.param, double)
    server = await made.start()
    yield made
    server.close()


async def test_every_answer_of_a_compressing_proxy_is_understood(proxy: Proxy, double: OpenAIDouble) -> None:
    """Lists of models, streams and complete answers are decoded; errors keep their messages."""
    backend = make_backend("openai", BackendConfig(url=proxy.url))
    assert [model.name for model in (await backend.discover()).models] == ["double"]
    double.behave(token_delay_s=0.01)
    chunks, _ = await collect(backend, chat("double", stream=True, public_model="a"))
    assert check_stream(events(chunks), "a", is_chat=True) == "Hello there, world!"
    assert len(chunks) > 3, "they come as they are made"
    body, _ = await body_of(backend, chat("double"))
    assert body["choices"][0]["message"]["content"] == "Hello there, world!"
    double.behave(status=503, error={"error": {"message": "Loading model"}}, headers={"retry-after": "7"})
    with pytest.raises(BackendUnavailable, match="Loading model"):
        await body_of(backend, chat("double"))
    await backend.close()


async def test_a_coding_that_is_not_known_is_named(double: OpenAIDouble) -> None:
    """Of an error response, the status counts."""
    PACKERS["br"] = ("br", lambda data: data)
    proxy = Proxy("br", double)
    server = await proxy.start()
    client = HttpClient(proxy.url)
    try:
        with pytest.raises(BackendError, match="'br'") as caught:
            await client.request("GET", "/v1/models")
        assert (caught.value.info.status, caught.value.transient) == (502, False)
        double.behave(models_status=503)
        response = await client.request("GET", "/v1/models")
        assert (response.status, await response.read_all(100)) == (503, b"")
    finally:
        del PACKERS["br"]
        await client.close()
        server.close()


async def test_the_limit_counts_what_is_decoded(double: OpenAIDouble, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = Proxy("gzip", double)
    server = await proxy.start()
    double.behave(models=({"id": "x" * 100_000},))
    client = HttpClient(proxy.url)
    response = await client.request("GET", "/v1/models")
    with pytest.raises(BackendError, match="larger than 50000"):
        await response.read_all(50_000)
    monkeypatch.setattr(content_coding, "SLICE_BYTES", 1000)
    response = await client.request("GET", "/v1/models")
    assert json.loads(await response.read_all(200_000))["data"][0]["id"] == "x" * 100_000
    await client.close()
    server.close()
