"""The base of adapters for servers that speak OpenAI's API. `workers/backends/openai.py` is the plain one.

For text the worker always requests a stream, also for a caller who does not want one: closing a stream stops the server's work, closing
a plain call may not. Where the server cannot stream, closing waits for its response.

Options that every such adapter has: `api_path`, where the API lies below the URL (default: the URL's own end where it looks like `/v1`, else
`/v1`); `capabilities` and `capabilities.PATTERN`, what the models serve, as capabilities.py describes; `lacks`, parameters that the server does
not honor (`n+logit_bias+parallel_tool_calls+tool_choice`), beside those that probes find.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import orjson

from schemas.descriptors import ModelDescriptor
from schemas.jobs import Capability
from schemas.parameters.standard import features_of, standard_descriptor
from schemas.presence import Limitation, ModelOffer
from workers.adapter_kit.error_mapping import error_from_response
from workers.adapter_kit.http_client import BackendResponse, HttpClient
from workers.adapter_kit.openai.audio import parse_voice_list
from workers.adapter_kit.openai.calls import call_of
from workers.adapter_kit.openai.capabilities import Capabilities, CapabilitySelector, is_capability_option
from workers.adapter_kit.openai.client import OpenAIClient
from workers.adapter_kit.openai.loaded_models import (
    LOADED_STATES,
    LOADING_STATES,
    add_llama_swap_states,
    is_llama_swap,
    model_state,
    resident_models,
)
from workers.adapter_kit.openai.unsupported_parameters import PARAMETERS, parse_lacks_option
from workers.adapter_kit.requirements import AUDIO_CODECS, OPTIONAL_PILLOW
from workers.backends.base import (
    Backend,
    BackendConfig,
    BackendError,
    BackendUnavailable,
    Discovery,
    ModelNotServed,
    Output,
    Requirement,
    Task,
)

JSON = dict[str, Any]

VERSION_SUFFIX = re.compile(r"/v\d+[a-z0-9]*$")
BODY_LIMIT = 4 * 1024 * 1024
"""Bytes of a response that is not a stream, such as an error or a list of models."""


class OpenAICompatibleBackend(Backend):
    """Serve every capability of an OpenAI-compatible server. A subclass needs a `name`; see the module's docstring."""

    option_names = frozenset({"api_path", "capabilities", "lacks"})

    def __init__(self, config: BackendConfig) -> None:
        """Raise ValueError when the URL or an option is invalid."""
        super().__init__(config)
        url = config.url.rstrip("/")
        path = urlsplit(url).path
        end = VERSION_SUFFIX.search(path)
        own = end.group() if end else ""
        self._base_path = config.options.get("api_path", own or "/v1").rstrip("/")
        headers = {"authorization": f"Bearer {config.api_key}"} if config.api_key else {}
        self._client = HttpClient(url[: len(url) - len(own)], headers=headers)
        lacks = parse_lacks_option(config.options.get("lacks", ""))
        self.server = OpenAIClient(
            self._client, self._base_path, self._make_error, declared_lacks=lacks, redact=self._redact_key
        )
        self.capabilities = CapabilitySelector(config.options)
        self._served: frozenset[str] | None = None
        """Names of the served models; None before the first `discover`."""
        self._created: dict[str, int] = {}
        self._seeing: frozenset[str] = frozenset()
        """Models that read pictures, as the server says."""

    @classmethod
    def has_option(cls, name: str) -> bool:
        """Return whether the adapter has an option of this name; `capabilities.PATTERN` counts."""
        return super().has_option(name) or is_capability_option(name)

    async def close(self) -> None:
        await self.server.limitations.close()
        await self._client.close()

    def limitations(self) -> tuple[Limitation, ...]:
        """Return the features that probes found missing, by model."""
        return self.server.limitations.confirmed_limitations()

    # Discovery

    def requirements(self) -> tuple[Requirement, ...]:
        """Return the libraries that convert audio and images, for servers that generate any."""
        return (AUDIO_CODECS, OPTIONAL_PILLOW)

    async def discover(self) -> Discovery:
        """Return every model that the server lists, or those of `config.models`.

        Raises BackendError when a configured model is missing, or when neither the server nor the configuration names a model.
        """
        listed = await self.list_models()
        props = await self._llama_cpp_properties() if any(_is_llama_cpp(model) for model in listed or ()) else {}
        self.server.resident = resident_models(listed or ())
        names = self._select_names(listed)
        known = {name: model for model in listed or () for name in _all_names(model)}
        for name in names:
            # llama.cpp and vLLM report the time of the request: without the first value, every poll would find a change.
            created = known.get(name, {}).get("created")
            self._created.setdefault(name, created if isinstance(created, int) else 0)
        offers = await self._add_voices([self.make_offer(name, known.get(name, {}), props) for name in names], known)
        self.server.voices = {offer.name: offer.voices[0] for offer in offers if offer.voices}
        self._served = frozenset(names)
        self._seeing = frozenset(name for name in names if _reads_pictures(known.get(name, {}), props))
        slots = props.get("total_slots")
        return Discovery(offers, slots if isinstance(slots, int) and slots > 0 else None)

    async def resident_models(self) -> frozenset[str] | None:
        """Return the models that llama.cpp's router or llama-swap holds in memory; None for other servers."""
        if self.server.resident is not None:
            self.server.resident = resident_models(await self.list_models() or ())
        return self.server.resident

    async def health(self) -> None:
        """Poll `/health`, or `/v1/models` on a server without it."""
        status, body = await self._get_or_unavailable("/health")
        if status in (404, 405, 501):
            status, body = await self._get_or_unavailable(f"{self._base_path}/models")
        if status in (401, 403) or status == 429 or status >= 500:
            raise BackendUnavailable(error_from_response(status, {}, body).info.message)

    def make_offer(self, name: str, model: JSON, props: JSON) -> ModelOffer:
        """Return the offer for one model. `model`: its entry in `/v1/models`; `props`: llama.cpp's properties, or {}."""
        state = model_state(model)
        capabilities = self.capabilities.select(name, model)
        return ModelOffer(
            name=name,
            capabilities=capabilities,
            loaded=None if state is None else state in LOADED_STATES,
            loading=state in LOADING_STATES,
            context_length=_context_length(model, props),
            owned_by=str(model.get("owned_by") or "nexus"),
            created=self._created[name],
            embedding_length=_embedding_length(model, capabilities),
        )

    def describe(self, offer: ModelOffer) -> ModelDescriptor | None:
        """Return the usual parameters of the model's endpoints, without those that the server lacks."""
        lacks = self.server.declared_lacks | {
            name for name in PARAMETERS if self.server.limitations.lacks(offer.name, name)
        }
        usual = features_of(offer)
        text = replace(usual.text, vision=offer.name in self._seeing, lacks=lacks)
        return standard_descriptor(offer.capabilities, replace(usual, text=text))

    async def _add_voices(self, offers: list[ModelOffer], known: dict[str, JSON]) -> tuple[ModelOffer, ...]:
        """Return the offers with the voices of their speech models: a model's own voices, else the server's."""
        voices: tuple[str, ...] = ()
        if any(Capability.SPEECH in offer.capabilities for offer in offers):
            status, body = await self.get(f"{self._base_path}/audio/voices")
            with suppress(orjson.JSONDecodeError):
                voices = parse_voice_list(orjson.loads(body)) if status == 200 else ()
        return tuple(
            offer.model_copy(update={"voices": parse_voice_list(known.get(offer.name, {})) or voices})
            if Capability.SPEECH in offer.capabilities
            else offer
            for offer in offers
        )

    async def list_models(self) -> list[JSON] | None:
        """Return the entries of `/v1/models`; None when the server has no such list."""
        status, body = await self.get(f"{self._base_path}/models")
        if status in (404, 405, 501):
            return await self._model_from_info()
        if status != 200:
            raise self._make_error(status, {}, body)
        try:
            models = orjson.loads(body)["data"]
            models = [model for model in models if isinstance(model, dict) and model.get("id")]
            return (
                add_llama_swap_states(models, await self._llama_swap_processes()) if is_llama_swap(models) else models
            )
        except (orjson.JSONDecodeError, KeyError, TypeError) as error:
            raise BackendError(
                "the backend's answer to GET /v1/models is not a list of models; check the worker's URL and api_path"
            ) from error

    async def _llama_swap_processes(self) -> Any:
        """Return llama-swap's list of processes."""
        status, body = await self.get("/running")
        return orjson.loads(body) if status == 200 else {}

    async def _model_from_info(self) -> list[JSON] | None:
        """Return the one model that `/info` of text-embeddings-inference names; None for other servers."""
        status, body = await self.get("/info")
        try:
            info = orjson.loads(body) if status == 200 else {}
        except orjson.JSONDecodeError:
            return None
        if not isinstance(info, dict) or not info.get("model_id"):
            return None
        return [{"id": info["model_id"], "max_model_len": info.get("max_input_length")} | info]

    def _select_names(self, listed: list[JSON] | None) -> tuple[str, ...]:
        wanted = self.config.models
        if listed is None:
            if not wanted:
                raise BackendError("the backend does not list its models; name them with --model")
            return wanted
        names = tuple(str(model["id"]) for model in listed)
        known = {name for model in listed for name in _all_names(model)}
        # Ollama's name for a model without a tag ends in `:latest`.
        wanted = tuple(f"{name}:latest" if name not in known and f"{name}:latest" in known else name for name in wanted)
        missing = [name for name in wanted if name not in known]
        if missing:
            raise BackendError(f"the backend lacks {', '.join(missing)}; it has {', '.join(names) or 'no models'}")
        return wanted or names

    async def _llama_cpp_properties(self) -> JSON:
        """Return llama.cpp's `/props`, or {} where it does not serve them."""
        status, body = await self.get("/props")
        try:
            props = orjson.loads(body) if status == 200 else {}
        except orjson.JSONDecodeError:
            return {}
        return props if isinstance(props, dict) else {}

    async def _get_or_unavailable(self, path: str) -> tuple[int, bytes]:
        try:
            return await self.get(path)
        except BackendError as error:
            raise BackendUnavailable(str(error)) from error

    async def get(self, path: str) -> tuple[int, bytes]:
        try:
            response = await self._client.request("GET", path)
            return response.status, await _read_and_close(response)
        except BackendError as error:
            if error.transient:
                raise BackendUnavailable(str(error)) from error
            raise

    # Work

    def run(self, task: Task) -> AsyncGenerator[Output]:
        """Run a task on the server."""
        if self._served is not None and task.model in self._served:
            return call_of(task)(self.server, task)
        return self._run_unlisted(task)

    async def _run_unlisted(self, task: Task) -> AsyncGenerator[Output]:
        """Run a task of a model that the server may have. A server with one model would answer under any name."""
        if self._served is None:
            await self.discover()
        if self._served is not None and task.model not in self._served:
            raise ModelNotServed(f"the backend does not have the model {task.model!r}", param="model")
        async with aclosing(call_of(task)(self.server, task)) as outputs:
            async for output in outputs:
                yield output

    def _make_error(self, status: int, headers: Mapping[str, str], body: bytes) -> BackendError:
        return error_from_response(status, headers, self._redact_key(body))

    def _redact_key(self, body: bytes) -> bytes:
        return body.replace(self.config.api_key.encode(), b"***") if self.config.api_key else body


