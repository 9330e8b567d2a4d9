"""The comfyui adapter, on a double that speaks ComfyUI's protocol."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from schemas.frames import Progress
from schemas.jobs import Capability
from tests.backends.adapter_contract import AdapterContract, AdapterRig, eventually, outputs_of
from tests.backends.doubles.comfyui import ComfyDouble, png
from tests.backends.image_tasks import answer_of, events_of, file_of, image_of, image_task
from workers.backends.base import (
    BackendConfig,
    BackendError,
    BackendRefused,
    BackendUnavailable,
    Chunk,
    Finish,
    ModelNotServed,
    Task,
    make_backend,
)
from workers.backends.comfyui.adapter import ComfyUIBackend

CHECKPOINT = "sd15.safetensors"


def task(model: str = CHECKPOINT, **fields: Any) -> Task:
    return image_task(model, **fields)


def workflow(**titles: str) -> dict[str, Any]:
    """ComfyUI's own default workflow, as it exports it."""
    graph: dict[str, Any] = {
        "3": {
            "class_type": "KSampler",
            "inputs": {
                "seed": 156,
                "steps": 4,
                "cfg": 8,
                "sampler_name": "euler",
                "scheduler": "normal",
                "denoise": 1,
                "model": ["4", 0],
                "positive": ["6", 0],
                "negative": ["7", 0],
                "latent_image": ["5", 0],
            },
        },
        "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": CHECKPOINT}},
        "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "beautiful scenery", "clip": ["4", 1]}},
        "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "text, watermark", "clip": ["4", 1]}},
        "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
        "9": {"class_type": "SaveImage", "inputs": {"filename_prefix": "ComfyUI", "images": ["8", 0]}},
    }
    for node, title in titles.items():
        graph[node.removeprefix("_")]["_meta"] = {"title": title}
    return graph


@pytest.fixture
async def double() -> AsyncIterator[ComfyDouble]:
    async with ComfyDouble() as server:
        yield server


@pytest.fixture
async def backend(double: ComfyDouble) -> AsyncIterator[ComfyUIBackend]:
    backend = ComfyUIBackend(BackendConfig(url=double.url))
    yield backend
    await backend.close()


@pytest.fixture
async def served(double: ComfyDouble, tmp_path: Path) -> AsyncIterator[Callable[..., ComfyUIBackend]]:
    """Backends with a workflow called `mine`."""
    made: list[ComfyUIBackend] = []

    def serve(graph: dict[str, Any], slots: dict[str, Any] | None = None) -> ComfyUIBackend:
        (tmp_path / "mine.json").write_text(json.dumps(graph))
        if slots is not None:
            (tmp_path / "mine.slots.json").write_text(json.dumps(slots))
        made.append(ComfyUIBackend(BackendConfig(url=double.url, options={"workflows": str(tmp_path)})))
        return made[-1]

    yield serve
    for backend in made:
        await backend.close()


class TestContract(AdapterContract):
    @pytest.fixture
    async def rig(self, double: ComfyDouble, backend: ComfyUIBackend) -> AdapterRig:
        double.behave(step_s=0.01)

        def check(chunks: list[Chunk], finish: Finish) -> None:
            answer = answer_of(chunks)
            assert [image_of(picture).size for picture in answer["data"]] == [(64, 48)]
            assert answer["output_format"] == "png"
            assert finish.content_type == "application/json"

        return AdapterRig(
            backend=backend,
            capability=Capability.IMAGES,
            short=task(size="64x48", steps=2),
            check=check,
            long=task(size="64x48", steps=1000),
            bad=task(size="8x8"),
            idle=double.idle,
            kill=double.kill,
            start=double.start_slowly,
            progress=True,
        )


# What goes into a graph


