"""The vLLM adapter, on a double of vLLM."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from schemas.frames import Progress
from schemas.jobs import Capability, Usage
from schemas.presence import BackendLoad
from tests.backends.adapter_contract import AdapterContract, AdapterRig, eventually, outputs_of
from tests.backends.contract import Contract, Rig, chat, collect, completion, events
from tests.backends.doubles.vllm import CONTEXT, MODEL, VLLMDouble
from workers.adapter_kit.model_jobs import LOAD, PULL, UNLOAD
from workers.backends.base import (
    Backend,
    BackendConfig,
    BackendError,
    BackendRefused,
    BackendUnavailable,
    Chunk,
    Finish,
    ModelNotServed,
    Output,
    Task,
    make_backend,
)
from workers.backends.openai import OpenAIBackend
from workers.backends.vllm import VLLMBackend, parse_load

SLOW = {"words": ("word ",) * 2000, "token_delay_s": 0.02}


@pytest.fixture
async def server() -> AsyncIterator[VLLMDouble]:
    async with VLLMDouble() as double:
        yield double


@pytest.fixture
async def backend(server: VLLMDouble) -> AsyncIterator[VLLMBackend]:
    made = make_backend("vllm", BackendConfig(url=server.url))
    assert isinstance(made, VLLMBackend)
    yield made
    await made.close()


def job(endpoint: str, model: str = MODEL, *, stream: bool = False, **fields: Any) -> Task:
    body = json.dumps({"model": model, **fields}).encode()
    return Task("job_1", "req_1", Capability.MODELS, endpoint, "worker:w", "worker:w", stream, body)


async def answer_of(backend: Backend, work: Task) -> str:
    chunks, _, _ = await outputs_of(backend, work)
    return str(json.loads(b"".join(chunk.data for chunk in chunks))["choices"][0]["message"]["content"])


class TestText(Contract):
    """vLLM does what every text server does."""

    @pytest.fixture
    async def rig(self, server: VLLMDouble, backend: VLLMBackend, request: pytest.FixtureRequest) -> Rig:
        if "stops_the_server" in request.node.name:
            server.behave(**SLOW)

        async def idle() -> bool:
            return server.streaming == 0

        return Rig(backend, MODEL, idle, {"max_tokens": 2000}, context_length=CONTEXT)


class TestAdapter(AdapterContract):
    """vLLM does what every server does, with sleep mode and without."""

    @pytest.fixture(params=[True, False], ids=["developer mode", "plain"])
    async def rig(self, server: VLLMDouble, backend: VLLMBackend, request: pytest.FixtureRequest) -> AdapterRig:
        server.start_with(developer_mode=request.param)
        if any(name in request.node.name for name in ("closing", "dies_midway")):
            server.behave(**SLOW)

        def check(chunks: list[Chunk], finish: Finish) -> None:
            body = json.loads(b"".join(chunk.data for chunk in chunks))
            assert body["choices"][0]["message"]["content"] == "Hello there, world!"
            assert finish.usage is not None

        async def idle() -> bool:
            return server.streaming == 0

        return AdapterRig(
            backend=backend,
            capability=Capability.CHAT,
            short=chat(MODEL),
            check=check,
            long=chat(MODEL, max_tokens=2000),
            bad=chat(MODEL, messages="not a list"),
            idle=idle,
            kill=server.kill,
            start=server.start,
        )


# Models


async def test_lora_modules_are_models_of_their_own(server: VLLMDouble, backend: VLLMBackend) -> None:
    """A LoRA module has its base model's context length; whether it is in memory, vLLM does not report."""
    server.start_with(names=("base",), lora_modules=("sql", "legal"))
    offers = {offer.name: offer for offer in (await backend.discover()).models}
    assert list(offers) == ["base", "sql", "legal"]
    assert {offer.context_length for offer in offers.values()} == {CONTEXT}
    assert [offer.loaded for offer in offers.values()] == [True, None, None]
    assert await answer_of(backend, chat("sql")) == "Hello there, world!"
    assert server.last.json["model"] == "sql"


