"""The document as it is served: made once, when somebody first reads it, and kept as bytes."""

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
    """The document of the API, served by the API itself or by the observability port beside it."""

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
        self._making = asyncio.Lock()

    async def of(self, scope: Scope) -> bytes:
        """Return the document for the reader of this request, as JSON."""
        async with self._making:
            if self._parts is None:
                # About a fifth of a second of work, which no other request shall wait for.
                self._parts = await asyncio.to_thread(self._made)
        head, rest = self._parts
        server = self.server(scope)
        servers = b',"servers":' + orjson.dumps([{"url": server}]) if server else b""
        return head[:-1] + servers + b"," + rest[1:]

    def _made(self) -> tuple[bytes, bytes]:
        """The document's head, and all that follows its servers."""
        from gateway.openapi.enrichment import complete  # with every model of an answer: not before it is needed

        document = complete(self._make())
        if self._beside is not None:
            here = {"servers": [{"url": "/"}]}
            for path, methods in complete(self._beside())["paths"].items():
                document["paths"][path] = {method: operation | here for method, operation in methods.items()}
        head = {name: document.pop(name) for name in ("openapi", "info")}
        return orjson.dumps(head), orjson.dumps(document)

    def server(self, scope: Scope) -> str:
        """Return the API's URL; empty: where the document is."""
        if self._beside is None:
            return ""
        if self._public_url or not self._port:
            return self._public_url
        match = HOST.fullmatch(base_url(scope))
        return f"{match[1]}:{self._port}" if match is not None else ""
