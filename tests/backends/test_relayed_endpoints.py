"""Endpoints whose requests and answers pass as they are: every row of the table that says so, through each adapter that has it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from schemas.endpoints import BY_PATH, ENDPOINTS, EndpointSpec
from schemas.presence import ServiceRecord
from tests.backends.adapter_contract import outputs_of
from tests.backends.doubles.media import MediaDouble
from workers.backends.base import (
    Backend,
    BackendConfig,
    BackendError,
    BackendRefused,
    Chunk,
    Finish,
    Task,
    make_backend,
)

RELAYED = [spec for spec in ENDPOINTS if spec.relayed]
MODEL = "some-model"


@pytest.fixture
async def server() -> AsyncIterator[MediaDouble]:
    async with MediaDouble() as double:
        double.behave(models=({"id": MODEL, "object": "model", "created": 7, "owned_by": "tests"},))
        yield double


@pytest.fixture(params=["openai", "service"])
async def backend(server: MediaDouble, request: pytest.FixtureRequest) -> AsyncIterator[Backend]:
    """The same server behind the adapter for OpenAI-style servers, and as a service whose metadata names the endpoints."""
    if request.param == "openai":
        made = make_backend("openai", BackendConfig(url=server.url))
    else:
        server.media.metadata = {"endpoints": [spec.path for spec in RELAYED], "models": [MODEL]}
        made = make_backend("service", BackendConfig())
        made.services_changed({"s": ServiceRecord(name="s", base_url=server.url)})
    yield made
    await made.close()


def example(spec: EndpointSpec) -> dict[str, Any]:
    assert spec.description is not None
    return dict(next(iter(spec.description.examples.values())))


def work(spec: EndpointSpec, model: str = MODEL, **fields: Any) -> Task:
    body = json.dumps({**example(spec), "service_tier": "flex", **fields}).encode()
    return Task("job_1", "req_1", spec.capability, spec.path, model, "alias", False, body)


async def answer_of(backend: Backend, task: Task) -> tuple[Any, Finish]:
    chunks, _, finish = await outputs_of(backend, task)
    assert finish is not None
    return json.loads(b"".join(chunk.data for chunk in chunks if isinstance(chunk, Chunk))), finish


async def echoed(spec: EndpointSpec) -> dict[str, Any]:
    """What echo answers, as a server's answer."""
    echo = make_backend("echo", BackendConfig())
    answer, _ = await answer_of(echo, work(spec, "echo"))
    await echo.close()
    return dict(answer)


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("spec", RELAYED, ids=lambda spec: str(spec.path))
async def test_a_servers_answer_passes_but_for_the_models_name(
    server: MediaDouble, backend: Backend, spec: EndpointSpec, beside: bool
) -> None:
    """The server finds its own name for the model in the request, and its endpoint within its API or beside it."""
    made = await echoed(spec) | {"model": "its own name", "more": [1]}
    path = spec.path.removeprefix("/v1") if beside else spec.path
    server.media.relayed[path] = made
    answer, finish = await answer_of(backend, work(spec))
    assert answer == made | {"model": "alias"}
    assert (finish.usage.total_tokens if finish.usage else None) == made.get("usage", {}).get("total_tokens")
    assert server.last.path == path
    assert server.last.json == example(spec) | {"model": MODEL}


@pytest.mark.parametrize("spec", RELAYED, ids=lambda spec: str(spec.path))
async def test_a_server_without_it_says_so(server: MediaDouble, backend: Backend, spec: EndpointSpec) -> None:
    server.media.rerank = "none"
    with pytest.raises(BackendRefused) as caught:
        await outputs_of(backend, work(spec))
    assert (caught.value.info.status, caught.value.info.code) == (404, "unsupported_endpoint")


@pytest.mark.parametrize("spec", RELAYED, ids=lambda spec: str(spec.path))
async def test_another_answer_is_an_error(server: MediaDouble, backend: Backend, spec: EndpointSpec) -> None:
    """What callers' SDKs could not read never reaches them."""
    for wrong in ({}, {"model": "m"}, [1]):
        server.media.relayed[spec.path] = wrong
        with pytest.raises(BackendError, match="does not have the form"):
            await outputs_of(backend, work(spec))


@pytest.mark.parametrize("rerank", ["/v1/rerank", "/rerank", "/v2/rerank", "tei"])
@pytest.mark.parametrize(
    ("left", "right", "scores"),
    [("x", ["xx", "y", "x"], [0.5, 0.0, 0.25]), (["x", "y"], ["x", "x"], [0.25, 0.0]), ("x", "xxx", [0.75])],
)
async def test_scores_come_from_the_ranking_of_a_server_that_has_only_that(
    server: MediaDouble, backend: Backend, rerank: Any, left: Any, right: Any, scores: list[float]
) -> None:
    """llama.cpp, text-embeddings-inference and Infinity rank; the scores come back in the order of the pairs."""
    server.media.rerank = rerank
    answer, finish = await answer_of(backend, work(BY_PATH["/v1/score"], text_1=left, text_2=right))
    assert [(one["index"], one["score"]) for one in answer["data"]] == list(enumerate(scores))
    assert answer["model"] == "alias"
    assert finish.usage is not None
    assert answer["usage"]["total_tokens"] == finish.usage.total_tokens