async def test_checkpoints_are_models_where_there_is_no_workflow(double: ComfyDouble, backend: ComfyUIBackend) -> None:
    found = await backend.discover()
    assert [model.name for model in found.models] == double.checkpoints
    assert found.slots == 1
    await outputs_of(backend, task(size="64x64", seed=7, steps=3, guidance=5, negative_prompt="dogs"))
    graph = double.submitted[-1]
    assert graph["model"]["inputs"]["ckpt_name"] == CHECKPOINT
    assert (graph["prompt"]["inputs"]["text"], graph["negative"]["inputs"]["text"]) == ("a cat", "dogs")
    sampler = graph["sampler"]["inputs"]
    assert (sampler["seed"], sampler["steps"], sampler["cfg"]) == (7, 3, 5)


async def test_an_operators_workflow_is_understood_by_its_links(
    double: ComfyDouble, served: Callable[..., ComfyUIBackend]
) -> None:
    backend = served(workflow())
    assert [model.name for model in (await backend.discover()).models] == ["mine"]
    chunks, _, _ = await outputs_of(backend, task("mine", size="96x32", seed=5, n=2, negative_prompt="dogs"))
    answer = answer_of(chunks)
    assert [image_of(picture).size for picture in answer["data"]] == [(96, 32)] * 2
    assert answer["data"][0]["seed"] == 5
    graph = double.submitted[-1]
    assert (graph["6"]["inputs"]["text"], graph["7"]["inputs"]["text"]) == ("a cat", "dogs")
    assert (graph["3"]["inputs"]["seed"], graph["3"]["inputs"]["steps"]) == (5, 4)
    assert graph["5"]["inputs"] == {"width": 96, "height": 32, "batch_size": 2}


async def test_titles_name_the_slots(double: ComfyDouble, served: Callable[..., ComfyUIBackend]) -> None:
    """Where any is named, nothing is guessed: what has no title stays as it is, and a request for it is refused."""
    backend = served(workflow(_6="nexus:prompt", _3="sampler (nexus:seed, nexus:steps)"))
    chunks, _, _ = await outputs_of(backend, task("mine", seed=2**64 - 1, n=2))
    assert [picture["seed"] for picture in answer_of(chunks)["data"]] == [2**64 - 1, 0]
    assert [graph["3"]["inputs"]["seed"] for graph in double.submitted] == [2**64 - 1, 0]
    with pytest.raises(BackendRefused, match="seed, steps") as caught:
        await outputs_of(backend, task("mine", size="64x64"))
    assert caught.value.info.param == "size"
    with pytest.raises(BackendRefused) as caught:
        await outputs_of(backend, task("mine", negative_prompt="dogs"))
    assert caught.value.info.param == "negative_prompt"


async def test_a_sidecar_names_the_slots_and_the_defaults(
    double: ComfyDouble, served: Callable[..., ComfyUIBackend]
) -> None:
    slots = {
        "prompt": [{"node": "6", "input": "text"}, {"node": "7", "input": "text"}],
        "size": {"node": 5},
        "sampler": {"node": "3", "input": "sampler_name"},
        "steps": {"node": "3"},
        "defaults": {"steps": 2, "size": "32x64"},
    }
    backend = served(workflow(), slots)
    chunks, _, _ = await outputs_of(backend, task("mine", sampler="heun"))
    assert image_of(answer_of(chunks)["data"][0]).size == (32, 64)
    graph = double.submitted[-1]
    assert (graph["6"]["inputs"]["text"], graph["7"]["inputs"]["text"]) == ("a cat", "a cat")
    assert (graph["3"]["inputs"]["sampler_name"], graph["3"]["inputs"]["steps"]) == ("heun", 2)
    for wrong, param in (({"n": 2}, "n"), ({"seed": 1}, "seed"), ({"sampler": 3}, "sampler")):
        with pytest.raises(BackendRefused) as caught:
            await outputs_of(backend, task("mine", **wrong))
        assert caught.value.info.param == param


