"""Sign and verify the URLs under which results are fetched without an API key, for a limited time.

`GET /v1/results/<blob>?owner=…&expires=…&signature=…&key=…`. `key` names the API key that got the URL, which ends with it. The signature is an HMAC with a key that is derived from the bootstrap key:
gateways with the same bootstrap key accept each other's URLs, and a changed bootstrap key invalidates them.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable
from typing import Any
from urllib.parse import quote, urlencode

import orjson

from gateway import clock
from gateway.http.asgi import Headers, Scope
from schemas.errors import NotFound

BLOB_URI_PREFIX = "nexus-blob:"
"""Prefix of a blob's name in a worker's answer, where the caller gets a URL."""
PATH = "/v1/results/"


class UrlSigner:
    """Signs and verifies URLs of results."""

    def __init__(
        self,
        token: str | None,
        public_url: str,
        ttl_s: float,
        is_revoked: Callable[[str], bool] = lambda _key: False,
    ) -> None:
        """`is_revoked` returns whether an API key is revoked, by its id: its URLs are invalid then."""
        self._key = hashlib.sha256(b"nexus result urls\n" + (token or "").encode()).digest()
        self._public_url = public_url.rstrip("/")
        self.ttl_s = ttl_s
        self._is_revoked = is_revoked

    def sign_urls(self, answer: bytes, owner: str, base: str, key: str = "") -> bytes:
        """Return an answer of the form `{"data": [{"url": …}]}` with signed URLs in place of the blobs' names.

        `key`: id of the API key with which the URLs end.
        """
        value: Any = orjson.loads(answer)
        for item in value.get("data") or ():
            url = item.get("url")
            if isinstance(url, str) and url.startswith(BLOB_URI_PREFIX):
                item["url"] = self.sign(url.removeprefix(BLOB_URI_PREFIX), owner, base, key)
        return orjson.dumps(value)

    def sign(self, name: str, owner: str, base: str, key: str = "") -> str:
        """Return the signed URL of a blob, below the configured public URL or else `base`."""
        expires = int(clock.now() + self.ttl_s)
        fields = {"owner": owner, "expires": expires, "signature": self._signature(name, owner, expires, key)}
        query = urlencode(fields | ({"key": key} if key else {}))
        return f"{self._public_url or base}{PATH}{quote(name)}?{query}"

    def verify(self, name: str, owner: str, expires: int, signature: str, key: str = "") -> None:
        """Raise NotFound if the signature is wrong, or the URL has ended; the error does not say which."""
        good = hmac.compare_digest(signature.encode(), self._signature(name, owner, expires, key).encode())
        if not good or expires < clock.now() or (key and self._is_revoked(key)):
            raise NotFound("There is no such result, or its URL has expired. Request the result again for a new URL.")

    def _signature(self, name: str, owner: str, expires: int, key: str) -> str:
        text = f"{name}\n{owner}\n{expires}" + (f"\n{key}" if key else "")
        return hmac.new(self._key, text.encode(), hashlib.sha256).hexdigest()


def url_blobs(answer: bytes) -> list[str]:
    """Return the names of the blobs to which a worker's answer leads by URL."""
    if BLOB_URI_PREFIX.encode() not in answer:
        return []
    try:
        items = orjson.loads(answer)["data"]
        urls = [item["url"] for item in items if "url" in item]
    except (ValueError, TypeError, KeyError):
        return []  # a worker's answer may be anything
    return [
        url.removeprefix(BLOB_URI_PREFIX) for url in urls if isinstance(url, str) and url.startswith(BLOB_URI_PREFIX)
    ]


def base_url(scope: Scope) -> str:
    """Return the base URL under which the caller reached the gateway, by its `Host` header."""
    headers: Headers = scope["headers"]
    host = next((value.decode("latin-1") for name, value in headers if name == b"host"), "")
    if not host:
        address = scope.get("server") or ("127.0.0.1", 80)
        host = f"{address[0]}:{address[1]}"
    return f"{scope.get('scheme', 'http')}://{host}"
