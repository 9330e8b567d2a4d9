"""Compressed requests, as Codex and some SDKs send them, and bodies that do not come."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import sys
import zlib

import httpx
import pytest

from tests.clients.test_bad_input import CHAT, check_error, head, wire
from tests.cluster import KEY, Cluster, chat

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(60)]

BODY = json.dumps(chat("hi you")).encode()
HEADERS = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}


async def post(cluster: Cluster, path: str, encoding: str, body: bytes, **headers: str) -> httpx.Response:
    return await cluster.http.post(
        cluster.url + path, content=body, headers=HEADERS | {"content-encoding": encoding} | headers
    )


@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        ("gzip", gzip.compress(BODY, mtime=0)),
        ("deflate", zlib.compress(BODY)),
        ("zstd", zstd.compress(BODY)),
        ("gzip, zstd", zstd.compress(gzip.compress(BODY, mtime=0))),
        ("identity", BODY),
    ],
    ids=lambda value: value if isinstance(value, str) else "body",
)
async def test_chat(cluster: Cluster, encoding: str, body: bytes) -> None:
    """A compressed chat request is answered like a plain one."""
    answer = await post(cluster, CHAT, encoding, body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"] == "hi you"


async def test_other_routes(cluster: Cluster) -> None:
    """Jobs, responses, keys and uploads take compressed bodies too."""
    job = {"endpoint": CHAT, "body": chat("hi")}
    assert (await post(cluster, "/v1/jobs", "zstd", zstd.compress(json.dumps(job).encode()))).status_code == 202
    response = {"model": "echo", "input": "hi"}
    assert (
        await post(cluster, "/v1/responses", "gzip", gzip.compress(json.dumps(response).encode()))
    ).status_code == 200
    key = {"name": "compressed"}
    assert (await post(cluster, "/v1/keys", "gzip", gzip.compress(json.dumps(key).encode()))).status_code == 201
    data = b"line\n" * 100_000
    form = b'--XX\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nuser_data\r\n' + (
        b'--XX\r\nContent-Disposition: form-data; name="file"; filename="a.txt"\r\n\r\n' + data + b"\r\n--XX--\r\n"
    )
    typed = {"content-type": "multipart/form-data; boundary=XX"}
    for packed in (zstd.compress(form), zstd.compress(form[:1000]) + zstd.compress(form[1000:])):
        answer = await post(cluster, "/v1/files", "zstd", packed, **typed)
        assert answer.status_code == 200, answer.text
        content = await cluster.http.get(f"{cluster.url}/v1/files/{answer.json()['id']}/content", headers=HEADERS)
        assert content.content == data


@pytest.mark.parametrize(
    "path", [CHAT, "/v1/jobs", "/v1/responses", "/v1/files", "/v1/audio/transcriptions", "/v1/keys"]
)
async def test_what_is_not_taken(cluster: Cluster, path: str) -> None:
    """Another encoding is 415 with the ones that are taken; broken data is 400, a bomb 413."""
    typed = {"content-type": "multipart/form-data; boundary=XX"} if path.endswith(("files", "transcriptions")) else {}
    answer = await post(cluster, path, "br", b"x", **typed)
    check_error(answer, 415, "unsupported_content_encoding")
    assert answer.headers["accept-encoding"] == "gzip, deflate, zstd"
    check_error(await post(cluster, path, "gzip", gzip.compress(BODY)[:-4], **typed), 400)
    bomb = gzip.compress(b" " * (64 * 1024 * 1024))
    if not typed:
        check_error(await post(cluster, path, "gzip", bomb), 413, "request_too_large")


async def test_another_tenant_does_not_wait(cluster: Cluster) -> None:
    """Beside requests that announce large bodies and send one byte, a large one is answered at once."""
    name = {"name": "slow-bodies"}
    slow_key = (await cluster.post("/v1/keys", name)).json()["key"]
    async with contextlib.AsyncExitStack() as stack:
        for number in range(8):
            slow = await stack.enter_async_context(wire(cluster.url))
            kind = "transfer-encoding: chunked" if number % 2 else "content-length: 33554432"
            await slow.send(head(kind, key=slow_key) + (b"1\r\n{\r\n" if number % 2 else b"{"))
        async with asyncio.timeout(10):
            answer = await cluster.post(CHAT, chat("x" * 1_500_000))
        assert answer.status_code == 200