async def test_a_flux_workflow_is_understood_by_its_links(
    double: ComfyDouble, served: Callable[..., ComfyUIBackend]
) -> None:
    graph = workflow()
    graph["3"] = {
        "class_type": "SamplerCustomAdvanced",
        "inputs": {"noise": ["20", 0], "guider": ["21", 0], "sigmas": ["22", 0], "latent_image": ["5", 0]},
    }
    graph["5"]["class_type"] = "EmptySD3LatentImage"
    graph["20"] = {"class_type": "RandomNoise", "inputs": {"noise_seed": 1}}
    graph["21"] = {"class_type": "BasicGuider", "inputs": {"model": ["4", 0], "conditioning": ["23", 0]}}
    graph["22"] = {"class_type": "BasicScheduler", "inputs": {"steps": 20, "denoise": 1, "model": ["4", 0]}}
    graph["23"] = {"class_type": "FluxGuidance", "inputs": {"guidance": 3.5, "conditioning": ["6", 0]}}
    del graph["7"]
    backend = served(graph)
    await outputs_of(backend, task("mine", seed=9, steps=3, guidance=2, size="64x32"))
    graph = double.submitted[-1]
    assert graph["6"]["inputs"]["text"] == "a cat"
    assert (graph["20"]["inputs"]["noise_seed"], graph["22"]["inputs"]["steps"]) == (9, 3)
    assert graph["23"]["inputs"]["guidance"] == 2
    with pytest.raises(BackendRefused) as caught:
        await outputs_of(backend, task("mine", negative_prompt="dogs"))
    assert caught.value.info.param == "negative_prompt"


async def test_without_a_seed_each_request_gets_another_one(double: ComfyDouble, backend: ComfyUIBackend) -> None:
    """The template's own would make the same picture again."""
    answers = [answer_of((await outputs_of(backend, task(size="16x16", steps=1)))[0]) for _ in range(2)]
    seeds = [answer["data"][0]["seed"] for answer in answers]
    assert seeds == [graph["sampler"]["inputs"]["seed"] for graph in double.submitted]
    assert seeds[0] != seeds[1]


@pytest.mark.parametrize(
    ("graph", "slots", "says"),
    [
        ({"nodes": [], "links": []}, None, "Export"),
        ({"1": {"class_type": "SaveImage", "inputs": {}}}, None, "nexus:prompt"),
        (workflow(), {"prompt": {"node": "66"}}, "node 66"),
        (workflow(), {"prompt": {"node": "6", "input": "tekst"}}, "tekst"),
        (workflow(_8="nexus:prompt"), None, "nexus:prompt.INPUT"),
    ],
)
async def test_a_workflow_that_makes_no_sense_stops_the_worker_at_its_start(
    graph: dict[str, Any], slots: Any, says: str, served: Callable[..., ComfyUIBackend]
) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        served(graph, slots)
    assert "mine.json" in str(caught.value)


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="flows"):
        make_backend("comfyui", BackendConfig(url="http://x", options={"flows": "y"}))
    with pytest.raises(ValueError, match="the folder does not exist"):
        make_backend("comfyui", BackendConfig(url="http://x", options={"workflows": "/nowhere"}))


# Edits


async def test_a_picture_and_its_mask_are_uploaded(double: ComfyDouble, backend: ComfyUIBackend) -> None:
    picture, mask = png(32, 32), png(32, 32, 9)
    files = (file_of("image", picture), file_of("mask", mask))
    chunks, _, _ = await outputs_of(backend, task(files=files, strength="0.4", size="64x64"))
    assert len(answer_of(chunks)["data"]) == 1
    graph = double.submitted[-1]
    assert double.uploads[graph["image"]["inputs"]["image"]] == picture
    assert double.uploads[graph["mask"]["inputs"]["image"]] == mask
    assert graph["image"]["inputs"]["image"].endswith("[temp]")
    assert graph["sampler"]["inputs"]["denoise"] == 0.4
    assert graph["sampler"]["inputs"]["latent_image"] == ["masked", 0]
    assert graph["scaled"]["inputs"]["width"] == 64


