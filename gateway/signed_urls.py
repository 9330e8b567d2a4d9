"""URLs under which results are fetched without a key: unguessable, signed, and only for a while.

`GET /v1/results/<blob>?owner=…&expires=…&signature=…`. The signature is an HMAC with a key made from the API key under
which the result was asked for: another key, or none, makes no valid URL, and a key that is changed ends its URLs.
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
"""Before a blob's name, where a worker's answer holds what the caller gets by URL."""
PATH = "/v1/results/"


class UrlSigner:
    """Signs and checks."""

    def __init__(self, token: str | None, public_url: str, ttl_s: float) -> None:
        self._key = hashlib.sha256(b"nexus result urls\n" + (token or "").encode()).digest()
        self._public_url = public_url.rstrip("/")
        self.ttl_s = ttl_s

    def sign_urls(self, answer: bytes, owner: str, base: str) -> bytes:
        """An answer of `{"data": [{"url": …}]}` with URLs in the place of what the worker keeps."""
        value: Any = orjson.loads(answer)
        for item in value.get("data") or ():
            url = item.get("url")
            if isinstance(url, str) and url.startswith(BLOB_URI_PREFIX):
                item["url"] = self.sign(url.removeprefix(BLOB_URI_PREFIX), owner, base)
        return orjson.dumps(value)

    def sign(self, name: str, owner: str, base: str) -> str:
        """The URL of a blob, below `base` unless a public URL is configured."""
        expires = int(clock.now() + self.ttl_s)
        query = urlencode({"owner": owner, "expires": expires, "signature": self._signature(name, owner, expires)})
        return f"{self._public_url or base}{PATH}{quote(name)}?{query}"

    def verify(self, name: str, owner: str, expires: int, signature: str) -> None:
        """Raises NotFound, whatever is wrong: who guesses learns nothing."""
        good = hmac.compare_digest(signature.encode(), self._signature(name, owner, expires).encode())
        if not good or expires < clock.now():
            raise NotFound("there is no such result, or its URL has expired; ask for it again")

    def _signature(self, name: str, owner: str, expires: int) -> str:
        return hmac.new(self._key, f"{name}\n{owner}\n{expires}".encode(), hashlib.sha256).hexdigest()


def base_url(scope: Scope) -> str:
    """Where the caller reached us, by its own word."""
    headers: Headers = scope["headers"]
    host = next((value.decode("latin-1") for name, value in headers if name == b"host"), "")
    if not host:
        address = scope.get("server") or ("127.0.0.1", 80)
        host = f"{address[0]}:{address[1]}"
    return f"{scope.get('scheme', 'http')}://{host}"