async def test_a_lora_module_serves_what_its_base_model_serves(server: VLLMDouble) -> None:
    """The operator's pattern, or a well-known name, decides for the base model."""
    server.start_with(names=("intfloat/e5-large",), lora_modules=("legal",))
    backend = make_backend("vllm", BackendConfig(url=server.url))
    offers = (await backend.discover()).models
    await backend.close()
    assert [offer.capabilities for offer in offers] == [(Capability.EMBEDDINGS,)] * 2


async def test_the_time_of_a_request_is_no_change(server: VLLMDouble, backend: VLLMBackend) -> None:
    """vLLM dates its models with the time of each request."""
    first = await backend.discover()
    server.start_with(extra={"created": 1})
    assert await backend.discover() == first


async def test_configured_models_alone_are_served(server: VLLMDouble) -> None:
    server.start_with(names=("base",), lora_modules=("sql",))
    backend = make_backend("vllm", BackendConfig(url=server.url, models=("sql",)))
    assert [offer.name for offer in (await backend.discover()).models] == ["sql"]
    with pytest.raises(ModelNotServed):
        await outputs_of(backend, chat("base"))
    await backend.close()


async def test_a_key_that_is_wrong_is_an_error(server: VLLMDouble) -> None:
    """vLLM's key guards `/v1` alone; the answer to a wrong one is a bare word."""
    server.start_with(api_key="right")
    for key, fine in (("right", True), ("wrong", False)):
        backend = make_backend("vllm", BackendConfig(url=server.url, api_key=key))
        if fine:
            assert await answer_of(backend, chat(MODEL)) == "Hello there, world!"
        else:
            with pytest.raises(BackendError) as caught:
                await backend.discover()
            assert "wrong" not in str(caught.value)
        await backend.close()


async def test_a_dead_engine_is_unavailable(server: VLLMDouble, backend: VLLMBackend) -> None:
    server.start_with(engine_dead=True)
    with pytest.raises(BackendUnavailable):
        await backend.health()


# Load figures


async def test_load_figures_are_those_of_the_metrics(server: VLLMDouble, backend: VLLMBackend) -> None:
    """Requests of other clients count; of several engines, the fullest cache is reported."""
    assert backend.load_figures() is None
    server.start_with(running=3, waiting=2, engines=2, kv_cache_usage=(0.25, 0.757))
    await backend.discover()
    assert backend.load_figures() == BackendLoad(running=3, waiting=2, kv_cache_usage=0.76)
    server.start_with(running=1)
    await backend.health()
    assert backend.load_figures() == BackendLoad(running=1, waiting=0, kv_cache_usage=0.25)


@pytest.mark.parametrize("metrics", ["current", "deprecated", "both"])
async def test_the_cache_usage_has_two_names(server: VLLMDouble, backend: VLLMBackend, metrics: str) -> None:
    server.start_with(metrics=metrics)
    await backend.health()
    assert backend.load_figures() == BackendLoad(running=0, waiting=0, kv_cache_usage=0.25)


@pytest.mark.parametrize("metrics", ["missing", "foreign"])
async def test_a_server_without_metrics_is_served_all_the_same(
    server: VLLMDouble, backend: VLLMBackend, metrics: str
) -> None:
    server.start_with(metrics=metrics)
    await backend.discover()
    await backend.health()
    assert backend.load_figures() is None


@pytest.mark.parametrize(
    ("text", "load"),
    [
        (b"", None),
        (b"vllm:num_requests_running 1\n", None),
        (b"vllm:num_requests_running 1\nvllm:num_requests_waiting 2\n", BackendLoad(running=1, waiting=2)),
        (b"vllm:num_requests_running NaN\nvllm:num_requests_waiting 2\n", None),
        (b"vllm:num_requests_running x\nvllm:num_requests_waiting 2\n", None),
        (
            b'vllm:num_requests_running{a="} 9"} 1e1\nvllm:num_requests_waiting{a="b"}  2.0 17\nvllm:kv_cache_usage_perc 1.004\n',
            BackendLoad(running=10, waiting=2, kv_cache_usage=1.0),
        ),
    ],
)
def test_load_figures_in_the_text_of_metrics(text: bytes, load: BackendLoad | None) -> None:
    assert parse_load(text) == load