async def test_a_workflow_says_whether_it_takes_a_picture(
    double: ComfyDouble, served: Callable[..., ComfyUIBackend]
) -> None:
    backend = served(workflow())
    with pytest.raises(BackendRefused, match="generations") as caught:
        await outputs_of(backend, task("mine", files=(file_of("image", png(8, 8)),)))
    assert caught.value.info.param == "image"
    graph = workflow()
    graph["5"] = {"class_type": "VAEEncode", "inputs": {"pixels": ["10", 0], "vae": ["4", 2]}}
    graph["10"] = {"class_type": "LoadImage", "inputs": {"image": "example.png"}}
    backend = served(graph)
    with pytest.raises(BackendRefused, match="edits") as caught:
        await outputs_of(backend, task("mine"))
    assert caught.value.info.param == "image"
    await outputs_of(backend, task("mine", files=(file_of("image", png(8, 8)),)))
    assert double.submitted[-1]["10"]["inputs"]["image"] in double.uploads


async def test_a_forms_numbers_fit_the_slots_that_only_a_workflow_knows(
    double: ComfyDouble, served: Callable[..., ComfyUIBackend]
) -> None:
    graph = workflow(_6="nexus:prompt", _3="nexus:cut.cfg")
    graph["5"] = {"class_type": "LoadImage", "inputs": {"image": "example.png"}, "_meta": {"title": "nexus:image"}}
    backend = served(graph)
    files = (file_of("image", png(8, 8)),)
    await outputs_of(backend, task("mine", files=files, cut="2.5"))
    assert double.submitted[-1]["3"]["inputs"]["cfg"] == 2.5
    with pytest.raises(BackendRefused) as caught:
        await outputs_of(backend, task("mine", files=files, cut="deep"))
    assert caught.value.info.param == "cut"


async def test_a_picture_that_is_none_is_refused(double: ComfyDouble, backend: ComfyUIBackend) -> None:
    error = {"exception_type": "PIL.UnidentifiedImageError", "exception_message": "cannot identify image file"}
    double.behave(error=error)
    with pytest.raises(BackendRefused) as caught:
        await outputs_of(backend, task(files=(file_of("image", b"no picture"),)))
    assert caught.value.info.param == "image"


# How far it is


async def test_it_says_how_far_it_is_and_shows_it(double: ComfyDouble, backend: ComfyUIBackend) -> None:
    double.behave(previews=True, step_s=0.02)
    _, progress, _ = await outputs_of(backend, task(size="16x16", steps=4))
    steps = [one for one in progress if one.step and not one.preview]
    assert [(one.step, one.steps, one.fraction) for one in steps] == [(n, 4, n / 4) for n in range(1, 5)]
    assert any(one.phase == "load" for one in progress)
    assert len([one for one in progress if one.preview and one.preview.startswith("data:image/png;base64,")]) == 4


async def test_a_stream_shows_as_many_previews_as_are_wanted(double: ComfyDouble, backend: ComfyUIBackend) -> None:
    double.behave(step_s=0.01)
    chunks, _, finish = await outputs_of(backend, task(size="16x16", steps=9, stream=True, partial_images=2))
    events = events_of(chunks)
    assert [name for name, _ in events] == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [image_of(data).size for _, data in events] == [(8, 8), (8, 8), (16, 16)]
    assert finish.content_type == "text/event-stream"
    assert double.extras[-1]["preview_method"] == "auto"


@pytest.mark.parametrize("version", ["0.3.40", "0.3.75", ""])
async def test_what_waits_in_comfyui_is_queued(version: str, double: ComfyDouble, backend: ComfyUIBackend) -> None:
    """Given up, it is taken from the queue; what another caller runs is never interrupted, whatever the server's interrupts end."""
    double.version = version
    double.behave(step_s=0.01)
    first = asyncio.create_task(outputs_of(backend, task(size="16x16", steps=1000)))
    await eventually(lambda: _true(double.running is not None), 10)
    waiting = backend.run(task(size="16x16", steps=1))
    async for output in waiting:
        assert isinstance(output, Progress)
        assert (output.phase, output.message) == ("queued", "1 before it in ComfyUI")
        break
    await waiting.aclose()
    assert (len(double.deleted), double.interrupted) == (1, [])
    assert not double.interrupts or version == "0.3.75"
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    assert await double.idle()
    assert len(double.interrupts) >= 1


