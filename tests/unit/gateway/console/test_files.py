"""What `/ui` serves: the built files and nothing else, as browsers may keep them."""

from __future__ import annotations

import gzip
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import httpx
import pytest
import pytest_asyncio

from gateway.app import make_app
from gateway.console.files import ConsoleFiles
from gateway.dependencies import Parts

PAGE = b"<!doctype html><title>Nexus</title>"
SCRIPT = b"console.log(1)"


def build(folder: Path, script: bytes = SCRIPT) -> None:
    (folder / "assets").mkdir(parents=True, exist_ok=True)
    (folder / "assets" / "main-abc.js.gz").write_bytes(gzip.compress(script))
    (folder / "index.html.gz").write_bytes(gzip.compress(PAGE))
    (folder / "sources.sha256").write_text("confidential")


@pytest_asyncio.fixture
async def http(tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    app = make_app(cast("Parts", SimpleNamespace()))
    app.state.console = ConsoleFiles(tmp_path / "app")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        yield client


async def test_the_page_is_fresh_and_may_run_nothing_but_its_own_files(http: httpx.AsyncClient, tmp_path: Path) -> None:
    build(tmp_path / "app")
    for path in ("/ui/", "/ui/jobs/job_1", "/ui/models/org%2Fname", "/ui/index.html"):
        answer = await http.get(path)
        assert (answer.status_code, answer.content) == (200, PAGE), path
        assert answer.headers["content-encoding"] == "gzip"
        assert answer.headers["cache-control"] == "no-store"
        policy = answer.headers["content-security-policy"].split("; ")
        assert {"default-src 'none'", "script-src 'self'", "style-src 'self'", "frame-ancestors 'none'"} <= set(policy)
        assert "unsafe" not in str(policy)


async def test_files_with_a_hash_in_their_name_are_kept(http: httpx.AsyncClient, tmp_path: Path) -> None:
    build(tmp_path / "app")
    answer = await http.get("/ui/assets/main-abc.js")
    assert answer.content == SCRIPT
    assert answer.headers["content-type"].startswith("text/javascript")
    assert "immutable" in answer.headers["cache-control"]
    plain = await http.get("/ui/assets/main-abc.js", headers={"accept-encoding": "identity"})
    assert (plain.content, "content-encoding" in plain.headers) == (SCRIPT, False)
    # Of another version: never the page, which a browser would take for a script.
    assert (await http.get("/ui/assets/main-old.js")).status_code == 404


@pytest.mark.parametrize(
    "path", ["../secret", "..%2fsecret", "%2e%2e/secret", "assets/../../secret", "sources.sha256", "//etc/passwd"]
)
async def test_no_path_reaches_a_file_that_was_not_built(http: httpx.AsyncClient, tmp_path: Path, path: str) -> None:
    build(tmp_path / "app")
    (tmp_path / "secret").write_text("confidential")
    answer = await http.get(httpx.URL("http://test").copy_with(raw_path=b"/ui/" + path.encode()))
    assert b"confidential" not in answer.content


async def test_a_new_build_is_served_without_a_restart(http: httpx.AsyncClient, tmp_path: Path) -> None:
    build(tmp_path / "app")
    assert (await http.get("/ui/assets/main-abc.js")).content == SCRIPT
    build(tmp_path / "app", b"2")
    assert (await http.get("/ui/assets/main-abc.js")).content == b"2"


async def test_without_a_build_the_page_says_what_to_run(http: httpx.AsyncClient) -> None:
    answer = await http.get("/ui/queues")
    assert answer.status_code == 503
    assert "make console" in answer.text


async def test_the_short_address_leads_to_it(http: httpx.AsyncClient) -> None:
    answer = await http.get("/ui?x=1")
    assert (answer.status_code, answer.headers["location"]) == (308, "/ui/?x=1")
