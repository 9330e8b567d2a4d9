"""Sign and verify the URLs under which results are fetched without an API key, for a limited time.

`GET /v1/results/<blob>?owner=…&expires=…&signature=…`. The signature is an HMAC with a key that is derived from the bootstrap key:
gateways with the same bootstrap key accept each other's URLs, and a changed bootstrap key invalidates them.
"""

from __future__ import annotations

import hashlib
import hmac
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

    def __init__(self, token: str | None, public_url: str, ttl_s: float) -> None:
        self._key = hashlib.sha256(b"nexus result urls\n" + (token or "").encode()).digest()
        self._public_url = public_url.rstrip("/")
        self.ttl_s = ttl_s

    def sign_urls(self, answer: bytes, owner: str, base: str) -> bytes:
        """Return an answer of the form `{"data": [{"url": …}]}` with signed URLs in place of the blobs' names."""
        value: Any = orjson.loads(answer)
        for item in value.get("data") or ():
            url = item.get("url")
            if isinstance(url, str) and url.startswith(BLOB_URI_PREFIX):
                item["url"] = self.sign(url.removeprefix(BLOB_URI_PREFIX), owner, base)
        return orjson.dumps(value)

    def sign(self, name: str, owner: str, base: str) -> str:
        """Return the signed URL of a blob, below the configured public URL or else `base`."""
        expires = int(clock.now() + self.ttl_s)
        query = urlencode({"owner": owner, "expires": expires, "signature": self._signature(name, owner, expires)})
        return f"{self._public_url or base}{PATH}{quote(name)}?{query}"

    def verify(self, name: str, owner: str, expires: int, signature: str) -> None:
        """Raise NotFound if the signature is wrong or has expired; the error does not say which."""
        good = hmac.compare_digest(signature.encode(), self._signature(name, owner, expires).encode())
        if not good or expires < clock.now():
            raise NotFound("There is no such result, or its URL has expired. Request the result again for a new URL.")

    def _signature(self, name: str, owner: str, expires: int) -> str:
        return hmac.new(self._key, f"{name}\n{owner}\n{expires}".encode(), hashlib.sha256).hexdigest()


def base_url(scope: Scope) -> str:
    """Return the base URL under which the caller reached the gateway, by its `Host` header."""
    headers: Headers = scope["headers"]
    host = next((value.decode("latin-1") for name, value in headers if name == b"host"), "")
    if not host:
        address = scope.get("server") or ("127.0.0.1", 80)
        host = f"{address[0]}:{address[1]}"
    return f"{scope.get('scheme', 'http')}://{host}"