# Sleep mode


async def test_unload_puts_the_server_to_sleep_and_load_wakes_it(server: VLLMDouble, backend: VLLMBackend) -> None:
    """The weights stay in the host's memory; the offers say what is loaded."""
    changes: list[None] = []
    backend.notify_changed = lambda: changes.append(None)
    await outputs_of(backend, job(UNLOAD))
    assert server.asleep
    assert server.sleeps == ["level=1&mode=wait"]
    assert changes
    assert [offer.loaded for offer in (await backend.discover()).models] == [False]
    chunks, progress, _ = await outputs_of(backend, job(LOAD))
    assert json.loads(chunks[-1].data) == {"object": "model.load", "model": MODEL, "status": "success"}
    assert progress[0].phase == "load"
    assert not server.asleep
    assert [offer.loaded for offer in (await backend.discover()).models] == [True]


async def test_a_caller_who_streams_gets_events(backend: VLLMBackend) -> None:
    chunks, _, finish = await outputs_of(backend, job(LOAD, stream=True))
    assert finish.content_type == "text/event-stream"
    assert events(chunks) == [{"object": "model.load", "model": MODEL, "status": "success"}]


async def test_a_state_is_not_switched_twice(server: VLLMDouble, backend: VLLMBackend) -> None:
    await outputs_of(backend, job(LOAD))
    assert server.wakes == 0
    await outputs_of(backend, job(UNLOAD))
    await outputs_of(backend, job(UNLOAD))
    assert len(server.sleeps) == 1


@pytest.mark.parametrize("streams", [True, False])
async def test_a_request_wakes_a_sleeping_server(server: VLLMDouble, backend: VLLMBackend, streams: bool) -> None:
    """A request that reaches a sleeping engine crashes vLLM. The load is seen while it lasts."""
    await backend.discover()
    server.asleep = True
    server.vllm.wake_s = 0.05
    chunks, progress, _ = await outputs_of(backend, chat(MODEL, stream=streams))
    assert chunks
    assert [one.phase for one in progress] == ["load", "run"]
    assert (server.wakes, server.reached_asleep) == (1, 0)


async def test_many_requests_wake_it_once(server: VLLMDouble, backend: VLLMBackend) -> None:
    await outputs_of(backend, job(UNLOAD))
    await asyncio.gather(*(outputs_of(backend, replace(chat(MODEL), job=f"job_{n}")) for n in range(8)))
    assert (server.wakes, server.reached_asleep) == (1, 0)


async def test_unload_waits_for_running_requests(server: VLLMDouble, backend: VLLMBackend) -> None:
    """vLLM crashes when it falls asleep with requests in flight; a request that comes meanwhile wakes it again."""
    await backend.discover()
    server.behave(hold=(hold := asyncio.Event()))
    running = asyncio.create_task(outputs_of(backend, chat(MODEL)))
    await eventually(_streaming(server), 5)
    unloading = asyncio.create_task(outputs_of(backend, job(UNLOAD)))
    await asyncio.sleep(0.05)
    late = asyncio.create_task(outputs_of(backend, chat(MODEL)))
    await asyncio.sleep(0.05)
    assert server.sleeps == []
    hold.set()
    await asyncio.gather(running, unloading, late)
    assert (len(server.sleeps), server.disturbed, server.wakes, server.reached_asleep) == (1, 0, 1, 0)


