"""The page at `/`: true URLs, hostile `Host` headers, JSON for programs, a policy that lets the page do nothing."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from gateway.landing_page import CONTENT_SECURITY_POLICY, DEFAULT_BASE_URL, LandingPage, wants_json


def scope(host: str | None = "gw.example:8800", *, client: str = "203.0.113.9", scheme: str = "http") -> dict[str, Any]:
    headers = [] if host is None else [(b"host", host.encode("latin-1"))]
    return {"headers": headers, "scheme": scheme, "client": (client, 1), "server": ("10.1.2.3", 8800)}


class Page(HTMLParser):
    """Its text, its links, and its elements."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text = ""
        self.links: list[str | None] = []
        self.elements: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.links += [value for name, value in attributes if name in ("href", "src")]

    def handle_data(self, data: str) -> None:
        self.text += data


def page(landing_page: LandingPage, scope_: dict[str, Any], *, ready: bool = True) -> Page:
    return Page(landing_page.page(scope_, ready=ready))


@pytest.mark.parametrize("host", ["gw.example:8800", "127.0.0.1:8800", "[::1]:9000", "nexus"])
def test_examples_have_the_url_that_the_reader_used(host: str) -> None:
    """They can be pasted as they stand, but for the key and the model."""
    text = page(LandingPage(), scope(host, scheme="https")).text
    assert text.count(f"https://{host}/v1") == 4
    assert LandingPage().summary(scope(host), ready=True)["base_url"] == f"http://{host}/v1"


def test_a_configured_url_goes_first() -> None:
    """PUBLIC_URL, whatever the request says."""
    assert "https://ai.example/nexus/v1" in page(LandingPage("https://ai.example/nexus/"), scope("evil.example")).text


@pytest.mark.parametrize(
    "host",
    [
        *('"><script>alert(1)</script>', "a b", "x'y", "x;y", "a/b", "user@evil", "x$(id)", "x`id`", "evil\\", "-x"),
        *("x:y", "x:123456", "[::1", "\xff", "", None, "a" * 300, "{base}", "a%0a", "[fe80::1%25eth0]:1"),
    ],
)
def test_a_malformed_host_is_not_repeated(host: str | None) -> None:
    """Nor is the address of this process shown in its place."""
    made = LandingPage().page(scope(host), ready=True)
    assert made == LandingPage().page(scope(DEFAULT_BASE_URL.removeprefix("http://")), ready=True)
    assert "10.1.2.3" not in made


def test_the_state_is_one_of_two_words() -> None:
    """As `/readyz` says it to strangers."""
    assert "is ready for requests" in page(LandingPage(), scope()).text
    assert "cannot serve requests" in page(LandingPage(), scope(), ready=False).text
    assert [LandingPage().summary(scope(), ready=ready)["status"] for ready in (True, False)] == [
        "ready",
        "unavailable",
    ]


def test_no_version_for_strangers() -> None:
    """Who looks for known holes learns nothing."""
    summary = LandingPage().summary(scope(), ready=True)
    assert set(summary) == {"name", "status", "base_url"}
    assert not re.search(r"\d+\.\d+\.\d+", LandingPage().page(scope(), ready=True))


def test_the_page_loads_nothing_and_runs_nothing() -> None:
    """Its policy allows its own style, by its hash, and an empty icon."""
    made = LandingPage().page(scope(), ready=True)
    found = page(LandingPage(), scope())
    assert found.links == ["data:,", "ui/"]
    assert not {"script", "img", "form", "iframe", "object"} & set(found.elements)
    assert " style=" not in made
    style = made.split("<style>")[1].split("</style>")[0]
    assert f"'sha256-{base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()}'" in CONTENT_SECURITY_POLICY
    assert "unsafe" not in CONTENT_SECURITY_POLICY


def test_where_the_documentation_is() -> None:
    """On this port, where PUBLIC_ROUTES has it; on the observability port, for readers on this machine alone."""
    assert page(LandingPage(documented=True), scope()).links[2:] == ["docs", "openapi.json"]
    here = LandingPage(observability_port=8801)
    for host in ("127.0.0.1", "localhost", "[::1]"):
        links = page(here, scope(f"{host}:8800", client="127.0.0.1")).links[2:]
        assert links == [f"http://{host}:8801/docs", f"http://{host}:8801/openapi.json"]
    for stranger in (scope("127.0.0.1:8800"), scope(client="127.0.0.1")):
        found = page(here, stranger)
        assert found.links == ["data:,", "ui/"]
        assert "8801" not in found.text
        assert "/docs" in found.text


@pytest.mark.parametrize(
    ("accept", "json"),
    [
        ("application/json", True),
        ("application/json, text/plain, */*", True),
        ("application/json;q=0.9, text/html;q=0.5", True),
        ("Application/JSON", True),
        ("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", False),
        ("text/html, application/json", False),
        ("application/json;q=0", False),
        ("application/json;q=x", False),
        ("*/*", False),
        ("", False),
        (None, False),
    ],
)
def test_accept_header(accept: str | None, json: bool) -> None:
    """Programs that ask for it; browsers and curl get the page."""
    assert wants_json([] if accept is None else [(b"accept", accept.encode())]) is json
