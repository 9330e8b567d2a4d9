"""vLLM's server: everything of the `openai` adapter, and vLLM's own API for sleep mode, tokens and load figures.

- LoRA modules (`--lora-modules`) are models of their own, with the context length and the capabilities of their base model.
- The worker reports vLLM's running and waiting requests and its KV-cache usage, read from `/metrics`.
- Sleep mode: a job at `/v1/models/unload` puts the server to sleep, once the requests of this worker have ended, and `/v1/models/load` wakes it. A request
  wakes a sleeping server itself: vLLM crashes when a request reaches a sleeping engine. vLLM must run with `VLLM_SERVER_DEV_MODE=1` and
  `--enable-sleep-mode`. Its routes for sleep mode need no API key, so only workers should reach them.
- vLLM does not report `--max-num-seqs`; set the worker's slots by `--concurrency` (default: 32).

Options: those of the `openai` adapter.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import orjson

from schemas.frames import Progress
from schemas.jobs import Capability, Usage
from schemas.presence import BackendLoad, ModelOffer
from workers.adapter_kit.model_jobs import PULL, UNLOAD, ModelJob
from workers.adapter_kit.openai.backend import OpenAICompatibleBackend
from workers.adapter_kit.openai.capabilities import TEXT
from workers.adapter_kit.openai.client import JSON, parse_json_response
from workers.adapter_kit.request_fields import parse_json_object
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

LOADING, RUNNING = Progress(phase="load"), Progress(phase="run")
SLEEP = "/sleep?level=1&mode=wait"
"""Level 2 would discard the weights. `mode=wait` lets the requests of other clients end first; vLLM before 0.15 ignores it."""
FOREVER = -1
"""The only `keep_alive` that vLLM can honor."""
START_SLEEP_MODE = "Start vLLM with VLLM_SERVER_DEV_MODE=1 and --enable-sleep-mode."
METRIC = re.compile(
    rb"^vllm:(num_requests_running|num_requests_waiting|kv_cache_usage_perc|gpu_cache_usage_perc)(?:\{.*\})?[ \t]+(\S+)",
    re.MULTILINE,
)
"""`gpu_cache_usage_perc` is the older name of `kv_cache_usage_perc`."""
TOKENIZE_FIELDS = (
    "tools",
    "add_generation_prompt",
    "continue_final_message",
    "add_special_tokens",
    "chat_template",
    "chat_template_kwargs",
    "mm_processor_kwargs",
)
"""Fields of a chat request that shape its prompt."""
TOKENS_LIMIT = 64 * 1024 * 1024


class VLLMBackend(OpenAICompatibleBackend):
    """Serve the models of one vLLM server. See the module's docstring."""

    name = "vllm"
    default_slots = 32
    manages_models = True

    # All models sleep and wake together: none gives way to another, so the worker need not let them take turns.
    resident_models = Backend.resident_models

    def __init__(self, config: BackendConfig) -> None:
        """Raise ValueError when the URL or an option is invalid."""
        super().__init__(config)
        self._can_sleep = False
        """The server has the routes of sleep mode."""
        self._asleep = False
        """The server's state at the last poll."""
        self._waking = False
        self._falling_asleep = False
        self._switching = asyncio.Lock()
        """Held while the server falls asleep or wakes up, and while a request checks that the server is awake."""
        self._running = 0
        self._idle = asyncio.Event()
        self._entries: dict[str, JSON] = {}
        """The entries of `/v1/models`, by name."""
        self._load: BackendLoad | None = None

    # Discovery

    async def discover(self) -> Discovery:
        """Return the base models and the LoRA modules that the server lists, or those of `config.models`.

        Raises BackendError when a configured model is missing, BackendUnavailable when the server does not answer.
        """
        self._asleep = await self._poll_sleeping()
        discovery = await super().discover()
        await self._poll_load()
        return discovery

    async def health(self) -> None:
        """Poll `/health` and the load figures. Raises BackendUnavailable when the engine is dead or does not answer."""
        await super().health()
        await self._poll_load()
        if self._can_sleep and await self._poll_sleeping() != self._asleep:
            self.notify_changed()

    def load_figures(self) -> BackendLoad | None:
        """Return the figures of `/metrics` at the last poll; None where the server has no vLLM metrics."""
        return self._load

    async def list_models(self) -> list[JSON] | None:
        """Return the entries of `/v1/models`; None when the server has no such list."""
        entries = await super().list_models()
        self._entries = {str(entry["id"]): entry for entry in entries or ()}
        return entries

    def make_offer(self, name: str, model: JSON, props: JSON) -> ModelOffer:
        """Return the offer for a base model, or for a LoRA module, which takes what is missing from its base model."""
        parent = self._entries.get(str(model.get("parent")))
        if parent is None:
            offer = super().make_offer(name, model, props)
            return offer.model_copy(update={"loaded": not self._asleep, "loading": self._waking})
        length = model.get("max_model_len") or parent.get("max_model_len")
        offer = super().make_offer(name, model | {"max_model_len": length}, props)
        if offer.capabilities == TEXT:  # neither the operator nor the module's name says anything else
            offer = offer.model_copy(update={"capabilities": self.capabilities.select(str(parent["id"]), parent)})
        return offer

    async def _poll_load(self) -> None:
        try:
            status, body = await self.get("/metrics")
        except BackendError:
            status, body = 0, b""
        self._load = parse_load(body) if status == 200 else None

    async def _poll_sleeping(self) -> bool:
        """Return whether the server sleeps. Only a server in developer mode says so."""
        status, body = await self.get("/is_sleeping")
        self._can_sleep = status == 200
        try:
            state = orjson.loads(body) if self._can_sleep else {}
        except orjson.JSONDecodeError:
            state = {}
        self._can_sleep = isinstance(state, dict) and isinstance(state.get("is_sleeping"), bool)
        return self._can_sleep and bool(state["is_sleeping"])

    # Work

    def run(self, task: Task) -> AsyncGenerator[Output]:
        """Run a task, on an awake server."""
        return self._manage(task) if task.capability is Capability.MODELS else self._run_awake(task)

    async def _run_awake(self, task: Task) -> AsyncGenerator[Output]:
        if self._served is None:
            await self.discover()
        if self._waking or self._falling_asleep:
            yield LOADING
        awake = await self._enter()
        if not awake:
            yield LOADING
            await self._wake_up_and_enter()
        pieces = 0

        def push(data: bytes, tokens: int) -> None:
            nonlocal pieces
            pieces += tokens
            assert task.push is not None
            task.push(data, tokens)

        try:
            if not awake:
                yield RUNNING
            async with aclosing(super().run(replace(task, push=push) if task.push else task)) as outputs:
                async for output in outputs:
                    if isinstance(output, Chunk):
                        pieces += output.tokens
                    elif isinstance(output, Finish) and output.usage is None:
                        output = await self._with_usage(task, output, pieces)  # noqa: PLW2901
                    yield output
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()

    async def _enter(self) -> bool:
        """Count a request as running if the server is awake. A server without sleep mode always is."""
        if not self._can_sleep:
            self._running += 1
            return True
        async with self._switching:
            if await self._poll_sleeping():
                return False
            self._running += 1
            return True

    async def _wake_up_and_enter(self) -> None:
        async with self._switching:
            await self._wake_up()
            self._running += 1

    # Sleep mode

    async def _manage(self, task: Task) -> AsyncGenerator[Output]:
        """Run a job about models: load wakes the server, unload puts it to sleep."""
        job = ModelJob.of(task)
        await self.discover()
        self._check(job)
        yield LOADING
        async with self._switching:
            if job.endpoint == UNLOAD:
                await self._sleep()
            else:
                await self._wake_up()
        for output in job.end():
            yield output

    def _check(self, job: ModelJob) -> None:
        """Raise BackendRefused for a job that vLLM cannot do."""
        if job.endpoint == PULL:
            message = f"vLLM serves the models that it was started with and cannot pull {job.model!r}. Start vLLM with this model."
            raise BackendRefused(message, param="model")
        entry = self._entries.get(job.model)
        if entry is None:
            raise ModelNotServed(f"the backend does not have the model {job.model!r}", param="model")
        if entry.get("parent") in self._entries:
            message = (
                f"{job.model!r} is a LoRA module and stays with its base model. Load or unload {entry['parent']!r}."
            )
            raise BackendRefused(message, param="model")
        if job.endpoint == UNLOAD and not self._can_sleep:
            raise BackendRefused(
                f"this vLLM server has no sleep mode, so {job.model!r} stays loaded. {START_SLEEP_MODE}"
            )
        if job.endpoint != UNLOAD and job.keep_alive not in (None, FOREVER):
            message = "vLLM keeps a model until it is unloaded; leave keep_alive out"
            raise BackendRefused(message, param="keep_alive")

    async def _sleep(self) -> None:
        """Wait until this worker's requests have ended, and put the server to sleep. The caller holds `_switching`."""
        self._falling_asleep = True
        try:
            while self._running:  # vLLM crashes when it falls asleep with requests in flight
                self._idle.clear()
                await self._idle.wait()
            if not await self._poll_sleeping():
                await self._switch(SLEEP)
                if not await self._poll_sleeping():
                    raise BackendError(f"vLLM did not fall asleep. {START_SLEEP_MODE}")
        finally:
            self._falling_asleep = False
            self.notify_changed()

    async def _wake_up(self) -> None:
        """Wake the server, unless it is awake. The caller holds `_switching`."""
        if not await self._poll_sleeping():
            return
        self._waking = True
        self.notify_changed()
        try:
            await self._switch("/wake_up")
            if await self._poll_sleeping():
                raise BackendError("vLLM did not wake up; its log says why", transient=True)
        finally:
            self._waking = False
            self.notify_changed()

    async def _switch(self, path: str) -> None:
        response = await self.server.post(path, {}, root="")
        response.close()

    # Tokens

    async def count_tokens(self, task: Task) -> int:
        """Return the exact number of prompt tokens of a chat or completions request, as vLLM's tokenizer counts them."""
        body = parse_json_object(task.body)
        requests = _tokenize_requests(body, task.model)
        given = sum(len(prompt) for prompt in _token_prompts(body.get("prompt")))
        return given + sum([int((await self._tokenizer("/tokenize", one))["count"]) for one in requests])

    async def tokenize(self, model: str, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of a text. Raises BackendError."""
        request = {"model": model, "prompt": text, "add_special_tokens": add_special_tokens}
        return [int(token) for token in (await self._tokenizer("/tokenize", request))["tokens"]]

    async def detokenize(self, model: str, tokens: list[int]) -> str:
        """Return the text of token ids. Raises BackendError."""
        return str((await self._tokenizer("/detokenize", {"model": model, "tokens": tokens}))["prompt"])

    async def _tokenizer(self, path: str, request: JSON) -> JSON:
        response, body = await self.server.post_and_read(path, request, TOKENS_LIMIT, root="")
        answer = parse_json_response(response, body)
        if not isinstance(answer, dict) or not {"count", "prompt"} & answer.keys():
            raise BackendError(f"the backend's answer to {path} is not vLLM's")
        return answer

    async def _with_usage(self, task: Task, finish: Finish, pieces: int) -> Finish:
        """Return the end of a text response with the usage that the server left out, as vLLM before 0.4.3 does in streams."""
        if task.capability not in TEXT:
            return finish
        try:
            prompt = await self.count_tokens(task)
        except BackendError:
            return finish
        usage = Usage(prompt_tokens=prompt, completion_tokens=pieces, total_tokens=prompt + pieces)
        return Finish(usage, finish.content_type)


def parse_load(metrics: bytes) -> BackendLoad | None:
    """Return the load figures in the text of `/metrics`, summed over vLLM's engines; None where it holds none."""
    found: dict[str, list[float]] = {}
    for match in METRIC.finditer(metrics):
        try:
            value = float(match[2])
        except ValueError:
            continue
        if math.isfinite(value) and value >= 0:
            found.setdefault(match[1].decode(), []).append(value)
    running, waiting = found.get("num_requests_running"), found.get("num_requests_waiting")
    if running is None or waiting is None:
        return None
    usage = found.get("kv_cache_usage_perc") or found.get("gpu_cache_usage_perc")
    return BackendLoad(
        running=int(sum(running)),
        waiting=int(sum(waiting)),
        kv_cache_usage=min(1.0, round(max(usage), 2)) if usage else None,
    )


def _tokenize_requests(body: JSON, model: str) -> Iterator[JSON]:
    if isinstance(body.get("messages"), list):
        given = {name: body[name] for name in TOKENIZE_FIELDS if body.get(name) is not None}
        yield {"model": model, "messages": body["messages"], **given}
        return
    prompt: Any = body.get("prompt")
    for text in prompt if isinstance(prompt, list) else [prompt]:
        if isinstance(text, str):
            yield {"model": model, "prompt": text, "add_special_tokens": body.get("add_special_tokens", True)}


def _token_prompts(prompt: Any) -> Iterator[list[int]]:
    """Yield the prompts that come as token ids: one list of ids, or a list of such lists."""
    if isinstance(prompt, list) and prompt:
        if isinstance(prompt[0], int):
            yield prompt
        else:
            yield from (one for one in prompt if isinstance(one, list))