async def test_adapted_requests_do_not_block_each_other(server: VLLMDouble, backend: VLLMBackend) -> None:
    """A request that is carried out in parts counts once: its parts do not wait for an unload that waits for it."""
    backend = VLLMBackend(BackendConfig(url=server.url, options={"lacks": "n"}))
    server.behave(token_delay_s=0.05)

    async def run() -> list[Output]:
        return [output async for output in backend.run(chat(MODEL, n=3))]

    running = asyncio.create_task(run())
    await eventually(_streaming(server), 5)
    async with asyncio.timeout(10):
        outputs, _ = await asyncio.gather(running, outputs_of(backend, job(UNLOAD)))
    await backend.close()
    assert isinstance(outputs[-1], Finish)
    assert server.disturbed == 0
    assert len([seen for seen in server.seen if seen.path == "/v1/chat/completions"]) == 3


async def test_a_given_up_request_does_not_keep_the_server_awake(server: VLLMDouble, backend: VLLMBackend) -> None:
    await backend.discover()
    server.behave(**SLOW)
    running = asyncio.create_task(outputs_of(backend, chat(MODEL)))
    await eventually(_streaming(server), 5)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    async with asyncio.timeout(5):
        await outputs_of(backend, job(UNLOAD))
    assert server.asleep


async def test_somebody_else_puts_it_to_sleep(server: VLLMDouble, backend: VLLMBackend) -> None:
    """The next health check notices, and the offers follow."""
    await backend.discover()
    changes: list[None] = []
    backend.notify_changed = lambda: changes.append(None)
    await backend.health()
    assert not changes
    server.asleep = True
    await backend.health()
    assert changes


async def test_without_sleep_mode_a_model_cannot_be_unloaded(server: VLLMDouble, backend: VLLMBackend) -> None:
    """The refusal says how vLLM must be started. A load has nothing to do."""
    server.start_with(developer_mode=False)
    with pytest.raises(BackendRefused, match="--enable-sleep-mode"):
        await outputs_of(backend, job(UNLOAD))
    await outputs_of(backend, job(LOAD))
    assert [offer.loaded for offer in (await backend.discover()).models] == [True]
    server.start_with(developer_mode=True, sleep_mode=False)
    with pytest.raises(BackendError, match=r"did not fall asleep.*--enable-sleep-mode"):
        await outputs_of(backend, job(UNLOAD))


@pytest.mark.parametrize(
    ("work", "error", "says"),
    [
        (job(PULL), BackendRefused, "cannot pull"),
        (job(UNLOAD, "no-such-model"), ModelNotServed, "does not have the model"),
        (job(UNLOAD, "sql"), BackendRefused, "LoRA module"),
        (job(LOAD, keep_alive="5m"), BackendRefused, "keep_alive"),
        (job("/v1/models/rename"), BackendRefused, "does not serve"),
    ],
    ids=["pull", "unknown", "lora", "keep_alive", "endpoint"],
)
async def test_what_vllm_cannot_do_is_refused(
    server: VLLMDouble, backend: VLLMBackend, work: Task, error: type[BackendError], says: str
) -> None:
    server.start_with(lora_modules=("sql",))
    with pytest.raises(error, match=says):
        await outputs_of(backend, work)
    assert (server.sleeps, server.wakes) == ([], 0)


async def test_a_server_that_stays_asleep_fails_the_request(server: VLLMDouble, backend: VLLMBackend) -> None:
    """Another worker may serve it: the failure is transient, and no request reaches the engine."""
    await outputs_of(backend, job(UNLOAD))
    server.start_with(wake_status=500)
    with pytest.raises(BackendError):
        await outputs_of(backend, chat(MODEL))
    assert server.reached_asleep == 0
    server.start_with()
    assert await answer_of(backend, chat(MODEL)) == "Hello there, world!"


# Tokens


