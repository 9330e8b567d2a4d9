"""Pictures in chat messages: as data they reach the backend untouched; by URL only where the operator allows it."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest
import pytest_asyncio
from openai import AsyncOpenAI

from tests.backends.doubles.openai import OpenAIDouble
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


def reached_by(name: str, url: str) -> dict[str, tuple[str, dict[str, str], Any]]:
    """Every way to a chat backend: path, headers and body of a request whose part `name` names `url`."""
    part = {"type": name, name: {"url": url, "data": url}}
    body = {"model": "double", "messages": [{"role": "user", "content": [part]}]}
    item = {"role": "user", "content": [{"type": "input_image", "image_url": url}]}
    sound = {"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": url, "format": "wav"}}]}
    return {
        "usual": ("/v1/chat/completions", {}, body),
        "stream": ("/v1/chat/completions", {}, {**body, "stream": True}),
        "later": ("/v1/chat/completions", {"prefer": "respond-async"}, body),
        "once": ("/v1/chat/completions", {"idempotency-key": f"remote {name}"}, body),
        "job": ("/v1/jobs", {}, {"endpoint": "/v1/chat/completions", "body": body}),
        "picture": ("/v1/responses", {}, {"model": "double", "input": [item]}),
        "sound": ("/v1/responses", {}, {"model": "double", "input": [sound]}),
        "field": ("/v1/chat/completions", {}, {**message_of("hi"), name: {"url": url}}),
        "legacy": ("/v1/completions", {}, {"model": "double", "prompt": "hi", name: {"url": url}}),
    }


def message_of(text: str) -> dict[str, Any]:
    return {"model": "double", "messages": [{"role": "user", "content": text}]}


@pytest.mark.parametrize("name", ["image_url", "input_audio", "input_video", "novelty"])
async def test_no_url_reaches_a_backend_by_any_way(cluster: Cluster, double: OpenAIDouble, web: Web, name: str) -> None:
    """Whatever a part is called, however it is escaped, and by whichever route it comes."""
    double.behave()
    before, asked = asked_of(double), len(web.asked)
    escaped = "".join(f"\\u{ord(letter):04x}" for letter in name)
    async with httpx.AsyncClient(headers={"authorization": f"Bearer {KEY}"}, timeout=30) as client:
        for way, (path, headers, body) in reached_by(name, web.url + "/a.png").items():
            plain = json.dumps(body)
            for data in (plain, plain.replace(name, escaped), plain.replace("http:", "\\u0068ttp\\u003a")):
                answer = await client.post(
                    cluster.url + path, content=data, headers=headers | {"content-type": "application/json"}
                )
                assert answer.status_code == 400, (way, answer.text)
                assert answer.json()["error"]["code"] in ("remote_media_disabled", "url_refused"), (way, answer.text)
    assert (asked_of(double), len(web.asked)) == (before, asked)


async def test_text_may_hold_any_url(cluster: Cluster, double: OpenAIDouble, web: Web) -> None:
    """A message about a URL, tools, schemas and metadata that name some: all of it is text, and passes as it was sent."""
    double.behave()
    url = web.url + "/a.png"
    schema = {"type": "object", "$id": url, "properties": {"link": {"$ref": url, "description": url}}}
    parameters = {"name": "open", "description": url, "parameters": schema}
    body = message_of(url) | {
        "tools": [{"type": "function", "function": parameters}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
        "metadata": {"source": url},
        "user": url,
        "stop": [url],
    }
    async with httpx.AsyncClient(headers={"authorization": f"Bearer {KEY}"}, timeout=30) as client:
        answer = await client.post(cluster.url + "/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert {name: double.last.json[name] for name in body} == body


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
        ("/large", "larger than 50000 bytes"),
        ("/metadata", "not public"),
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
