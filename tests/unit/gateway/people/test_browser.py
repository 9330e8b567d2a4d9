"""Where browsers may be sent, what their cookies look like, and which requests come from another site."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.people.browser import Cookie, CrossSiteRequest, Origin, local_target


@pytest.mark.parametrize("path", ["/", "/ui", "/ui?x=//evil.example#y", "/a%2F%2Fb", "/.//evil.example"])
def test_a_path_of_this_gateway_is_kept(path: str) -> None:
    assert local_target(path) == path


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ui",
        "//evil.example",
        "/\\evil.example",
        "\\/evil.example",
        "///evil.example",
        "/a\\b",
        "/\n//evil.example",
        "/ x",
        "/ü",
        "https://evil.example",
        "javascript:alert(1)",
        "/auth/login",
        "/" + "x" * 2048,
    ],
)
def test_anything_else_leads_to_the_start_page(text: str) -> None:
    assert local_target(text) == "/"


def test_by_https_a_cookie_belongs_to_this_host_alone() -> None:
    """The prefix makes browsers refuse one that another host, or a page without TLS, has set; so does the gateway."""
    cookie = Cookie("session", 60)
    secure = cookie.set("value", secure=True)
    assert secure == "__Host-session=value; Path=/; Max-Age=60; HttpOnly; SameSite=Lax; Secure"
    assert cookie.set("", secure=False) == "session=; Path=/; Max-Age=0; HttpOnly; SameSite=Lax"
    headers = [(b"cookie", b"a=b; session=tossed; __Host-session=value")]
    assert cookie.read(headers, secure=True) == "value"
    assert cookie.read([(b"cookie", b"session=tossed")], secure=True) == ""
    assert cookie.read([(b"cookie", b"x"), (b"cookie", b"session=own")], secure=False) == "own"


def scope(**headers: str) -> dict[str, Any]:
    found = {"host": "nexus.example", **headers}
    return {"scheme": "http", "headers": [(k.replace("_", "-").encode(), v.encode()) for k, v in found.items()]}


@pytest.mark.parametrize(
    ("public_url", "headers", "is_same"),
    [
        ("", {}, True),
        ("", {"origin": "http://nexus.example"}, True),
        ("HTTPS://Public.example:443", {"origin": "https://public.example"}, True),
        ("https://public.example:444", {"origin": "https://public.example"}, False),
        ("", {"origin": "https://nexus.example"}, False),
        ("", {"origin": "http://nexus.example.evil.example"}, False),
        ("", {"origin": "null"}, False),
        ("", {"sec_fetch_site": "same-site"}, False),
        ("", {"sec_fetch_site": "cross-site", "origin": "http://nexus.example"}, False),
        ("https://public.example/", {"origin": "https://public.example", "sec_fetch_site": "same-origin"}, True),
        ("https://public.example/", {"origin": "http://nexus.example"}, False),
    ],
)
def test_requests_of_other_origins_are_refused(public_url: str, headers: dict[str, str], is_same: bool) -> None:
    """By the public URL where there is one, whatever `Host` says."""
    try:
        Origin(public_url).require_same(scope(**headers))
    except CrossSiteRequest:
        assert not is_same
    else:
        assert is_same