@pytest.mark.parametrize(
    ("work", "count"),
    [
        (chat(MODEL), 7),
        (chat(MODEL, tools=[{"type": "function", "function": {"name": "f"}}]), 8),
        (chat(MODEL, add_generation_prompt=False), 6),
        (completion(MODEL), 5),
        (completion(MODEL, prompt=["one two", "three"]), 5),
        (completion(MODEL, prompt=[1, 2, 3]), 3),
        (completion(MODEL, prompt=[[1, 2], [3]]), 3),
    ],
    ids=["chat", "tools", "no generation prompt", "text", "texts", "token ids", "lists of token ids"],
)
async def test_prompt_tokens_are_counted_by_the_server(backend: VLLMBackend, work: Task, count: int) -> None:
    assert await backend.count_tokens(work) == count


async def test_a_count_of_tokens_is_an_answer_of_its_own(server: VLLMDouble, backend: VLLMBackend) -> None:
    """It runs nothing and costs no token; where the tokenizer cannot be reached, or for a picture, it is refused with its code."""
    asked = replace(chat(MODEL, max_tokens=5), endpoint="/v1/chat/completions/input_tokens")
    [chunk], finish = await collect(backend, asked)
    answer = {"object": "chat.completion.input_tokens", "model": MODEL, "input_tokens": 7}
    assert (json.loads(chunk.data), finish.usage) == (answer, Usage())
    picture = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}}]}]
    server.start_with(tokenizer=False)
    for refused in (asked, replace(chat(MODEL, messages=picture), endpoint=asked.endpoint)):
        with pytest.raises(BackendRefused) as caught:
            await collect(backend, refused)
        assert caught.value.info.code == "unsupported_endpoint"


async def test_tokens_of_a_text_and_back(backend: VLLMBackend) -> None:
    assert await backend.tokenize(MODEL, "one two") == [0, 1, 2]
    assert await backend.tokenize(MODEL, "one two", add_special_tokens=False) == [0, 1]
    assert await backend.detokenize(MODEL, [4, 5]) == "w4 w5"


@pytest.mark.parametrize("tokenizer", [True, False])
async def test_usage_that_the_server_left_out_is_counted(
    server: VLLMDouble, backend: VLLMBackend, tokenizer: bool
) -> None:
    """The prompt exactly, the answer by its pieces; nothing where the tokenizer cannot be reached."""
    server.start_with(tokenizer=tokenizer)
    server.behave(usage="no")
    _, finish = await collect(backend, chat(MODEL, stream=True))
    if tokenizer:
        assert finish.usage is not None
        assert (finish.usage.prompt_tokens, finish.usage.completion_tokens) == (7, 5)
    else:
        assert finish.usage is None


async def test_usage_of_the_server_counts(server: VLLMDouble, backend: VLLMBackend) -> None:
    _, finish = await collect(backend, chat(MODEL, stream=True))
    assert finish.usage is not None
    assert finish.usage.prompt_tokens == 3
    assert not any(seen.path == "/tokenize" for seen in server.seen)


# Beside the openai adapter


async def test_the_openai_adapter_serves_vllm_as_well(server: VLLMDouble) -> None:
    """Its models, LoRA modules among them, and their text; nothing of vLLM's own API is asked."""
    server.start_with(lora_modules=("sql",))
    backend = OpenAIBackend(BackendConfig(url=server.url))
    offers = (await backend.discover()).models
    assert [(offer.name, offer.context_length, offer.loaded) for offer in offers] == [
        (MODEL, CONTEXT, None),
        ("sql", None, None),
    ]
    assert await answer_of(backend, chat("sql")) == "Hello there, world!"
    await backend.health()
    await backend.close()
    assert {seen.path for seen in server.seen} == {"/v1/models", "/v1/chat/completions", "/health"}


async def test_progress_is_that_of_a_load_alone(backend: VLLMBackend) -> None:
    """An awake server costs no sign of a load."""
    outputs = [output async for output in backend.run(chat(MODEL, stream=True))]
    assert not any(isinstance(output, Progress) for output in outputs)


def _streaming(server: VLLMDouble) -> Any:
    async def streams() -> bool:
        return server.streaming > 0

    return streams