# What goes wrong


@pytest.mark.parametrize(
    "fault", [{"drop_socket_at": 2}, {"no_sockets": True}, {"status": False}, {"drop_socket_at": 4}], ids=str
)
async def test_news_may_be_lost_the_work_is_not(
    fault: dict[str, Any], double: ComfyDouble, backend: ComfyUIBackend
) -> None:
    double.behave(step_s=0.02, **fault)
    chunks, _, _ = await outputs_of(backend, task(size="16x16", steps=4))
    assert len(answer_of(chunks)["data"]) == 1
    assert len(double.submitted) == 1


async def test_silence_on_the_websocket_is_no_end(
    double: ComfyDouble, backend: ComfyUIBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.backends.comfyui.client.SILENCE_LIMIT_S", 0.05)
    double.behave(silent=True, step_s=0.03)
    chunks, progress, _ = await outputs_of(backend, task(size="16x16", steps=4))
    assert len(answer_of(chunks)["data"]) == 1
    assert progress


@pytest.mark.parametrize(("kind", "transient"), [("ValueError", False), ("torch.OutOfMemoryError", True)])
async def test_a_failure_that_shows_late(
    kind: str, transient: bool, double: ComfyDouble, backend: ComfyUIBackend
) -> None:
    double.behave(error={"exception_type": kind, "exception_message": "too many indices\n"})
    with pytest.raises(BackendError, match=r"KSampler \(node sampler\)") as caught:
        await outputs_of(backend, task(size="16x16", steps=2))
    assert caught.value.transient is transient
    assert caught.value.info.status == 502


async def test_work_that_somebody_else_ends_has_failed(double: ComfyDouble, backend: ComfyUIBackend) -> None:
    double.behave(step_s=0.01)
    work = asyncio.create_task(outputs_of(backend, task(size="16x16", steps=1000)))
    await eventually(lambda: _true(double.running is not None), 10)
    double._interrupt = True
    with pytest.raises(BackendError, match="was interrupted in ComfyUI"):
        await work


async def test_a_value_that_comfyui_refuses_is_named(double: ComfyDouble, backend: ComfyUIBackend) -> None:
    with pytest.raises(BackendRefused, match="smaller than min") as caught:
        await outputs_of(backend, task(size="64x8"))
    assert caught.value.info.param == "size"
    await backend.discover()
    double.checkpoints.remove(CHECKPOINT)
    with pytest.raises(ModelNotServed):
        await outputs_of(backend, task())


async def test_a_workflow_that_this_comfyui_cannot_run(
    double: ComfyDouble, served: Callable[..., ComfyUIBackend]
) -> None:
    """Where ComfyUI does not say which classes of nodes it has, the request shows it."""
    double.behave(tells_classes=False)
    graph = workflow()
    graph["8"]["class_type"] = "SomeCustomNode"
    with pytest.raises(BackendRefused, match="SomeCustomNode does not exist"):
        await outputs_of(served(graph), task("mine"))


async def test_which_of_several_pictures_counts_must_be_said(served: Callable[..., ComfyUIBackend]) -> None:
    graph = workflow()
    graph["19"] = graph["9"]
    with pytest.raises(BackendError, match="nexus:output"):
        await outputs_of(served(graph), task("mine"))
    graph["19"] = {"class_type": "PreviewImage", "inputs": {"images": ["8", 0]}}
    chunks, _, _ = await outputs_of(served(graph), task("mine"))
    assert len(answer_of(chunks)["data"]) == 1


async def test_a_caller_who_leaves_while_the_work_is_handed_over_leaves_nothing(
    double: ComfyDouble, backend: ComfyUIBackend
) -> None:
    """The id is not known then: it is waited for."""
    double.behave(step_s=0.01)
    submit = backend._server.submit
    handed = asyncio.Event()

    async def slow(*args: Any, **kwargs: Any) -> str:
        handed.set()
        await asyncio.sleep(0.05)
        return await submit(*args, **kwargs)

    backend._server.submit = slow  # type: ignore[method-assign]
    work = asyncio.create_task(outputs_of(backend, task(size="16x16", steps=1000)))
    await handed.wait()
    work.cancel()
    await asyncio.gather(work, return_exceptions=True)
    assert len(double.submitted) == 1
    assert await double.idle()


async def test_a_model_named_but_absent_is_said_at_once(double: ComfyDouble) -> None:
    backend = ComfyUIBackend(BackendConfig(url=double.url, models=("x",)))
    with pytest.raises(BackendError, match=r"no x; the checkpoints are sd15"):
        await backend.discover()
    await backend.close()


async def _true(value: bool) -> bool:
    return value


# What keeps a workflow from being served


@pytest.fixture
async def folder(double: ComfyDouble, tmp_path: Path) -> AsyncIterator[tuple[Path, ComfyUIBackend]]:
    """A folder with a workflow that works, and a backend on it."""
    (tmp_path / "good.json").write_text(json.dumps(workflow()))
    backend = ComfyUIBackend(BackendConfig(url=double.url, options={"workflows": str(tmp_path)}))
    yield tmp_path, backend
    await backend.close()


async def found(backend: ComfyUIBackend) -> tuple[list[str], tuple[str, ...]]:
    discovery = await backend.discover()
    return [model.name for model in discovery.models], discovery.problems


@pytest.mark.parametrize("new_nodes", [False, True], ids=["list", "combo"])
async def test_a_missing_checkpoint_is_named_until_it_is_there(
    new_nodes: bool, double: ComfyDouble, folder: tuple[Path, ComfyUIBackend]
) -> None:
    """The other workflows are served; the file is noticed without a restart of anything."""
    path, backend = folder
    double.behave(new_nodes=new_nodes)
    graph = workflow()
    graph["4"]["inputs"]["ckpt_name"] = "sdxl_v2.safetensors"
    (path / "wants.json").write_text(json.dumps(graph))
    names, [problem] = await found(backend)
    assert names == ["good"]
    assert problem == (
        "The workflow 'wants' is not served: ComfyUI lacks the file sdxl_v2.safetensors (ckpt_name of CheckpointLoaderSimple, "
        "node 4); it has sdxl.safetensors, sd15.safetensors."
    )
    with pytest.raises(BackendUnavailable, match="sdxl_v2"):
        await outputs_of(backend, task("wants"))
    double.checkpoints.append("sdxl_v2.safetensors")
    assert await found(backend) == (["good", "wants"], ())
    double.checkpoints.remove(CHECKPOINT)
    names, [problem] = await found(backend)
    assert names == ["wants"]
    assert CHECKPOINT in problem


async def test_a_missing_class_of_nodes_is_named_until_it_is_there(
    double: ComfyDouble, folder: tuple[Path, ComfyUIBackend]
) -> None:
    path, backend = folder
    graph = workflow()
    graph["8"]["class_type"] = "SomeCustomNode"
    (path / "custom.json").write_text(json.dumps(graph))
    names, [problem] = await found(backend)
    assert names == ["good"]
    assert "'custom' is not served: ComfyUI lacks the node class SomeCustomNode (node 8); install" in problem
    double.custom_classes.add("SomeCustomNode")
    assert await found(backend) == (["custom", "good"], ())


async def test_a_node_that_no_output_needs_does_not_count(
    double: ComfyDouble, served: Callable[..., ComfyUIBackend]
) -> None:
    """ComfyUI does not run it either."""
    graph = workflow()
    graph["44"] = {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "gone.safetensors"}}
    assert await found(served(graph)) == (["mine"], ())


