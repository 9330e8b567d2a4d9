"""Fetch or refuse the remote URLs in a request, so that no backend fetches them; data URLs pass."""

from __future__ import annotations

import base64

import orjson
from pydantic import BaseModel

from backbone.ssrf_guard import GuardedHttpClient
from gateway.http.media_fields import MediaPlace, find_media_places, is_plain, searchable_fields
from schemas.errors import InvalidRequest, NexusError, RequestTooLarge

MAX_URLS = 16
REMOTE = ("http://", "https://")


class RemoteMedia:
    """Replaces remote URLs by data URLs. Without an HTTP client, it refuses them."""

    def __init__(self, client: GuardedHttpClient | None, max_bytes: int) -> None:
        self._client = client
        self._max_bytes = max_bytes

    async def close(self) -> None:
        """Close the HTTP client."""
        if self._client is not None:
            await self._client.close()

    @staticmethod
    def find(request: BaseModel) -> list[MediaPlace]:
        """Return the URLs and paths of a validated request."""
        return [] if is_plain(request) else find_media_places(searchable_fields(request))

    async def inline(self, request: BaseModel, body: bytes) -> bytes:
        """Return the body with data URLs in place of remote ones; `request` is the same body, validated.

        Raises InvalidRequest, naming the field; RequestTooLarge.
        """
        remote = self.find(request)
        if not remote:
            return body
        for place in remote:
            _check(place)
        if self._client is None:
            raise InvalidRequest(
                f"This gateway does not fetch remote URLs. Send the content of '{remote[0].param}' as a data URL "
                "(or ask the operator to set FETCH_MEDIA=true).",
                param=remote[0].param,
                code="remote_media_disabled",
            )
        if len(remote) > MAX_URLS:
            raise InvalidRequest(f"The request has more than {MAX_URLS} remote URLs.", param=remote[MAX_URLS].param)
        return await self._fetch(self._client, body)

    async def _fetch(self, client: GuardedHttpClient, body: bytes) -> bytes:
        value = orjson.loads(body)
        left_bytes = self._max_bytes
        for place in find_media_places(value):
            _check(place)
            try:
                fetched = await client.fetch(place.url, place.kind or "")
            except NexusError as error:
                raise InvalidRequest(error.info.message, param=place.param, code=error.info.code) from error
            left_bytes -= len(fetched.data) * 4 // 3
            if left_bytes < 0:
                raise RequestTooLarge(
                    f"With the content of its URLs, the request is larger than {self._max_bytes} bytes."
                )
            place.replace(f"data:{fetched.content_type};base64,{base64.b64encode(fetched.data).decode()}")
        return orjson.dumps(value)


def _check(place: MediaPlace) -> None:
    """Raise InvalidRequest for a URL or path that is never fetched."""
    if place.kind is None:
        raise InvalidRequest(
            f"'{place.param}' holds a URL or a path, which Nexus never passes to a backend. Send the content as a data URL or in base64.",
            param=place.param,
            code="url_refused",
        )
    if not place.url.lower().startswith(REMOTE):
        raise InvalidRequest(f"'{place.param}' must be a data URL or an http(s) URL.", param=place.param)
