"""What chat messages show by URL: data URLs pass, remote ones are fetched here or refused, so that no backend fetches them."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import orjson

from backbone.egress import Egress
from schemas.errors import InvalidRequest, NexusError, RequestTooLarge
from schemas.openai.chat import ChatRequest

KINDS = {"image_url": "image/", "audio_url": "audio/", "video_url": "video/"}
"""Content parts that hold a URL, and the content types that may be there."""
HINT = b'_url"'
"""In every body that has such a part."""
MAX_URLS = 16


class RemoteMedia:
    """Puts data URLs in the place of remote ones. Without an `egress`, remote ones are refused."""

    def __init__(self, egress: Egress | None, max_bytes: int) -> None:
        self._egress = egress
        self._max_bytes = max_bytes

    async def close(self) -> None:
        """Close every connection."""
        if self._egress is not None:
            await self._egress.close()

    async def inline(self, request: ChatRequest, body: bytes) -> bytes:
        """The body that goes on. Raises InvalidRequest naming the part, RequestTooLarge."""
        remote = [place for place in _urls(request.model_dump()) if not place.url.startswith("data:")]
        if not remote:
            return body
        for place in remote:
            if not place.url.lower().startswith(("http://", "https://")):
                raise InvalidRequest(f"this must be a data URL or an http(s) URL: '{place.param}'", param=place.param)
        if self._egress is None:
            raise InvalidRequest(
                f"remote URLs are not fetched here; send the content as a data URL: '{remote[0].param}' "
                "(an operator may allow it with FETCH_MEDIA=true)",
                param=remote[0].param,
                code="remote_media_disabled",
            )
        if len(remote) > MAX_URLS:
            raise InvalidRequest(f"more than {MAX_URLS} remote URLs", param=remote[MAX_URLS].param)
        value = orjson.loads(body)
        left = self._max_bytes
        for place in _urls(value):
            if place.url.startswith("data:"):
                continue
            try:
                fetched = await self._egress.fetch(place.url, place.kind)
            except NexusError as error:
                raise InvalidRequest(error.info.message, param=place.param, code=error.info.code) from error
            left -= len(fetched.data) * 4 // 3
            if left < 0:
                raise RequestTooLarge(f"with what its URLs hold, the request is larger than {self._max_bytes} bytes")
            place.replace(f"data:{fetched.content_type};base64,{base64.b64encode(fetched.data).decode()}")
        return orjson.dumps(value)


class _Place:
    """Where a URL stands in a request."""

    def __init__(self, part: dict[str, Any], name: str, param: str) -> None:
        self._part = part
        self._name = name
        self.kind = KINDS[name]
        self.param = param

    @property
    def url(self) -> str:
        """The URL; some clients leave out the object around it."""
        held = self._part[self._name]
        url = held.get("url") if isinstance(held, dict) else held
        return url if isinstance(url, str) else ""

    def replace(self, url: str) -> None:
        """Put another one there."""
        held = self._part[self._name]
        if isinstance(held, dict):
            held["url"] = url
        else:
            self._part[self._name] = url


def _urls(request: dict[str, Any]) -> Iterator[_Place]:
    for number, message in enumerate(request["messages"]):
        content = message.get("content")
        for at, part in enumerate(content if isinstance(content, list) else ()):
            for name in KINDS:
                if isinstance(part, dict) and part.get(name) is not None:
                    yield _Place(part, name, f"messages.{number}.content.{at}.{name}")