async def test_nothing_that_can_run_is_an_error_that_says_why(
    double: ComfyDouble, backend: ComfyUIBackend, served: Callable[..., ComfyUIBackend]
) -> None:
    """A worker is not ready then."""
    double.checkpoints.clear()
    with pytest.raises(BackendError, match="ComfyUI has no checkpoint"):
        await backend.discover()
    with pytest.raises(BackendError, match=r"lacks the file sd15\.safetensors .*; it has none"):
        await served(workflow()).discover()


async def test_files_of_workflows_come_break_and_go(folder: tuple[Path, ComfyUIBackend]) -> None:
    """One that is no workflow does not take the others with it; nothing is started again."""
    path, backend = folder
    (path / "broken.json").write_text("{no workflow")
    names, [problem] = await found(backend)
    assert names == ["good"]
    assert "broken.json: the file cannot be read" in problem
    (path / "broken.json").write_text(json.dumps(workflow()))
    assert await found(backend) == (["broken", "good"], ())
    (path / "good.json").unlink()
    assert await found(backend) == (["broken"], ())
    (path / "broken.json").unlink()
    with pytest.raises(BackendError, match="no workflow"):
        await backend.discover()


async def test_one_configured_model_that_is_missing_leaves_the_others(double: ComfyDouble) -> None:
    backend = ComfyUIBackend(BackendConfig(url=double.url, models=("x", CHECKPOINT)))
    names, [problem] = await found(backend)
    assert names == [CHECKPOINT]
    assert "There is no x; the checkpoints are" in problem
    await backend.close()


