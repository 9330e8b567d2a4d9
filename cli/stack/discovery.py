"""Find inference servers that already run on this machine, at their default ports.

A server is recognized by an answer that only its kind gives, within a second and without a key:

| kind | answer |
|---|---|
| OpenAI-like | OpenAI's list at `/v1/models`, and it is not a Nexus |
| Ollama | that, and its version at `/api/version` |
| ComfyUI | its system and devices at `/system_stats` |
| InvokeAI | its version at `/api/v1/app/version` |
| A1111, Forge | checkpoints at `/sdapi/v1/sd-models`: started with `--api` |
| Piper | its voices' configurations at `/voices` |
| whisper.cpp | a page that says so at `/` |
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

TIMEOUT_S = 1.0
"""Time limit of one whole probe: a server on this machine lists its models in milliseconds."""
MAX_ANSWER_BYTES = 2 * 1024 * 1024
OPENAI = "openai"


@dataclass(frozen=True, slots=True)
class BackendCandidate:
    """A kind of server and the port where it listens by default."""

    name: str
    """Name of its worker."""
    title: str
    port: int
    kind: str = OPENAI
    """Its probe in `PROBES`."""
    host: str = "127.0.0.1"

    @property
    def url(self) -> str:
        """URL of the server."""
        return f"http://{self.host}:{self.port}"


CANDIDATES = (
    BackendCandidate("ollama", "Ollama", 11434),
    BackendCandidate("vllm", "vLLM", 8000),
    BackendCandidate("llama-cpp", "llama.cpp", 8080),
    BackendCandidate("lm-studio", "LM Studio", 1234),
    BackendCandidate("comfyui", "ComfyUI", 8188, "comfyui"),
    BackendCandidate("invokeai", "InvokeAI", 9090, "invokeai"),
    BackendCandidate("sdwebui", "Stable Diffusion WebUI", 7860, "sdwebui"),
    BackendCandidate("piper", "Piper", 5000, "piper"),
    BackendCandidate("whisper-cpp", "whisper.cpp", 8080, "whisper"),
    BackendCandidate("whisper-cpp-8081", "whisper.cpp", 8081, "whisper"),
)


@dataclass(frozen=True, slots=True)
class DiscoveredBackend:
    """An inference server that runs on this machine."""

    candidate: BackendCandidate
    models: tuple[str, ...] = field(default=())
    backend: str = OPENAI
    """Adapter for the server."""


async def find_backends(
    candidates: Sequence[BackendCandidate] = CANDIDATES, timeout_s: float = TIMEOUT_S
) -> list[DiscoveredBackend]:
    """Return the candidates that run. Raises nothing, whatever the servers answer; takes at most `timeout_s`."""
    async with httpx.AsyncClient(trust_env=False, follow_redirects=False, timeout=timeout_s) as client:
        found = await asyncio.gather(*(_probe(client, candidate, timeout_s) for candidate in candidates))
    return [one for one in found if one is not None]


async def _probe(client: httpx.AsyncClient, candidate: BackendCandidate, timeout_s: float) -> DiscoveredBackend | None:
    try:
        async with asyncio.timeout(timeout_s):
            return await PROBES[candidate.kind](client, candidate)
    except (httpx.HTTPError, TimeoutError):
        return None


async def _openai(client: httpx.AsyncClient, candidate: BackendCandidate) -> DiscoveredBackend | None:
    models = model_names(await _get_json(client, f"{candidate.url}/v1/models"))
    if models is None or await _is_nexus(client, candidate.url):
        return None
    return DiscoveredBackend(candidate, models, await _adapter(client, candidate))


async def _adapter(client: httpx.AsyncClient, candidate: BackendCandidate) -> str:
    """Return the adapter for a server with OpenAI's API. Ollama's own API says more, and manages its models."""
    if candidate.name != "ollama":
        return OPENAI
    version = await _get_json(client, f"{candidate.url}/api/version")
    return "ollama" if isinstance(version, dict) and "version" in version else OPENAI


async def _comfyui(client: httpx.AsyncClient, candidate: BackendCandidate) -> DiscoveredBackend | None:
    stats = await _get_json(client, f"{candidate.url}/system_stats")
    is_known = (
        isinstance(stats, dict) and isinstance(stats.get("system"), dict) and isinstance(stats.get("devices"), list)
    )
    return DiscoveredBackend(candidate, backend="comfyui") if is_known else None


async def _invokeai(client: httpx.AsyncClient, candidate: BackendCandidate) -> DiscoveredBackend | None:
    version = await _get_json(client, f"{candidate.url}/api/v1/app/version")
    is_known = isinstance(version, dict) and isinstance(version.get("version"), str)
    return DiscoveredBackend(candidate, backend="invokeai") if is_known else None


async def _sdwebui(client: httpx.AsyncClient, candidate: BackendCandidate) -> DiscoveredBackend | None:
    models = await _get_json(client, f"{candidate.url}/sdapi/v1/sd-models")
    if not isinstance(models, list) or not all(isinstance(one, dict) and "model_name" in one for one in models):
        return None
    return DiscoveredBackend(candidate, tuple(str(one["model_name"]) for one in models), "sdwebui")


async def _piper(client: httpx.AsyncClient, candidate: BackendCandidate) -> DiscoveredBackend | None:
    voices = await _get_json(client, f"{candidate.url}/voices")
    if not isinstance(voices, dict) or not voices:
        return None
    is_known = all(isinstance(voice, dict) and "phoneme_id_map" in voice for voice in voices.values())
    return DiscoveredBackend(candidate, backend="piper") if is_known else None


async def _whisper_cpp(client: httpx.AsyncClient, candidate: BackendCandidate) -> DiscoveredBackend | None:
    page = await _get(client, f"{candidate.url}/")
    return (
        DiscoveredBackend(candidate, backend="whisper") if page is not None and b"whisper.cpp" in page.lower() else None
    )


PROBES: dict[str, Callable[[httpx.AsyncClient, BackendCandidate], Awaitable[DiscoveredBackend | None]]] = {
    OPENAI: _openai,
    "comfyui": _comfyui,
    "invokeai": _invokeai,
    "sdwebui": _sdwebui,
    "piper": _piper,
    "whisper": _whisper_cpp,
}


async def _is_nexus(client: httpx.AsyncClient, url: str) -> bool:
    """Return whether a Nexus gateway listens there: a worker for it would send the gateway its own jobs."""
    async with client.stream("GET", f"{url}/readyz") as response:
        if response.headers.get("x-request-id", "").startswith("req_"):
            return True
    ready = await _get_json(client, f"{url}/readyz", any_status=True)
    return isinstance(ready, dict) and isinstance(ready.get("parts"), dict)  # an older gateway


async def _get_json(client: httpx.AsyncClient, url: str, *, any_status: bool = False) -> Any:
    """Return the JSON at `url`; None for an error, a body that is not JSON, or one that is too large."""
    body = await _get(client, url, any_status=any_status)
    try:
        return None if body is None else json.loads(body)
    except ValueError:
        return None


async def _get(client: httpx.AsyncClient, url: str, *, any_status: bool = False) -> bytes | None:
    async with client.stream("GET", url, headers={"accept": "application/json, */*;q=0.5"}) as response:
        if response.status_code != httpx.codes.OK and not any_status:
            return None
        body = b""
        async for piece in response.aiter_bytes():
            body += piece
            if len(body) > MAX_ANSWER_BYTES:
                return None
    return body


def model_names(answer: Any) -> tuple[str, ...] | None:
    """Return the ids in OpenAI's list of models; None if `answer` is not one. Ollama without models has `data: null`."""
    if not isinstance(answer, dict) or answer.get("object") != "list" or "data" not in answer:
        return None
    data = answer["data"] or []
    if not isinstance(data, list) or not all(isinstance(one, dict) and one.get("object") == "model" for one in data):
        return None
    names = [one.get("id") for one in data]
    if not all(isinstance(name, str) and name for name in names):
        return None
    return tuple(names)
