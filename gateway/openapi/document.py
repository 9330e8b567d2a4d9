"""The OpenAPI document as bytes, built on the first request and cached."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Any

import orjson

from gateway.http.asgi import Scope
from gateway.signed_urls import base_url

JSON = dict[str, Any]
HOST = re.compile(r"(https?://(?:[A-Za-z0-9.-]+|\[[0-9a-fA-F:.]+\]))(?::\d+)?")


class ApiDocument:
    """Serves the OpenAPI document, on the API's own port or on the observability port."""

    def __init__(
        self,
        make: Callable[[], JSON],
        *,
        beside: Callable[[], JSON] | None = None,
        public_url: str = "",
        port: int = 0,
    ) -> None:
        """`make`: FastAPI's document of the API. `beside`: that of the app which serves this one, where it is another;
        the API is then at `public_url`, or at `port` of the host that the reader named.
        """
        self._make = make
        self._beside = beside
        self._public_url = public_url.rstrip("/")
        self._port = port
        self._parts: tuple[bytes, bytes] | None = None
        self._build_lock = asyncio.Lock()

    async def of(self, scope: Scope) -> bytes:
        """Return the document as JSON, with the API's URL as the caller of this request reaches it."""
        async with self._build_lock:
            if self._parts is None:
                # Building takes about 0.2 s of CPU time; the thread keeps other requests going.
                self._parts = await asyncio.to_thread(self._build)
        head, rest = self._parts
        server = self.server(scope)
        servers = b',"servers":' + orjson.dumps([{"url": server}]) if server else b""
        return head[:-1] + servers + b"," + rest[1:]

    def _build(self) -> tuple[bytes, bytes]:
        """Build the document as JSON in two parts: the head before `servers`, and the rest."""
        from gateway.openapi.enrichment import enrich  # imports every response model, so it is loaded on demand

        document = enrich(self._make())
        if self._beside is not None:
            here = {"servers": [{"url": "/"}]}
            for path, methods in enrich(self._beside())["paths"].items():
                document["paths"][path] = {method: operation | here for method, operation in methods.items()}
        head = {name: document.pop(name) for name in ("openapi", "info")}
        return orjson.dumps(head), orjson.dumps(document)

    def server(self, scope: Scope) -> str:
        """Return the API's URL. Empty if the API serves this document itself."""
        if self._beside is None:
            return ""
        if self._public_url or not self._port:
            return self._public_url
        match = HOST.fullmatch(base_url(scope))
        return f"{match[1]}:{self._port}" if match is not None else ""