async def test_classes_are_asked_for_once_unless_they_list_files(
    double: ComfyDouble, folder: tuple[Path, ComfyUIBackend]
) -> None:
    """A server is not asked thirty things every few seconds; after an outage it is, as it may have other nodes."""
    _, backend = folder
    await backend.discover()
    double.asked_classes.clear()
    await backend.discover()
    assert double.asked_classes == ["CheckpointLoaderSimple"]
    await double.kill()
    with pytest.raises(BackendUnavailable):
        await backend.health()
    await double.start()
    await backend.discover()
    assert "KSampler" in double.asked_classes


async def test_an_end_that_nobody_waits_for_comes_all_the_same(double: ComfyDouble, backend: ComfyUIBackend) -> None:
    """A caller is told off twice where the server takes long to end: the slot is free then, and the work ends later."""
    double.behave(load_s=0.5)
    await backend.discover()
    work = asyncio.create_task(outputs_of(backend, task(size="16x16", steps=1000)))
    await eventually(lambda: _true(double.running is not None), 10)
    double.stopped.clear()
    work.cancel()
    await asyncio.wait_for(double.stopped.wait(), 2)
    assert not work.done()
    work.cancel()
    await asyncio.gather(work, return_exceptions=True)
    assert not await double.idle()
    await eventually(double.idle, 5)


async def test_an_interrupt_that_comes_too_early_is_said_again(double: ComfyDouble, backend: ComfyUIBackend) -> None:
    """ComfyUI forgets those that come before it begins with a prompt."""
    double.behave(step_s=0.05, forgets=3)
    await backend.discover()
    work = asyncio.create_task(outputs_of(backend, task(size="16x16", steps=1000)))
    await eventually(lambda: _true(double.steps_made > 1), 10)
    work.cancel()
    await asyncio.gather(work, return_exceptions=True)
    assert await double.idle()
    assert len(double.interrupts) > 3


async def test_a_caller_who_leaves_while_a_picture_is_uploaded_leaves_nothing(
    double: ComfyDouble, backend: ComfyUIBackend
) -> None:
    double.behave(never_uploads=True)
    work = asyncio.create_task(outputs_of(backend, task(files=(file_of("image", png(8, 8)),))))
    await asyncio.wait_for(double.uploading.wait(), 10)
    work.cancel()
    await asyncio.gather(work, return_exceptions=True)
    await asyncio.wait_for(double.left.wait(), 2)
    assert not double.submitted
