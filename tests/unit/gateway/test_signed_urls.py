"""URLs of results: good for one result, one owner, one key, and a while."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from gateway.signed_urls import UrlSigner, base_url
from schemas.errors import NotFound

KEY = "sk-key"


def taken_apart(url: str) -> tuple[str, str, int, str]:
    parts = urlsplit(url)
    query = {name: values[0] for name, values in parse_qs(parts.query).items()}
    return parts.path.rpartition("/")[2], query["owner"], int(query["expires"]), query["signature"]


def test_a_signed_url_is_accepted_as_it_is_and_not_otherwise() -> None:
    url_signer = UrlSigner(KEY, "", 60)
    name, owner, expires, signature = taken_apart(url_signer.sign("a" * 32, "alice", "http://h"))
    url_signer.verify(name, owner, expires, signature)
    for wrong in (
        ("b" * 32, owner, expires, signature),
        (name, "bob", expires, signature),
        (name, owner, expires + 1, signature),
        (name, owner, expires, "0" * 64),
        (name, owner, expires, "é"),
    ):
        with pytest.raises(NotFound):
            url_signer.verify(*wrong)
    with pytest.raises(NotFound):
        UrlSigner("another key", "", 60).verify(name, owner, expires, signature)


def test_a_signed_url_expires() -> None:
    url_signer = UrlSigner(KEY, "", -1)
    with pytest.raises(NotFound, match="expired"):
        url_signer.verify(*taken_apart(url_signer.sign("a", "alice", "http://h")))


def test_only_blob_names_are_replaced_by_urls() -> None:
    answer: dict[str, Any] = {
        "created": 1,
        "data": [{"url": "nexus-blob:abc"}, {"url": "https://elsewhere/x"}, {"b64_json": "AA"}],
    }
    found = json.loads(
        UrlSigner(KEY, "https://nexus.example/", 60).sign_urls(json.dumps(answer).encode(), "alice", "http://h")
    )
    assert found["data"][0]["url"].startswith("https://nexus.example/v1/results/abc?owner=alice&expires=")
    assert found["data"][1:] == answer["data"][1:]


def test_the_base_url_is_the_callers() -> None:
    assert base_url({"scheme": "https", "headers": [(b"host", b"nexus:88")]}) == "https://nexus:88"
    assert base_url({"headers": [], "server": ("10.0.0.1", 8800)}) == "http://10.0.0.1:8800"


def test_a_signed_url_ends_with_its_key() -> None:
    """It names the key, which cannot be left out or replaced; a revoked one's URLs are no more."""
    revoked: set[str] = set()
    url_signer = UrlSigner(KEY, "", 60, revoked.__contains__)
    url = url_signer.sign("a" * 32, "alice", "http://h", "key_1")
    assert "key=key_1" in url
    parts = taken_apart(url)
    url_signer.verify(*parts, "key_1")
    for wrong in ("", "key_2"):
        with pytest.raises(NotFound):
            url_signer.verify(*parts, wrong)
    revoked.add("key_1")
    with pytest.raises(NotFound):
        url_signer.verify(*parts, "key_1")
