"""One registered HTTP service at one place: whether it is ready, what it offers, and calls to it.

Looking at it has its own short time limit, so that one that hangs never hides the others.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from time import monotonic
from typing import Any
from urllib.parse import urlsplit

import orjson

from schemas.presence import Limitation, ServiceRecord
from workers.adapter_kit.error_mapping import error_from_response
from workers.adapter_kit.http_client import HttpClient
from workers.adapter_kit.openai.calls import call_of
from workers.adapter_kit.openai.client import OpenAIClient
from workers.adapter_kit.openai.text import STREAM_FEATURES
from workers.backends.base import BackendError, BackendRefused, Output, Task
from workers.backends.service.metadata import (
    ENDPOINTS,
    ServiceMetadata,
    endpoints_in,
    names_models,
    parse_metadata,
    paths_of,
)

JSON = dict[str, Any]

API_END = re.compile(r"/v\d+[a-z0-9]*$")
LOOK_S = 4.0
"""How long a service may take to say how it is and what it offers."""
SLOW_LOOKS = 3
"""A ready service at full load may be slow to say so: this many times in a row."""
DOCUMENT_LIMIT = 4 * 1024 * 1024
OPENAPI_LIMIT = 64 * 1024 * 1024
MISSING = frozenset({404, 405, 501})
PROBES = ("/readyz", "/health")


class ServiceInstance:
    """Where a record says that its service is. Another record means another place."""

    def __init__(self, name: str, record: ServiceRecord, api_key: str) -> None:
        """Raises ValueError when a URL of the record makes no sense."""
        self.name = name
        self.record = record
        self.running = 0
        self.ready = False
        self.advert: ServiceMetadata | None = None
        """None as long as it has never been ready."""
        self.problem = "not looked at yet"
        """Why it is not ready."""
        self.looked = False
        self._slow = 0
        self._resumes: dict[str, float] = {}
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        url = record.base_url.rstrip("/")
        end = API_END.search(urlsplit(url).path)
        own = end.group() if end else ""
        self._client = HttpClient(url[: len(url) - len(own)], headers=headers)
        self._api = OpenAIClient(self._client, own or "/v1", self._refusal)
        self._api_key = api_key
        self._documents, self._metadata_path = self._client, f"{self._api.base_path}/metadata"
        if record.metadata_url:
            parts = urlsplit(record.metadata_url)
            self._documents = HttpClient(f"{parts.scheme}://{parts.netloc}", headers=headers)
            self._metadata_path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")

    async def close(self) -> None:
        """End every connection."""
        await self._api.limitations.close()
        await self._client.close()
        await self._documents.close()

    @property
    def limitations(self) -> tuple[Limitation, ...]:
        """What probes have shown that its models lack."""
        return self._api.limitations.confirmed_limitations()

    @property
    def slots(self) -> int | None:
        """Requests at once: the operator's word, else the service's."""
        said = (self.record.model_extra or {}).get("concurrency")
        if isinstance(said, int) and said > 0:
            return said
        return self.advert.concurrency if self.advert is not None else None

    def pause(self, model: str, seconds: float) -> None:
        """Leave it alone with this model for so long: it has asked to."""
        self._resumes[model] = max(monotonic() + seconds, self._resumes.get(model, 0.0))

    def waits_s(self, model: str) -> float:
        """How long it is to be left alone with this model yet; 0: not at all."""
        return max(0.0, self._resumes[model] - monotonic()) if model in self._resumes else 0.0

    def offers(self, model: str) -> bool:
        """Whether it has this model, ready or not."""
        return self.advert is not None and any(one.name == model for one in self.advert.models)

    def serves(self, endpoint: str) -> bool:
        """Whether it has this endpoint."""
        return self.advert is not None and endpoint in self.advert.endpoints

    # Looking

    async def check(self) -> None:
        """Learn whether it is ready. Never raises."""
        await self._look(self._require_ready if self.advert is not None else self._learn)

    async def look(self) -> None:
        """Learn whether it is ready, and what it offers. Never raises."""
        await self._look(self._learn)
        self.looked = True

    async def _look(self, how: Callable[[], Awaitable[None]]) -> None:
        try:
            async with asyncio.timeout(LOOK_S):
                await how()
        except TimeoutError:
            self._slow += 1
            if self.ready and self._slow < SLOW_LOOKS:
                return
            self.problem = f"no answer within {LOOK_S:g} s"
        except BackendError as error:
            self.problem = error.info.message
        else:
            self._slow = 0
            self.ready = self.advert is not None
            return
        self.ready = False

    async def _require_ready(self) -> None:
        for path in PROBES:
            status, body = await self._get(self._client, path)
            if status in MISSING:
                continue
            if not 200 <= status < 300:
                said = body[:200].decode("utf-8", "replace")
                raise BackendError(f"{path} answers {status}: {said}")
            return

    async def _learn(self) -> None:
        await self._require_ready()
        try:
            self.advert = await self._read()
        except BackendError:
            if self.advert is None:
                raise

    async def _read(self) -> ServiceMetadata:
        """Metadata; where that lacks what is needed, the descriptor, OpenAPI's document, and the list of models."""
        documents = await self._metadata()
        endpoints = frozenset[str]().union(*map(endpoints_in, documents))
        if not endpoints:
            descriptor = await self._document(self._client, f"{self._api.base_path}/descriptor")
            documents += [descriptor] if descriptor is not None else []
            endpoints = endpoints_in(descriptor or {})
        guessed = not endpoints and not any("endpoints" in one for one in documents)
        if guessed:
            openapi = await self._document(self._client, "/openapi.json", OPENAPI_LIMIT)
            endpoints = paths_of(openapi) if openapi is not None else frozenset(ENDPOINTS)
        listed = None
        if not any(names_models(one) for one in documents):
            listed = await self._document(self._client, f"{self._api.base_path}/models")
        if not endpoints or (guessed and not documents and listed is None):
            raise BackendError(
                f"{self._metadata_path} names no endpoint that Nexus knows; it must list some under 'endpoints'"
            )
        advert = parse_metadata(self.name, endpoints, documents, listed, guessed=guessed)
        self._api.limitations.declare(() if advert.streams else _streamless(advert))
        self._api.voices = {model.name: model.voices[0] for model in advert.models if model.voices}
        return advert

    async def _metadata(self) -> list[JSON]:
        """From where the record says; scripts write that address without looking, so also from where it belongs."""
        document = await self._document(self._documents, self._metadata_path)
        if document is None and self.record.metadata_url:
            document = await self._document(self._client, f"{self._api.base_path}/metadata")
        return [] if document is None else [document]

    async def _document(self, client: HttpClient, path: str, limit: int = DOCUMENT_LIMIT) -> JSON | None:
        """A JSON object; None where there is none at this path. Raises BackendError for any other answer."""
        status, body = await self._get(client, path, limit)
        if status in MISSING:
            return None
        if status != 200:
            raise self._refusal(status, {}, body)
        try:
            document = orjson.loads(body)
        except orjson.JSONDecodeError as error:
            raise BackendError(f"{path} is not JSON: {error}") from error
        if isinstance(document, list):
            document = {"data": document}
        return document if isinstance(document, dict) else None

    async def _get(self, client: HttpClient, path: str, limit: int = DOCUMENT_LIMIT) -> tuple[int, bytes]:
        response = await client.request("GET", path)
        try:
            return response.status, await response.read_all(limit)
        finally:
            response.close()

    # Calling

    def answer(self, task: Task) -> AsyncGenerator[Output]:
        """What the service answers. Raises BackendRefused when it does not have the endpoint."""
        if not self.serves(task.endpoint):
            has = ", ".join(sorted(self.advert.endpoints)) if self.advert is not None else "nothing yet"
            raise BackendRefused(f"the service {self.name} does not serve {task.endpoint}; it serves {has}")
        return call_of(task)(self._api, task)

    def _refusal(self, status: int, headers: Mapping[str, str], body: bytes) -> BackendError:
        if self._api_key:
            body = body.replace(self._api_key.encode(), b"***")
        return error_from_response(status, headers, body)


def _streamless(advert: ServiceMetadata) -> Iterator[tuple[str, str]]:
    """The service streams no text and no transcript, by its own word."""
    for model in advert.models:
        for feature in STREAM_FEATURES:
            yield model.name, feature
