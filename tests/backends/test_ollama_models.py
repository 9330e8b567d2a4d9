"""Models pulled, loaded and unloaded beside a worker, on a double of Ollama."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, cast

import pytest

from schemas.frames import Progress
from schemas.jobs import Capability
from tests.backends.adapter_contract import outputs_of
from tests.backends.contract import events
from tests.backends.doubles.ollama import CHAT, EMBED, OllamaDouble
from workers.backends.base import (
    Backend,
    BackendConfig,
    BackendError,
    BackendRefused,
    BackendUnavailable,
    Chunk,
    ModelNotServed,
    Output,
    Task,
    make_backend,
)

NEW = "qwen3:0.6b"


@pytest.fixture
async def ollama() -> AsyncIterator[OllamaDouble]:
    async with OllamaDouble() as server:
        yield server


@pytest.fixture
async def backend(ollama: OllamaDouble) -> AsyncIterator[Backend]:
    made = make_backend("ollama", BackendConfig(url=ollama.url))
    yield made
    await made.close()


@pytest.fixture
def heard(backend: Backend) -> list[str]:
    """Gains an item whenever the adapter says that what it serves has changed."""
    calls: list[str] = []
    backend.notify_changed = lambda: calls.append("changed")
    return calls


def job(verb: str, model: str = NEW, stream: bool = False, **fields: Any) -> Task:
    body = json.dumps({"model": model, "stream": stream, **fields}).encode()
    path = f"/v1/models/{verb}"
    return Task("job_1", "req_1", Capability.MODELS, path, "worker:w", "worker:w", stream, body)


async def answer(backend: Backend, work: Task) -> dict[str, Any]:
    chunks, _, finish = await outputs_of(backend, work)
    assert finish.content_type == "application/json"
    return dict(json.loads(b"".join(chunk.data for chunk in chunks)))


async def test_a_pulled_model_is_served(backend: Backend, heard: list[str]) -> None:
    """And the worker is told to look at once."""
    assert await answer(backend, job("pull")) == {"object": "model.pull", "model": NEW, "status": "success"}
    assert heard == ["changed"]
    assert NEW in [offer.name for offer in (await backend.discover()).models]


async def test_a_pull_says_how_far_it_is(backend: Backend) -> None:
    """Never backwards, though the size of a layer shows only when its turn comes."""
    _, progress, _ = await outputs_of(backend, job("pull"))
    fractions = [one.fraction for one in progress if one.fraction is not None]
    assert fractions == sorted(fractions)
    assert (fractions[0], fractions[-1]) == (0.0, 1.0)
    assert progress[0] == Progress(message="pulling manifest")
    assert "verifying sha256 digest" in [one.message for one in progress]


async def test_a_streamed_pull_is_a_frame_a_line(backend: Backend) -> None:
    chunks, _, finish = await outputs_of(backend, job("pull", stream=True))
    found = events(chunks)
    assert finish.content_type == "text/event-stream"
    assert {(event["object"], event["model"]) for event in found} == {("model.pull", NEW)}
    half = next(event for event in found if event.get("completed") == 2000)
    assert half == {
        "object": "model.pull", "model": NEW, "status": "pulling aa11", "completed": 2000, "total": 4000, "fraction": 0.5,
    }  # fmt: skip
    assert found[-1] == {"object": "model.pull", "model": NEW, "status": "success"}
    assert [event["status"] for event in found].count("success") == 1


async def test_a_model_that_the_registry_lacks_is_not_found(backend: Backend, heard: list[str]) -> None:
    """Ollama says so in a line of its stream."""
    with pytest.raises(ModelNotServed, match="file does not exist"):
        await outputs_of(backend, job("pull", "no-such-model"))
    assert heard == []


@pytest.mark.parametrize(
    ("fault", "words"), [("error_line", "max retries exceeded"), ("no_done", "before it was complete")]
)
async def test_a_pull_that_breaks_off_is_a_transient_failure(
    ollama: OllamaDouble, backend: Backend, fault: str, words: str
) -> None:
    ollama.behave(fault=fault)
    with pytest.raises(BackendError, match=words) as caught:
        await outputs_of(backend, job("pull"))
    assert caught.value.transient


async def test_a_cancelled_pull_ends_at_the_server(ollama: OllamaDouble, backend: Backend) -> None:
    ollama.behave(delay_s=0.5)
    output = cast("AsyncGenerator[Output, None]", backend.run(job("pull", stream=True)))
    while not isinstance(await anext(output), Chunk):
        pass
    assert ollama.running == 1
    await output.aclose()
    async with asyncio.timeout(10):
        while ollama.running:
            await asyncio.sleep(0.005)
    assert NEW not in ollama.models


@pytest.mark.parametrize("model", [CHAT, EMBED, "nomic-embed-text"])
async def test_a_loaded_model_stays(ollama: OllamaDouble, backend: Backend, heard: list[str], model: str) -> None:
    chunks, progress, _ = await outputs_of(backend, job("load", model))
    assert json.loads(chunks[-1].data) == {"object": "model.load", "model": model, "status": "success"}
    assert [one.phase for one in progress] == ["load"]
    assert len(ollama.loaded) == 1
    assert ollama.seen[-1][1]["keep_alive"] == -1
    assert heard


async def test_how_long_it_stays_may_be_said(ollama: OllamaDouble, backend: Backend) -> None:
    await outputs_of(backend, job("load", CHAT, keep_alive="30m"))
    assert ollama.seen[-1][1]["keep_alive"] == "30m"


@pytest.mark.parametrize("model", [CHAT, EMBED])
async def test_a_model_is_unloaded(ollama: OllamaDouble, backend: Backend, heard: list[str], model: str) -> None:
    ollama.loaded[model] = {}
    assert (await answer(backend, job("unload", model)))["object"] == "model.unload"
    assert ollama.loaded == {}
    assert heard == ["changed"]


@pytest.mark.parametrize("verb", ["load", "unload"])
async def test_an_unknown_model_can_be_neither_loaded_nor_unloaded(backend: Backend, verb: str) -> None:
    with pytest.raises(ModelNotServed):
        await outputs_of(backend, job(verb))


@pytest.mark.parametrize(
    ("work", "param"),
    [
        (job("pull", ""), "model"),
        (job("load", keep_alive=0), "keep_alive"),
        (job("unload", keep_alive="5m"), "keep_alive"),
        (job("pull", keep_alive="5m"), "keep_alive"),
        (job("delete"), None),
    ],
    ids=["no-model", "load-zero", "unload-five", "pull-five", "delete"],
)
async def test_jobs_that_make_no_sense_are_refused(backend: Backend, work: Task, param: str | None) -> None:
    with pytest.raises(BackendRefused) as caught:
        await outputs_of(backend, work)
    assert caught.value.info.param == param


async def test_a_server_that_is_away_is_unavailable(ollama: OllamaDouble, backend: Backend) -> None:
    await ollama.kill()
    for verb in ("pull", "load", "unload"):
        with pytest.raises(BackendUnavailable):
            await outputs_of(backend, job(verb, CHAT))
