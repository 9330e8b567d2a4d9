"""Which inference servers already run on this machine, at their usual ports.

A server counts when `GET /v1/models` answers OpenAI's list within a second, without a key, and it is not a Nexus.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

TIMEOUT_S = 1.0
"""For one whole probe: a server on this machine lists its models in milliseconds."""
MOST_BYTES = 2 * 1024 * 1024
OPENAI = "openai"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A place where a kind of server usually listens."""

    name: str
    """How the worker is called."""
    title: str
    port: int
    host: str = "127.0.0.1"

    @property
    def url(self) -> str:
        """The server's root."""
        return f"http://{self.host}:{self.port}"


CANDIDATES = (
    Candidate("ollama", "Ollama", 11434),
    Candidate("vllm", "vLLM", 8000),
    Candidate("llama-cpp", "llama.cpp", 8080),
    Candidate("lm-studio", "LM Studio", 1234),
)


@dataclass(frozen=True, slots=True)
class Found:
    """A server that answered."""

    candidate: Candidate
    models: tuple[str, ...] = field(default=())
    backend: str = OPENAI
    """The adapter that serves it."""


async def find_backends(candidates: Sequence[Candidate] = CANDIDATES, timeout_s: float = TIMEOUT_S) -> list[Found]:
    """The candidates that are inference servers. Never raises for what a server does; takes `timeout_s` at most."""
    async with httpx.AsyncClient(trust_env=False, follow_redirects=False, timeout=timeout_s) as client:
        found = await asyncio.gather(*(_probe(client, candidate, timeout_s) for candidate in candidates))
    return [one for one in found if one is not None]


async def _probe(client: httpx.AsyncClient, candidate: Candidate, timeout_s: float) -> Found | None:
    try:
        async with asyncio.timeout(timeout_s):
            models = model_names(await _get_json(client, f"{candidate.url}/v1/models"))
            if models is None or await _is_nexus(client, candidate.url):
                return None
            return Found(candidate, models, await _adapter(client, candidate))
    except (httpx.HTTPError, TimeoutError):
        return None


async def _adapter(client: httpx.AsyncClient, candidate: Candidate) -> str:
    """All speak OpenAI's API; Ollama's own says more, and manages its models."""
    if candidate.name != "ollama":
        return OPENAI
    version = await _get_json(client, f"{candidate.url}/api/version")
    return "ollama" if isinstance(version, dict) and "version" in version else OPENAI


async def _is_nexus(client: httpx.AsyncClient, url: str) -> bool:
    """Whether a gateway listens there: it would send its own jobs round in circles."""
    ready = await _get_json(client, f"{url}/readyz", any_status=True)
    return isinstance(ready, dict) and isinstance(ready.get("parts"), dict)


async def _get_json(client: httpx.AsyncClient, url: str, *, any_status: bool = False) -> Any:
    """What `url` answers, None when that is no JSON, no success, or too much."""
    async with client.stream("GET", url, headers={"accept": "application/json"}) as response:
        if response.status_code != httpx.codes.OK and not any_status:
            return None
        body = b""
        async for piece in response.aiter_bytes():
            body += piece
            if len(body) > MOST_BYTES:
                return None
    try:
        return httpx.Response(200, content=body).json()
    except ValueError:
        return None


def model_names(answer: Any) -> tuple[str, ...] | None:
    """The ids in OpenAI's list of models, None when `answer` is not one. Ollama without models sends `data: null`."""
    if not isinstance(answer, dict) or answer.get("object") != "list" or "data" not in answer:
        return None
    data = answer["data"] or []
    if not isinstance(data, list) or not all(isinstance(one, dict) and one.get("object") == "model" for one in data):
        return None
    names = [one.get("id") for one in data]
    if not all(isinstance(name, str) and name for name in names):
        return None
    return tuple(names)
