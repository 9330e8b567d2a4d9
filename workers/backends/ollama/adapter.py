"""Ollama, by its native API: chat, text completions and embeddings; its models are pulled, loaded and unloaded.

A request loads its model itself: a load in a call of its own may be evicted before the request runs. When `/api/ps` does not list the model,
the worker's limit for loading applies until Ollama answers. Models have full names: `llama3` is `llama3:latest`. A prompt that is too long for
the context is refused, never cut, unless the caller sends `truncate: true`.

Text completions go through the model's template, as in Ollama's own `/v1/completions`; `raw: true` skips the template. Ollama does not report how many
requests it runs at once: give the worker `OLLAMA_NUM_PARALLEL` slots for each model that fits in memory. With more slots, requests wait in Ollama instead of the
queue.

Options: `keep_alive`, how long a model stays loaded after a request without `keep_alive` (`10m`, `-1`; default: the server's).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from contextlib import aclosing
from typing import Any, TypeVar

from schemas.descriptors import ModelDescriptor
from schemas.frames import Progress
from schemas.jobs import Capability, Usage
from schemas.presence import ModelOffer
from workers.adapter_kit.descriptors import DescriptorCache
from workers.adapter_kit.embeddings import embeddings_body
from workers.adapter_kit.error_mapping import UNSUPPORTED_ENDPOINT
from workers.adapter_kit.model_jobs import LOAD, PULL, ModelJob, unloads
from workers.adapter_kit.request_fields import parse_json_object, wants_usage
from workers.adapter_kit.text.adaptations import ADAPTABLE_PARAMETERS, AdaptationPlan, plan_adaptations
from workers.adapter_kit.text.adapted_text import execute_plan
from workers.adapter_kit.text.completion_stream import CompletionOptions, new_completion_reader
from workers.backends.base import (
    Backend,
    BackendConfig,
    BackendError,
    BackendRefused,
    Chunk,
    Discovery,
    Finish,
    ModelNotServed,
    Output,
    Task,
)
from workers.backends.ollama.client import JSON, LineSplitter, OllamaClient
from workers.backends.ollama.descriptors import describe_model
from workers.backends.ollama.models import (
    ModelDetails,
    OllamaModel,
    full_name,
    listed_models,
    listed_name,
    loaded_contexts,
    parse_model,
    parse_version,
)
from workers.backends.ollama.pull_progress import PullProgress
from workers.backends.ollama.requests import (
    LACKS,
    LACKS_IN_COMPLETIONS,
    chat_request,
    embed_requests,
    generate_request,
)
from workers.backends.ollama.responses import OllamaEventConverter

CAPABILITIES = {
    "/v1/chat/completions": Capability.CHAT,
    "/v1/completions": Capability.COMPLETIONS,
    "/v1/embeddings": Capability.EMBEDDINGS,
}
LOADING, RUNNING = Progress(phase="load"), Progress(phase="run")
EMBED_BATCH = 256
"""Texts in one call. A sign of life is sent between two calls."""
LOGPROBS_MIN_VERSION = (0, 12, 11)

T = TypeVar("T")


class OllamaBackend(Backend):
    """Serve the models of one Ollama server. See the module's docstring."""

    name = "ollama"
    option_names = frozenset({"keep_alive"})
    manages_models = True

    def __init__(self, config: BackendConfig) -> None:
        """Raise ValueError when the URL or an option is invalid."""
        super().__init__(config)
        self._keep_alive = _duration(config.options.get("keep_alive"))
        self._client = OllamaClient(config.url, config.api_key)
        self._models: dict[str, OllamaModel] | None = None
        """Served models by full name; None before the first `discover`."""
        self._descriptors = DescriptorCache()
        self._details: dict[str, ModelDetails] = {}
        """Details of models, by digest."""
        self._loading: Counter[str] = Counter()
        """Requests that load each model: `/api/ps` lists a model as soon as its load begins."""
        self._contexts: dict[str, int] = {}
        """The context length with which each model was loaded last, where the server reports it."""
        self._unloading: set[str] = set()
        """Models that the server unloads after the running request, since its caller sent such a `keep_alive`."""

    async def close(self) -> None:
        await self._client.close()

    # Discovery

    async def discover(self) -> Discovery:
        """Return the models that `/api/tags` lists, or those of `config.models` among them.

        A configured model that is missing is not an error: it can be pulled.
        """
        listed = {listed_name(entry): entry for entry in listed_models(await self._client.get("/api/tags"))}
        names = {full_name(name): None for name in self.config.models} or dict.fromkeys(listed)
        loaded = await self._loaded()
        models: dict[str, OllamaModel] = {}
        for name in names:
            details = await self._model_details(listed[name]) if name in listed else None
            if details is not None:
                models[name] = parse_model(listed[name], details)
        digests = {_digest(entry) for entry in listed.values()}
        self._details = {digest: details for digest, details in self._details.items() if digest in digests}
        self._models = models
        return Discovery(tuple(self._offer(model, loaded) for model in models.values() if model.capabilities))

    def describe(self, offer: ModelOffer) -> ModelDescriptor:
        """Return what a model can be told, by Ollama's own capabilities of it."""
        details = (self._models or {})[offer.name].details
        state = (details, offer.context_length, offer.embedding_length)
        return self._descriptors.get(offer.name, state, lambda: describe_model(offer, details))

    def _offer(self, model: OllamaModel, loaded: frozenset[str]) -> ModelOffer:
        name = model.name
        loading = self._loading[name] > 0
        return model.offer(loaded=name in loaded, loading=loading, loaded_context=self._contexts.get(name))

    async def health(self) -> None:
        """Poll `/api/version`."""
        await self._client.get("/api/version")

    async def resident_models(self) -> frozenset[str]:
        """Return the models that `/api/ps` lists, without those that Ollama unloads after the running request."""
        return await self._loaded() - self._unloading

    async def _loaded(self) -> frozenset[str]:
        contexts = loaded_contexts(await self._client.get("/api/ps"))
        self._contexts |= {name: context for name, context in contexts.items() if context}
        return frozenset(contexts)

    async def _model_details(self, entry: JSON) -> ModelDetails | None:
        """Return the details of a model; None for one that was deleted meanwhile, or is broken."""
        digest = _digest(entry)
        if digest not in self._details:
            try:
                details = await self._client.post("/api/show", {"model": listed_name(entry)})
            except BackendError as error:
                if error.info.status == 503:
                    raise
                return None
            self._details[digest] = ModelDetails.of(details)
        return self._details[digest]

    async def _find_model(self, name: str) -> OllamaModel:
        if self._models is None:
            await self.discover()
        model = (self._models or {}).get(full_name(name))
        if model is None:
            raise ModelNotServed(f"the backend does not have the model {name!r}", param="model")
        return model

    # Work

    def run(self, task: Task) -> AsyncIterator[Output]:
        """Run a task: text, embeddings, or a job about models."""
        if task.capability is Capability.MODELS:
            return self._pull(task) if task.endpoint == PULL else self._load_or_unload(task)
        return self._embed(task) if task.capability is Capability.EMBEDDINGS else self._generate_text(task)

    async def _generate_text(self, task: Task, planned: AdaptationPlan | None = None) -> AsyncGenerator[Output, None]:
        """Run chat and text completions. `planned`: the adaptation plan that this request is a part of."""
        model, body = await self._parse_task(task)
        chat = task.capability is Capability.CHAT
        if planned is None and not ADAPTABLE_PARAMETERS.isdisjoint(body):
            lacks = LACKS if chat else LACKS_IN_COMPLETIONS
            plan = plan_adaptations(body, lacks, model=task.public_model, adapt=task.adapt, chat=chat)
            if plan is not None:
                async with aclosing(execute_plan(task, plan, self._generate_text)) as outputs:
                    async for output in outputs:
                        yield output
                return
        if chat and body.get("logprobs"):
            await self._require_logprobs()
        request = self._complete_request(chat_request(body, model.details) if chat else generate_request(body), model)
        loads = await self._needs_load(model)
        if loads:
            yield LOADING
        wanted = CompletionOptions(
            chat=chat,
            model=task.public_model,
            fallback_id=task.job,
            include_usage=task.stream and wants_usage(body),
            single_call=body.get("parallel_tool_calls") is False,
            whole_calls=True,
            stream=task.stream,
        )
        answer = new_completion_reader(wanted)
        lines, events = LineSplitter(), OllamaEventConverter(chat)
        sending = self._client.stream("/api/chat" if chat else "/api/generate", request)
        response = await self._await_load(model, sending) if loads else await sending
        try:
            if loads:
                yield RUNNING
            while not answer.done:
                data = await response.read()
                chunk = answer.feed(events.convert(lines.feed(data)))
                if chunk is not None:
                    yield chunk
                elif events.hidden_lines:
                    yield Chunk(b"", events.hidden_lines)
                events.hidden_lines = 0
                if not data:
                    break
            for output in answer.finish():
                yield output
        finally:
            if answer.done:
                response.release()
            else:
                response.close()

    async def _embed(self, task: Task) -> AsyncGenerator[Output, None]:
        model, body = await self._parse_task(task)
        form = body.get("encoding_format") or "float"
        if form not in ("float", "base64"):
            raise BackendRefused("encoding_format must be float or base64", param="encoding_format")
        requests = [self._complete_request(request, model) for request in embed_requests(body, EMBED_BATCH)]
        loads = await self._needs_load(model)
        if loads:
            yield LOADING
        vectors: list[list[float]] = []
        tokens = 0
        for request in requests:
            sending = self._client.post("/api/embed", request)
            answer = await self._await_load(model, sending) if loads else await sending
            if loads:
                loads = False
                yield RUNNING
            vectors += _parse_vectors(answer, request)
            tokens += int(answer.get("prompt_eval_count") or 0)
            yield Chunk(b"", len(request["input"]))
        body_out = embeddings_body(vectors, model=task.public_model, encoding_format=form, prompt_tokens=tokens)
        yield Chunk(body_out, 0)
        yield Finish(Usage(prompt_tokens=tokens, total_tokens=tokens))

    async def _parse_task(self, task: Task) -> tuple[OllamaModel, JSON]:
        """Return the model and the body of a task. Raises BackendRefused for a task that this server cannot run."""
        if CAPABILITIES.get(task.endpoint) is not task.capability:
            raise BackendRefused(f"this backend does not serve {task.endpoint}", code=UNSUPPORTED_ENDPOINT)
        model = await self._find_model(task.model)
        if task.capability not in model.capabilities:
            raise BackendRefused(f"the model {model.name!r} does not serve {task.capability}", param="model")
        return model, parse_json_object(task.body)

    def _complete_request(self, request: JSON, model: OllamaModel) -> JSON:
        """Add the fields that every request has. Without `truncate: false`, Ollama would cut a prompt that is too long, and answer 200."""
        if self._keep_alive is not None:
            request.setdefault("keep_alive", self._keep_alive)
        request.setdefault("truncate", False)
        (self._unloading.add if unloads(request.get("keep_alive")) else self._unloading.discard)(model.name)
        return request | {"model": model.name}

    async def _require_logprobs(self) -> None:
        version = parse_version(await self._client.get("/api/version"))
        if version is not None and version < LOGPROBS_MIN_VERSION:
            needed = ".".join(map(str, LOGPROBS_MIN_VERSION))
            raise BackendRefused(
                f"logprobs need Ollama {needed} or later. Update Ollama, or send the request without logprobs.",
                param="logprobs",
            )

    # Models

    async def _needs_load(self, model: OllamaModel) -> bool:
        return not model.remote and (self._loading[model.name] > 0 or model.name not in await self._loaded())

    async def _load(self, model: OllamaModel, keep_alive: Any) -> None:
        """Return when the server holds the model. A cancellation cancels the load in the server."""
        # Without a prompt, or an input for an embedding model, Ollama only loads the model.
        embeds = Capability.CHAT not in model.capabilities
        path = "/api/embed" if embeds else "/api/generate"
        nothing: JSON = {"input": []} if embeds else {"prompt": ""}
        self._unloading.discard(model.name)
        request = {"model": model.name, "keep_alive": keep_alive, **nothing}
        await self._await_load(model, self._client.post(path, request))

    async def _await_load(self, model: OllamaModel, sending: Awaitable[T]) -> T:
        """Return the first response of a request that loads the model."""
        self._loading[model.name] += 1
        self.notify_changed()
        try:
            return await sending
        finally:
            self._loading[model.name] -= 1
            self.notify_changed()

    async def _pull(self, task: Task) -> AsyncGenerator[Output, None]:
        """Pull a model. After a cancellation, the next pull continues where this one ended."""
        job = ModelJob.of(task)
        lines, pulled = LineSplitter(), PullProgress()
        response = await self._client.stream("/api/pull", {"model": job.model, "stream": True})
        try:
            while not pulled.done:
                data = await response.read()
                for line in lines.feed(data):
                    fields, progress = pulled.read(line)
                    yield progress
                    if job.stream and not pulled.done:
                        yield Chunk(job.frame(**fields))
                if not data:
                    break
        finally:
            response.close()
        if not pulled.done:
            raise BackendError("the pull ended before it was complete", transient=True)
        self.notify_changed()
        for output in job.end():
            yield output

    async def _load_or_unload(self, task: Task) -> AsyncGenerator[Output, None]:
        """Load a model that stays in memory, or unload it."""
        job = ModelJob.of(task)
        await self.discover()
        model = await self._find_model(job.model)
        if job.endpoint == LOAD:
            yield LOADING
            await self._load(model, -1 if job.keep_alive is None else job.keep_alive)
        else:
            await self._client.post("/api/generate", {"model": model.name, "prompt": "", "keep_alive": 0})
            self.notify_changed()
        for output in job.end():
            yield output


def _digest(entry: JSON) -> str:
    return str(entry.get("digest") or listed_name(entry))


def _parse_vectors(answer: JSON, request: JSON) -> list[list[float]]:
    """Return the embeddings of a batch. Raises BackendError when there is not one for each text."""
    vectors = answer.get("embeddings")
    if not isinstance(vectors, list) or len(vectors) != len(request["input"]):
        raise BackendError("the backend did not give one embedding for each input", transient=True)
    wanted = request.get("dimensions")
    if wanted is not None and len(vectors[0]) != wanted:  # silently ignored before 0.11.11, and when too large
        raise BackendRefused(
            f"this model's embeddings have {len(vectors[0])} dimensions, not {wanted}; set dimensions to that, or leave it out",
            param="dimensions",
        )
    return vectors


def _duration(text: str | None) -> Any:
    """Ollama takes seconds as a number, and anything else with its unit."""
    try:
        return int(text) if text else None
    except ValueError:
        return text
