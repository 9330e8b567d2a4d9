"""Pictures in chat messages: as data they pass; by URL they are fetched where that is allowed, else refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from backbone.ssrf_guard import FetchedContent, FetchRefused, GuardedHttpClient
from gateway.http.remote_media import RemoteMedia
from gateway.http.request_body import parse_body
from schemas.errors import InvalidRequest, RequestTooLarge
from schemas.openai.chat import ChatRequest


class Web(GuardedHttpClient):
    """Every URL holds three bytes, but for the bad one."""

    def __init__(self) -> None:
        super().__init__(max_bytes=1, timeout_s=1)

    async def fetch(self, url: str, kind: str) -> FetchedContent:
        if "bad" in url:
            raise FetchRefused("the URL answers 404")
        return FetchedContent(b"abc", f"{kind}png")


def body(*parts: Any) -> bytes:
    content = [{"type": "text", "text": "what is this?"}, *parts]
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": content}]}).encode()


def image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, "detail": "low"}}


async def inline(data: bytes, egress: GuardedHttpClient | None = None, max_bytes: int = 1000) -> bytes:
    return await RemoteMedia(egress, max_bytes).inline(parse_body(data, ChatRequest), data)


async def test_data_urls_pass_untouched() -> None:
    data = body(image("data:image/png;base64,AAAA"))
    assert await inline(data) is data
    assert await inline(data, Web()) is data


async def test_a_remote_url_is_refused_where_fetching_is_off() -> None:
    with pytest.raises(InvalidRequest, match="data URL") as caught:
        await inline(body(image("data:image/png;base64,AAAA"), image("https://x.example/a.png")))
    assert caught.value.info.param == "messages.0.content.2.image_url"
    assert caught.value.info.code == "remote_media_disabled"


async def test_a_remote_url_is_replaced_by_its_content() -> None:
    data = json.loads(await inline(body(image("https://x.example/a.png"), image("data:image/gif;base64,BB")), Web()))
    parts = data["messages"][0]["content"]
    assert parts[1] == image("data:image/png;base64,YWJj")
    assert parts[2] == image("data:image/gif;base64,BB")


async def test_a_url_without_an_object_around_it_counts_too() -> None:
    data = json.loads(await inline(body({"type": "image_url", "image_url": "http://x.example/a"}), Web()))
    assert data["messages"][0]["content"][1]["image_url"] == "data:image/png;base64,YWJj"


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://x.example/a", "/etc/passwd", ""])
async def test_other_schemes_never_reach_a_backend(url: str) -> None:
    for egress in (None, Web()):
        with pytest.raises(InvalidRequest):
            await inline(body(image(url)), egress)


async def test_a_url_that_cannot_be_fetched_names_its_part() -> None:
    with pytest.raises(InvalidRequest, match="404") as caught:
        await inline(body(image("https://x.example/bad")), Web())
    assert caught.value.info.param == "messages.0.content.1.image_url"


async def test_the_content_of_urls_counts_towards_the_limit() -> None:
    with pytest.raises(RequestTooLarge):
        await inline(body(*[image("https://x.example/a")] * 3), Web(), max_bytes=10)
