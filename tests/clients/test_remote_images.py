"""Pictures in chat messages: as data they reach the backend untouched; by URL only where the operator allows it."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import openai
import pytest
import pytest_asyncio
from openai import AsyncOpenAI

from tests.backends.double_openai import OpenAIDouble
from tests.cluster import KEY, Cluster

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(60)]

PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256))
DATA_URL = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"
ANSWERS = {
    "/a.png": b"HTTP/1.1 200 OK\r\ncontent-type: image/png; x=y\r\ncontent-length: %d\r\n\r\n%b" % (len(PNG), PNG),
    "/a.html": b"HTTP/1.1 200 OK\r\ncontent-type: text/html\r\ncontent-length: 2\r\n\r\nhi",
    "/metadata": b"HTTP/1.1 302 Found\r\nlocation: http://169.254.169.254/latest/\r\ncontent-length: 0\r\n\r\n",
    "/large": b"HTTP/1.1 200 OK\r\ncontent-type: image/png\r\nconnection: close\r\n\r\n" + bytes(100_000),
    "/none": b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n",
}


@dataclass
class Web:
    """A server of pictures on a private address, and a gateway that may fetch from it."""

    url: str
    gateway: str
    asked: list[str]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def web(cluster: Cluster) -> AsyncIterator[Web]:
    asked: list[str] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        path = (await reader.readuntil(b"\r\n\r\n")).split()[1].decode()
        asked.append(path)
        writer.write(ANSWERS[path])
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        host = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        await cluster.start_gateway(FETCH_MEDIA="true", FETCH_PRIVATE_HOSTS=host, FETCH_MAX_BYTES="50000")
        yield Web("http://" + host, cluster.urls[-1], asked)


def message(url: str) -> Any:
    parts = [
        {"type": "text", "text": "what is this?"},
        {"type": "image_url", "image_url": {"url": url, "detail": "low"}},
    ]
    return [{"role": "user", "content": parts}]


async def ask(gateway: str, url: str) -> None:
    async with AsyncOpenAI(base_url=gateway + "/v1", api_key=KEY, max_retries=0, timeout=30) as client:
        await client.chat.completions.create(model="double", messages=message(url))


async def test_data_urls_pass_untouched(cluster: Cluster, double: OpenAIDouble, web: Web) -> None:
    """A picture as data reaches the backend as it was sent, whether URLs are fetched or not."""
    double.behave()
    for gateway in (cluster.url, web.gateway):
        await ask(gateway, DATA_URL)
        assert double.last.json["messages"] == message(DATA_URL)


def asked_of(double: OpenAIDouble) -> int:
    """How many requests have reached the backend, beside its worker's looks at how it is."""
    return sum(seen.method == "POST" for seen in double.seen)


async def test_urls_are_refused_unless_allowed(cluster: Cluster, double: OpenAIDouble, web: Web) -> None:
    """By default no URL is fetched, and none reaches the backend: the refusal says what to do."""
    double.behave()
    before = asked_of(double)
    for url in ("https://example.com/a.png", web.url + "/a.png", "HTTP://EXAMPLE.COM/a.png"):
        with pytest.raises(openai.BadRequestError, match="data URL") as caught:
            await ask(cluster.url, url)
        assert caught.value.code == "remote_media_disabled"
        assert caught.value.param == "messages.0.content.1.image_url"
    for url in ("file:///etc/passwd", "gopher://127.0.0.1/", "//127.0.0.1/a.png", ""):
        for gateway in (cluster.url, web.gateway):
            with pytest.raises(openai.BadRequestError):
                await ask(gateway, url)
    assert asked_of(double) == before
    assert web.asked == []


async def test_a_url_becomes_data(double: OpenAIDouble, web: Web) -> None:
    """Where it is allowed, the gateway fetches the picture; the backend gets it as data, and all else as it was."""
    double.behave()
    await ask(web.gateway, web.url + "/a.png")
    assert double.last.json["messages"] == message(DATA_URL)
    assert web.asked[-1] == "/a.png"


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/none", "404"),
        ("/a.html", "text/html"),
        ("/large", "more than 50000 bytes"),
        ("/metadata", "not a public one"),
    ],
)
async def test_what_is_no_picture(double: OpenAIDouble, web: Web, path: str, said: str) -> None:
    """What cannot be had is a BadRequestError that says why; a redirect is no way into a private network."""
    before = asked_of(double)
    with pytest.raises(openai.BadRequestError, match=said) as caught:
        await ask(web.gateway, web.url + path)
    assert (caught.value.code, caught.value.param) == ("url_refused", "messages.0.content.1.image_url")
    assert asked_of(double) == before


@pytest.mark.parametrize(
    "host",
    ["localhost:{}", "127.0.0.1:1", "[::1]:{}", "0.0.0.0:{}", "[::ffff:127.0.0.1]:{}", "127.1:{}", "2130706433:{}"],
)
async def test_private_addresses_are_not_reached(double: OpenAIDouble, web: Web, host: str) -> None:
    """But for what the operator names, nothing private is fetched, however its address is written."""
    before, asked = asked_of(double), len(web.asked)
    with pytest.raises(openai.BadRequestError) as caught:
        await ask(web.gateway, "http://" + host.format(web.url.rpartition(":")[2]) + "/a.png")
    assert caught.value.code == "url_refused"
    assert (asked_of(double), len(web.asked)) == (before, asked)