async def _read_and_close(response: BackendResponse) -> bytes:
    try:
        return await response.read_all(BODY_LIMIT)
    finally:
        response.close()


def _all_names(model: JSON) -> tuple[str, ...]:
    """Return every name of a listed model, aliases included."""
    return (*(str(alias) for alias in model.get("aliases") or ()), str(model["id"]))


def _is_llama_cpp(model: JSON) -> bool:
    return model.get("owned_by") == "llamacpp"


def _context_length(model: JSON, props: JSON) -> int | None:
    """Return the tokens that one request may use: vLLM's limit, llama.cpp's per slot, or the model's trained length."""
    meta = model.get("meta")
    meta = meta if isinstance(meta, dict) else {}
    settings = props.get("default_generation_settings")
    settings = settings if isinstance(settings, dict) else {}
    candidates = (model.get("max_model_len"), settings.get("n_ctx"), meta.get("n_ctx"), meta.get("n_ctx_train"))
    return next((length for length in candidates if isinstance(length, int) and length > 0), None)


def _reads_pictures(model: JSON, props: JSON) -> bool:
    """Return whether the server says that the model reads pictures: llama.cpp, its router, LM Studio, OpenRouter."""
    modalities, architecture = props.get("modalities"), model.get("architecture")
    inputs = architecture.get("input_modalities") if isinstance(architecture, dict) else None
    capabilities = model.get("capabilities")
    return (
        (isinstance(modalities, dict) and modalities.get("vision") is True)
        or (isinstance(inputs, list) and "image" in inputs)
        or (isinstance(capabilities, list) and not {"vision", "multimodal"}.isdisjoint(map(str, capabilities)))
        or model.get("type") == "vlm"
    )


def _embedding_length(model: JSON, capabilities: Capabilities) -> int | None:
    """Return the length of an embedding, which llama.cpp reports."""
    meta = model.get("meta")
    length = meta.get("n_embd") if isinstance(meta, dict) and Capability.EMBEDDINGS in capabilities else None
    return length if isinstance(length, int) else None
