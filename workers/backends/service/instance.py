"""One instance of a registered HTTP service: whether it is ready, what it offers, and calls to it.

A poll has a short time limit of its own, so that a service that hangs does not delay the others.
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
from workers.adapter_kit.error_mapping import UNSUPPORTED_ENDPOINT, error_from_response
from workers.adapter_kit.http_client import HttpClient
from workers.adapter_kit.openai.calls import call_of
from workers.adapter_kit.openai.client import OpenAIClient
from workers.adapter_kit.openai.text import STREAM_FEATURES
from workers.backends.base import BackendError, BackendRefused, Output, Task
from workers.backends.service.metadata import (
    ENDPOINTS,
    ServiceMetadata,
    endpoints_in,
    endpoints_in_openapi,
    names_models,
    parse_metadata,
)

JSON = dict[str, Any]

VERSION_SUFFIX = re.compile(r"/v\d+[a-z0-9]*$")
POLL_TIMEOUT_S = 4.0
"""How long a service may take to answer a poll."""
MAX_SLOW_POLLS = 3
"""Slow polls in a row after which a ready service counts as not ready: at full load it may be slow."""
DOCUMENT_LIMIT = 4 * 1024 * 1024
OPENAPI_LIMIT = 64 * 1024 * 1024
MISSING_STATUSES = frozenset({404, 405, 501})
PROBES = ("/readyz", "/health")


class ServiceInstance:
    """A service at the address of its record. A changed record is another instance."""

    def __init__(self, name: str, record: ServiceRecord, api_key: str) -> None:
        """Raise ValueError when a URL of the record is invalid."""
        self.name = name
        self.record = record
        self.running = 0
        self.ready = False
        self.metadata: ServiceMetadata | None = None
        """What the service offers; None until it has been ready once."""
        self.problem = "not polled yet"
        """Why the service is not ready."""
        self.polled = False
        self._slow_polls = 0
        self._resumes: dict[str, float] = {}
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        url = record.base_url.rstrip("/")
        end = VERSION_SUFFIX.search(urlsplit(url).path)
        own = end.group() if end else ""
        self._client = HttpClient(url[: len(url) - len(own)], headers=headers)
        self._server = OpenAIClient(self._client, own or "/v1", self._make_error)
        self._api_key = api_key
        self._documents, self._metadata_path = self._client, f"{self._server.base_path}/metadata"
        if record.metadata_url:
            parts = urlsplit(record.metadata_url)
            self._documents = HttpClient(f"{parts.scheme}://{parts.netloc}", headers=headers)
            self._metadata_path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")

    async def close(self) -> None:
        """End every connection."""
        await self._server.limitations.close()
        await self._client.close()
        await self._documents.close()

    @property
    def limitations(self) -> tuple[Limitation, ...]:
        """The features that probes found missing, by model."""
        return self._server.limitations.confirmed_limitations()

    @property
    def slots(self) -> int | None:
        """Concurrent requests: the operator's number, else the service's."""
        reported = (self.record.model_extra or {}).get("concurrency")
        if isinstance(reported, int) and reported > 0:
            return reported
        return self.metadata.concurrency if self.metadata is not None else None

    def pause(self, model: str, seconds: float) -> None:
        """Send no requests for this model for so long, as the service asked."""
        self._resumes[model] = max(monotonic() + seconds, self._resumes.get(model, 0.0))

    def waits_s(self, model: str) -> float:
        """Return how long to send no requests for this model; 0: the model is not paused."""
        return max(0.0, self._resumes[model] - monotonic()) if model in self._resumes else 0.0

    def offers(self, model: str) -> bool:
        """Return whether the service has this model, ready or not."""
        return self.metadata is not None and any(one.name == model for one in self.metadata.models)

    def serves(self, endpoint: str) -> bool:
        """Return whether the service has this endpoint."""
        return self.metadata is not None and endpoint in self.metadata.endpoints

    # Polls

    async def check(self) -> None:
        """Poll whether the service is ready. Raises nothing."""
        await self._poll(self._require_ready if self.metadata is not None else self._read_if_ready)

    async def poll(self) -> None:
        """Poll whether the service is ready, and what it offers. Raises nothing."""
        await self._poll(self._read_if_ready)
        self.polled = True

    async def _poll(self, step: Callable[[], Awaitable[None]]) -> None:
        try:
            async with asyncio.timeout(POLL_TIMEOUT_S):
                await step()
        except TimeoutError:
            self._slow_polls += 1
            if self.ready and self._slow_polls < MAX_SLOW_POLLS:
                return
            self.problem = f"no answer within {POLL_TIMEOUT_S:g} s"
        except BackendError as error:
            self.problem = error.info.message
        else:
            self._slow_polls = 0
            self.ready = self.metadata is not None
            return
        self.ready = False

    async def _require_ready(self) -> None:
        for path in PROBES:
            status, body = await self._fetch(self._client, path)
            if status in MISSING_STATUSES:
                continue
            if not 200 <= status < 300:
                reported = body[:200].decode("utf-8", "replace")
                raise BackendError(f"{path} answers {status}: {reported}")
            return

    async def _read_if_ready(self) -> None:
        await self._require_ready()
        try:
            self.metadata = await self._read_metadata()
        except BackendError:
            if self.metadata is None:
                raise

    async def _read_metadata(self) -> ServiceMetadata:
        """Return the metadata, completed from the descriptor, the OpenAPI document and the list of models."""
        documents = await self._fetch_metadata()
        endpoints = frozenset[str]().union(*map(endpoints_in, documents))
        if not endpoints or not any("ui" in one for one in documents):
            descriptor = await self._fetch_descriptor(required=not endpoints)
            documents += [descriptor] if descriptor is not None else []
            endpoints = endpoints or endpoints_in(descriptor or {})
        guessed = not endpoints and not any("endpoints" in one for one in documents)
        if guessed:
            openapi = await self._fetch_document(self._client, "/openapi.json", OPENAPI_LIMIT)
            endpoints = endpoints_in_openapi(openapi) if openapi is not None else frozenset(ENDPOINTS)
        listed = None
        if not any(names_models(one) for one in documents):
            listed = await self._fetch_document(self._client, f"{self._server.base_path}/models")
        if not endpoints or (guessed and not documents and listed is None):
            raise BackendError(
                f"{self._metadata_path} names no endpoint that Nexus knows; it must list some under 'endpoints'"
            )
        metadata = parse_metadata(self.name, endpoints, documents, listed, guessed=guessed)
        self._server.limitations.declare(() if metadata.streams else _streaming_limitations(metadata))
        self._server.voices = {model.name: model.voices[0] for model in metadata.models if model.voices}
        return metadata

    async def _fetch_metadata(self) -> list[JSON]:
        """Return the metadata at the record's URL, else at the usual path: scripts write the URL without testing it."""
        document = await self._fetch_document(self._documents, self._metadata_path)
        if document is None and self.record.metadata_url:
            document = await self._fetch_document(self._client, f"{self._server.base_path}/metadata")
        return [] if document is None else [document]

    async def _fetch_descriptor(self, *, required: bool) -> JSON | None:
        """Return the descriptor; None where the service has none, or unless `required`, where it does not answer well."""
        try:
            return await self._fetch_document(self._client, f"{self._server.base_path}/descriptor")
        except BackendError:
            if required:
                raise
            return None

    async def _fetch_document(self, client: HttpClient, path: str, limit: int = DOCUMENT_LIMIT) -> JSON | None:
        """Return the JSON object at a path; None where the path is missing. Raises BackendError for any other answer."""
        status, body = await self._fetch(client, path, limit)
        if status in MISSING_STATUSES:
            return None
        if status != 200:
            raise self._make_error(status, {}, body)
        try:
            document = orjson.loads(body)
        except orjson.JSONDecodeError as error:
            raise BackendError(f"{path} is not JSON: {error}") from error
        if isinstance(document, list):
            document = {"data": document}
        return document if isinstance(document, dict) else None

    async def _fetch(self, client: HttpClient, path: str, limit: int = DOCUMENT_LIMIT) -> tuple[int, bytes]:
        response = await client.request("GET", path)
        try:
            return response.status, await response.read_all(limit)
        finally:
            response.close()

    # Calls

    def answer(self, task: Task) -> AsyncGenerator[Output]:
        """Run a task on the service. Raises BackendRefused when the service does not have the endpoint."""
        if not self.serves(task.endpoint):
            has = ", ".join(sorted(self.metadata.endpoints)) if self.metadata is not None else "nothing yet"
            raise BackendRefused(
                f"the service {self.name} does not serve {task.endpoint}; it serves {has}", code=UNSUPPORTED_ENDPOINT
            )
        return call_of(task)(self._server, task)

    def _make_error(self, status: int, headers: Mapping[str, str], body: bytes) -> BackendError:
        if self._api_key:
            body = body.replace(self._api_key.encode(), b"***")
        return error_from_response(status, headers, body)


def _streaming_limitations(metadata: ServiceMetadata) -> Iterator[tuple[str, str]]:
    """Yield the limitations of a service that declares that it does not stream."""
    for model in metadata.models:
        for feature in STREAM_FEATURES:
            yield model.name, feature
