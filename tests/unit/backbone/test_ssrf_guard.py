"""Fetching strangers' URLs: what is public is fetched, what only we can reach is not."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import AsyncIterator

import pytest

from backbone.ssrf_guard import FetchRefused, GuardedHttpClient


class Site:
    """A web server in a few lines. `pages`: raw answers by path; `asked`: what came."""

    def __init__(self) -> None:
        self.port = 0
        self.pages: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.hang = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        self.asked.append(head)
        answer = self.pages.get(head.split(" ")[1])
        if answer is None:
            await self.hang.wait()
        else:
            writer.write(answer)
        writer.close()

    def url(self, path: str, host: str = "pictures.example") -> str:
        return f"http://{host}:{self.port}{path}"


def answer(body: bytes, content_type: str = "image/png", status: str = "200 OK", extra: str = "") -> bytes:
    head = f"HTTP/1.1 {status}\r\ncontent-type: {content_type}\r\ncontent-length: {len(body)}\r\n{extra}\r\n"
    return head.encode() + body


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    site = Site()
    server = await asyncio.start_server(site.serve, "127.0.0.1", 0)
    site.port = server.sockets[0].getsockname()[1]
    yield site
    site.hang.set()
    server.close()
    await server.wait_closed()


def egress(site: Site, *allowed: str, max_bytes: int = 1000, timeout_s: float = 5.0) -> GuardedHttpClient:
    """`allowed` may be private; every name resolves to this machine."""

    async def resolve(_host: str, _port: int) -> list[str]:
        return ["127.0.0.1"]

    hosts = frozenset(f"{host}:{site.port}" for host in allowed)
    return GuardedHttpClient(max_bytes=max_bytes, timeout_s=timeout_s, private_hosts=hosts, resolve=resolve)


async def test_a_picture_is_fetched_from_the_checked_address_under_its_own_name(site: Site) -> None:
    site.pages["/a.png"] = answer(b"PNG", "image/png; charset=x")
    found = await egress(site, "pictures.example").fetch(site.url("/a.png"), "image/")
    assert (found.data, found.content_type) == (b"PNG", "image/png")
    assert f"host: pictures.example:{site.port}" in site.asked[0].lower()


async def test_a_name_with_a_private_address_is_refused_before_anything_is_asked(site: Site) -> None:
    with pytest.raises(FetchRefused, match="not public"):
        await egress(site).fetch(site.url("/a.png"), "image/")
    assert site.asked == []


async def test_one_private_address_among_public_ones_is_enough_to_refuse() -> None:
    async def resolve(_host: str, _port: int) -> list[str]:
        return ["93.184.216.34", "10.0.0.1"]

    with pytest.raises(FetchRefused, match="not public"):
        await GuardedHttpClient(max_bytes=1, timeout_s=1, resolve=resolve).fetch("http://x.example/", "image/")


async def test_a_redirect_to_a_private_host_is_refused(site: Site) -> None:
    target = site.url("/secret", "internal.example")
    site.pages["/a.png"] = answer(b"", status="302 Found", extra=f"location: {target}\r\n")
    with pytest.raises(FetchRefused, match="not public"):
        await egress(site, "pictures.example").fetch(site.url("/a.png"), "image/")
    assert len(site.asked) == 1


async def test_a_redirect_is_followed_and_a_circle_is_not(site: Site) -> None:
    site.pages["/a"] = answer(b"", status="302 Found", extra="location: /b\r\n")
    site.pages["/b"] = answer(b"PNG")
    site.pages["/circle"] = answer(b"", status="302 Found", extra="location: /circle\r\n")
    fetcher = egress(site, "pictures.example")
    assert (await fetcher.fetch(site.url("/a"), "image/")).data == b"PNG"
    with pytest.raises(FetchRefused, match="redirects more than"):
        await fetcher.fetch(site.url("/circle"), "image/")


async def test_a_redirect_to_another_scheme_is_refused(site: Site) -> None:
    site.pages["/a"] = answer(b"", status="302 Found", extra="location: file:///etc/passwd\r\n")
    with pytest.raises(FetchRefused, match="must be http or https"):
        await egress(site, "pictures.example").fetch(site.url("/a"), "image/")


async def test_what_is_too_large_is_not_read_on(site: Site) -> None:
    site.pages["/big.png"] = answer(b"x" * 100_000)
    with pytest.raises(FetchRefused, match="larger than 1000 bytes"):
        await egress(site, "pictures.example").fetch(site.url("/big.png"), "image/")


async def test_a_server_that_never_answers_is_given_up(site: Site) -> None:
    with pytest.raises(FetchRefused, match="did not answer"):
        await egress(site, "pictures.example", timeout_s=0.2).fetch(site.url("/nothing"), "image/")


async def test_other_content_is_refused(site: Site) -> None:
    site.pages["/page"] = answer(b"<html>", "text/html")
    with pytest.raises(FetchRefused, match="text/html"):
        await egress(site, "pictures.example").fetch(site.url("/page"), "image/")


@pytest.mark.parametrize("content_type", ["image/png,x", "image/", "image/a b", "image/<x>"])
async def test_a_content_type_that_would_not_fit_a_data_url_is_refused(site: Site, content_type: str) -> None:
    site.pages["/a.png"] = answer(b"PNG", content_type)
    with pytest.raises(FetchRefused, match="no valid Content-Type"):
        await egress(site, "pictures.example").fetch(site.url("/a.png"), "image/")


async def test_compressed_content_is_not_asked_for_and_not_read(site: Site) -> None:
    site.pages["/bomb.png"] = answer(gzip.compress(b"x" * 10_000_000), extra="content-encoding: gzip\r\n")
    with pytest.raises(FetchRefused, match="compressed"):
        await egress(site, "pictures.example", max_bytes=100_000_000).fetch(site.url("/bomb.png"), "image/")
    assert "accept-encoding: identity" in site.asked[0].lower()


@pytest.mark.parametrize(
    "url", ["ftp://x.example/a", "http://", "http://u:p@x.example/", "http://x.example:0/", "http://[::1", "gopher://x"]
)
async def test_urls_that_are_none_of_ours_are_refused(url: str) -> None:
    with pytest.raises(FetchRefused):
        await GuardedHttpClient(max_bytes=1, timeout_s=1).fetch(url, "image/")


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1/", "http://2130706433/", "http://0x7f.1/", "http://[::ffff:10.0.0.1]/", "http://localhost/"],
)
async def test_other_spellings_of_this_machine_are_refused(url: str) -> None:
    with pytest.raises(FetchRefused):
        await GuardedHttpClient(max_bytes=1, timeout_s=5).fetch(url, "image/")


async def test_a_post_carries_body_and_headers_and_gives_the_status(site: Site) -> None:
    site.pages["/hook"] = answer(b"thanks", "text/plain", "202 Accepted")
    status = await egress(site, "hooks.example").post(
        site.url("/hook", "hooks.example"), b'{"a":1}', {"webhook-id": "1"}
    )
    head = site.asked[0].lower()
    assert status == 202
    assert head.startswith("post /hook http/1.1")
    assert f"host: hooks.example:{site.port}" in head
    assert "webhook-id: 1" in head
    assert "content-length: 7" in head


async def test_a_post_follows_no_redirect(site: Site) -> None:
    site.pages["/hook"] = answer(b"", status="307 Temporary Redirect", extra=f"location: {site.url('/secret')}\r\n")
    assert await egress(site, "hooks.example").post(site.url("/hook", "hooks.example"), b"{}", {}) == 307
    assert len(site.asked) == 1


async def test_a_post_to_a_private_host_is_refused_before_anything_is_sent(site: Site) -> None:
    with pytest.raises(FetchRefused, match="not public"):
        await egress(site).post(site.url("/hook"), b"{}", {})
    assert site.asked == []


async def test_a_post_that_is_not_answered_ends_in_time(site: Site) -> None:
    with pytest.raises(FetchRefused, match="did not answer"):
        await egress(site, "hooks.example", timeout_s=0.2).post(site.url("/nothing", "hooks.example"), b"{}", {})


async def test_an_answer_without_end_to_a_post_counts_and_is_not_read() -> None:
    sent = 0
    cut_off = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\n\r\n")
        try:
            while True:
                writer.write(b"x" * 65536)
                await writer.drain()
                sent += 65536
        except OSError:
            cut_off.set()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
    poster = GuardedHttpClient(max_bytes=1, timeout_s=5, private_hosts=frozenset({"127.0.0.1"}))
    async with asyncio.timeout(10):
        assert await poster.post(url, b"{}", {}) == 200
        await cut_off.wait()
    server.close()
    # What sockets hold, and no more.
    assert sent < 16 * 1024 * 1024


async def test_a_post_to_nobody_is_refused(site: Site) -> None:
    site.pages["/hook"] = b""
    with pytest.raises(FetchRefused, match="cannot be reached"):
        await egress(site, "hooks.example").post(site.url("/hook", "hooks.example"), b"{}", {})


@pytest.mark.parametrize("url", ["http://exämple/", "http://pictures.example/\x00"])
async def test_odd_characters_are_refused(site: Site, url: str) -> None:
    with pytest.raises(FetchRefused):
        await egress(site, "pictures.example", "pictures.example").fetch(url, "image/")


@pytest.mark.parametrize("setting", ["WEBHOOK_PRIVATE_HOSTS", "FETCH_PRIVATE_HOSTS"])
async def test_a_refusal_names_the_setting_that_allows_it(site: Site, setting: str) -> None:
    """Of the first check, and of the one that looks the name up."""
    fetcher = GuardedHttpClient(max_bytes=1, timeout_s=5, resolve=egress(site)._resolve, setting=setting)
    with pytest.raises(FetchRefused, match=f"host:port in {setting}"):
        fetcher.validate_url("http://127.0.0.1/x")
    with pytest.raises(FetchRefused, match=f"host:port in {setting}"):
        await fetcher.post(site.url("/a.png"), b"{}", {})


def test_an_allowed_private_host_passes_the_first_check() -> None:
    fetcher = GuardedHttpClient(max_bytes=1, timeout_s=1, private_hosts=frozenset({"127.0.0.1:81", "localhost"}))
    fetcher.validate_url("http://127.0.0.1:81/x")
    fetcher.validate_url("http://localhost/x")
    with pytest.raises(FetchRefused):
        fetcher.validate_url("http://127.0.0.1:82/x")
