"""The InvokeAI adapter on a real InvokeAI 6. Skipped unless `NEXUS_INVOKEAI_URL` names a running server.

A server without a GPU, from nothing (2.3 GB; torch and torchvision must both be the CPU builds):

    python3.11 -m venv /tmp/invoke
    /tmp/invoke/bin/pip install torch torchvision --index-url https://download.pytorch.org/whl/cpu
    /tmp/invoke/bin/pip install invokeai
    printf 'schema_version: 4.0.3\nport: 9191\ndevice: cpu\nprecision: float32\n' > /tmp/invoke/invokeai.yaml
    HF_HUB_OFFLINE=1 /tmp/invoke/bin/invokeai-web --root /tmp/invoke

Models of random weights, so that pictures are made by real models, if not good ones:

    /tmp/invoke/bin/python tests/slow/tiny_diffusers.py /tmp/invoke/tiny
    for model in tiny-sd1 tiny-sdxl; do
      curl -X POST "http://127.0.0.1:9191/api/v2/models/install?inplace=true&source=/tmp/invoke/tiny/$model" \
        -H 'content-type: application/json' -d '{}'
    done

Then:

    NEXUS_INVOKEAI_URL=http://127.0.0.1:9191 NEXUS_INVOKEAI_MODELS=tiny-sd1,tiny-sdxl make test ARGS="tests/slow/test_invokeai_real.py"

Without `NEXUS_INVOKEAI_MODELS`, the tests that need a model are skipped.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
from collections.abc import AsyncIterator
from typing import Any

import pytest
from PIL import Image

from schemas.frames import Progress
from schemas.jobs import Capability
from tests.backends.adapter_contract import AdapterContract, AdapterRig
from workers.adapter_kit.images.responses import EDITS, GENERATIONS, GeneratedImage
from workers.backends.base import (
    BackendConfig,
    BackendError,
    BackendRefused,
    Chunk,
    Finish,
    ModelNotServed,
    Task,
    UploadedFile,
)
from workers.backends.invokeai.adapter import InvokeAIBackend
from workers.backends.invokeai.graphs import Graph, ImageSpec, InstalledModel, graph_for

URL = os.environ.get("NEXUS_INVOKEAI_URL", "")
MODELS = [name for name in os.environ.get("NEXUS_INVOKEAI_MODELS", "").split(",") if name]
pytestmark = [pytest.mark.skipif(not URL, reason="NEXUS_INVOKEAI_URL names no server"), pytest.mark.timeout(300)]
with_models = pytest.mark.parametrize("model", MODELS or [pytest.param("", marks=pytest.mark.skip("no models"))])


@pytest.fixture
async def backend() -> AsyncIterator[InvokeAIBackend]:
    backend = InvokeAIBackend(BackendConfig(url=URL))
    yield backend
    await backend.close()


def blank() -> Graph:
    """Makes a picture without a model; its seed is its width."""
    graph = Graph("blank", ("blank", "width"))
    graph.add("blank", "blank_image", height=64)
    return graph


def slow() -> Graph:
    """Blurs a large picture fifty times."""
    graph = Graph("blur49", ("blank", "width"))
    graph.add("blank", "blank_image", height=3000)
    before = "blank"
    for n in range(50):
        graph.add(f"blur{n}", "img_blur", radius=8.0)
        graph.link((f"{before}.image", f"blur{n}.image"))
        before = f"blur{n}"
    return graph


def task(model: str, stream: bool = False, files: tuple[UploadedFile, ...] = (), **fields: Any) -> Task:
    body = {"model": model, "prompt": "a lighthouse", "seed": 7, "steps": 4} | fields
    return Task(
        "job_1",
        "req_1",
        Capability.IMAGES,
        EDITS if files else GENERATIONS,
        model,
        model,
        stream,
        json.dumps(body).encode(),
        files,
    )


def file(field: str, image: Image.Image) -> UploadedFile:
    out = io.BytesIO()
    image.save(out, "PNG")

    async def pieces() -> AsyncIterator[bytes]:
        yield out.getvalue()

    return UploadedFile(field, f"{field}.png", "image/png", len(out.getvalue()), pieces)


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


async def pictures_of(backend: InvokeAIBackend, work: Task) -> list[bytes]:
    body = b"".join([output.data async for output in backend.run(work) if isinstance(output, Chunk)])
    return [base64.b64decode(item["b64_json"]) for item in json.loads(body)["data"]]


async def images_there(backend: InvokeAIBackend) -> int:
    """How many pictures the server holds, those included that galleries do not show."""
    return int((await backend._client._request_json("GET", "/api/v1/images/?limit=1"))["total"])


async def test_says_what_it_serves(backend: InvokeAIBackend) -> None:
    """A server without models serves none; with models, those."""
    await backend.health()
    found = await backend.discover()
    assert {offer.name for offer in found.models} >= set(MODELS)
    with pytest.raises(ModelNotServed):
        await pictures_of(backend, task("no-such-model"))


async def test_a_graph_runs_once_per_seed_and_leaves_nothing(backend: InvokeAIBackend) -> None:
    """Pictures come in the order of their seeds, and InvokeAI keeps none."""
    before = await images_there(backend)
    outputs = [output async for output in backend.run_graph(blank(), [64, 128, 96])]
    pictures = [output for output in outputs if isinstance(output, GeneratedImage)]
    assert [opened(picture.data).width for picture in pictures] == [64, 128, 96]
    assert [picture.seed for picture in pictures] == [64, 128, 96]
    assert await images_there(backend) == before


async def test_closing_stops_the_queue(backend: InvokeAIBackend) -> None:
    """When the iterator is closed InvokeAI works on nothing, and what waited is gone from the queue. Only Socket.IO says `run`."""
    before = await images_there(backend)
    outputs = backend.run_graph(slow(), [3000, 3000])
    async for output in outputs:
        if isinstance(output, Progress) and output.phase == "run":
            break
    assert (await backend._client._request_json("GET", "/api/v1/queue/default/status"))["queue"]["in_progress"] == 1
    await outputs.aclose()
    status = await backend._client._request_json("GET", "/api/v1/queue/default/status")
    assert not status["processor"]["is_processing"]
    assert status["queue"]["pending"] == status["queue"]["in_progress"] == 0
    assert await images_there(backend) == before


async def test_being_cancelled_while_it_waits_for_its_turn_empties_the_queue(backend: InvokeAIBackend) -> None:
    """A job that waits within InvokeAI says so, and is taken out of the queue."""
    first = asyncio.create_task(_drain(backend, slow(), [3000]))
    await _busy(backend)
    async for output in (second := backend.run_graph(blank(), [64])):
        assert output == Progress(phase="queued")
        break
    await second.aclose()
    status = await backend._client._request_json("GET", "/api/v1/queue/default/status")
    assert (status["queue"]["pending"], status["queue"]["in_progress"]) == (0, 1)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert not (await backend._client._request_json("GET", "/api/v1/queue/default/status"))["processor"][
        "is_processing"
    ]


async def test_a_late_failure_is_understood(backend: InvokeAIBackend) -> None:
    """InvokeAI takes a graph with an unknown model, and fails when it runs."""
    graph = Graph("loader")
    model = {"key": "no-such-key", "hash": "", "name": "gone", "base": "sd-1", "type": "main"}
    graph.add("loader", "main_model_loader", model=model)
    with pytest.raises(ModelNotServed, match="no-such-key"):
        await _drain(backend, graph, [1])


async def test_an_impossible_graph_is_refused(backend: InvokeAIBackend) -> None:
    """What InvokeAI's own checks find is the request's fault."""
    graph = Graph("noise")
    graph.add("noise", "noise", width=65)
    with pytest.raises(BackendRefused, match="multiple of 8"):
        await _drain(backend, graph, [1])


@pytest.mark.parametrize("parts", [{}, {"image": "image.png"}, {"image": "image.png", "mask": "mask.png"}])
@pytest.mark.parametrize(("base", "name"), [("sd-2", "old"), ("flux", "dev"), ("flux", "kontext")])
async def test_graphs_for_models_that_are_not_there_pass_its_checks(
    backend: InvokeAIBackend, base: str, name: str, parts: dict[str, Any]
) -> None:
    """InvokeAI checks nodes, fields and edges when a graph comes; that a model is missing it sees only later."""
    installed = [
        InstalledModel("flux-key", "", name, base, "main"),
        InstalledModel("t5-key", "", "t5", "any", "t5_encoder"),
        InstalledModel("clip-key", "", "clip", "any", "clip_embed"),
        InstalledModel("vae-key", "", "vae", "flux", "vae"),
    ]
    graph = graph_for(installed[0], ImageSpec("a lighthouse", 64, 64, **parts), installed)
    with pytest.raises(BackendError, match=r"flux-key|Image record not found"):
        await _drain(backend, graph, [1])


@pytest.mark.skipif(not MODELS, reason="no models")
class TestContract(AdapterContract):
    @pytest.fixture
    async def rig(self, backend: InvokeAIBackend) -> AdapterRig:
        def check(chunks: list[Chunk], _finish: Finish) -> None:
            (item,) = json.loads(b"".join(chunk.data for chunk in chunks))["data"]
            assert opened(base64.b64decode(item["b64_json"])).size == (64, 64)

        async def idle() -> bool:
            status = await backend._client._request_json("GET", "/api/v1/queue/default/status")
            return not status["processor"]["is_processing"]

        return AdapterRig(
            backend=backend,
            capability=Capability.IMAGES,
            short=task(MODELS[0], size="64x64"),
            check=check,
            long=task(MODELS[0], size="512x512", steps=500),
            bad=task(MODELS[0], size="65x64"),
            idle=idle,
            kill=None,
            start=None,
            progress=True,
        )


@with_models
async def test_closing_stops_a_model_between_two_steps(backend: InvokeAIBackend, model: str) -> None:
    """When the iterator is closed the model has stopped too."""
    outputs = backend.run(task(model, size="512x512", steps=500))
    async for output in outputs:
        if isinstance(output, Progress) and output.fraction:
            break
    await outputs.aclose()
    assert not (await backend._client._request_json("GET", "/api/v1/queue/default/status"))["processor"][
        "is_processing"
    ]


@with_models
async def test_makes_pictures(backend: InvokeAIBackend, model: str) -> None:
    """As many as asked for, each by its own seed; the same seed makes the same picture, and nothing is left behind."""
    before = await images_there(backend)
    two = await pictures_of(backend, task(model, n=2, size="64x72", negative_prompt="fog", guidance=3))
    assert [opened(data).size for data in two] == [(64, 72), (64, 72)]
    assert opened(two[0]).tobytes() != opened(two[1]).tobytes()
    (again,) = await pictures_of(backend, task(model, seed=8, size="64x72", negative_prompt="fog", guidance=3))
    assert opened(again).tobytes() == opened(two[1]).tobytes()
    assert await images_there(backend) == before


@with_models
async def test_says_how_far_it_is(backend: InvokeAIBackend, model: str) -> None:
    """Fractions rise to one, and previews are pictures."""
    outputs = [output async for output in backend.run(task(model, size="256x256", steps=8))]
    progress = [output for output in outputs if isinstance(output, Progress)]
    fractions = [output.fraction for output in progress if output.fraction is not None]
    assert fractions == sorted(fractions)
    assert 0 <= fractions[0] < fractions[-1] <= 1
    previews = [output.preview for output in progress if output.preview]
    assert previews
    assert all(preview.startswith("data:image/jpeg;base64,") for preview in previews)


@with_models
async def test_edits_a_picture(backend: InvokeAIBackend, model: str) -> None:
    """Without a mask the whole picture changes, as little as `strength` says; its size is the picture's own."""
    image = file("image", Image.effect_mandelbrot((64, 80), (-2, -1.5, 1, 1.5), 30).convert("RGB"))
    (much,) = await pictures_of(backend, task(model, files=(image,), strength=1))
    (nothing,) = await pictures_of(backend, task(model, files=(image,), strength=0))
    assert opened(much).size == opened(nothing).size == (64, 80)
    assert opened(much).tobytes() != opened(nothing).tobytes()


@with_models
async def test_paints_only_where_the_mask_says(backend: InvokeAIBackend, model: str) -> None:
    """What is far from the transparent part of the mask stays as it was, to the pixel."""
    before = await images_there(backend)
    original = Image.new("RGB", (192, 64), (200, 30, 60))
    mask = Image.new("RGBA", original.size, (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, 64, 64))
    files = (file("image", original), file("mask", mask))
    (data,) = await pictures_of(backend, task(model, files=files))
    painted = opened(data)
    assert painted.crop((104, 0, 192, 64)).tobytes() == original.crop((104, 0, 192, 64)).tobytes()
    assert painted.crop((0, 0, 48, 64)).tobytes() != original.crop((0, 0, 48, 64)).tobytes()
    assert await images_there(backend) == before


async def _drain(backend: InvokeAIBackend, graph: Graph, seeds: list[int]) -> None:
    async for _ in backend.run_graph(graph, seeds):
        pass


async def _busy(backend: InvokeAIBackend) -> None:
    async with asyncio.timeout(60):
        while not (await backend._client._request_json("GET", "/api/v1/queue/default/status"))["queue"]["in_progress"]:
            await asyncio.sleep(0.05)
