"""The sdwebui adapter, on a double that speaks AUTOMATIC1111's API."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from io import BytesIO
from typing import Any

import pytest
from PIL import Image

from schemas.frames import Progress
from schemas.jobs import Capability
from tests.backends.adapter_contract import AdapterContract, AdapterRig, eventually, outputs_of
from tests.backends.described import check_description
from tests.backends.doubles.sdwebui import SDWebUIDouble, png
from tests.backends.image_tasks import answer_of, events_of, file_of, image_of, image_task, picture_bytes
from workers.backends.base import (
    BackendConfig,
    BackendError,
    BackendRefused,
    Chunk,
    Finish,
    Task,
    make_backend,
)
from workers.backends.sdwebui import SDWebUIBackend


def task(**fields: Any) -> Task:
    return image_task("v1-5", **fields)


@pytest.fixture(autouse=True)
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.backends.sdwebui.adapter.PROGRESS_INTERVAL_S", 0.02)
    monkeypatch.setattr("workers.backends.sdwebui.adapter.INTERRUPT_INTERVAL_S", 0.02)


@pytest.fixture
async def double() -> AsyncIterator[SDWebUIDouble]:
    async with SDWebUIDouble() as server:
        yield server


@pytest.fixture
async def backend(double: SDWebUIDouble) -> AsyncIterator[SDWebUIBackend]:
    backend = SDWebUIBackend(BackendConfig(url=double.url))
    yield backend
    await backend.close()


class TestContract(AdapterContract):
    @pytest.fixture
    async def rig(self, double: SDWebUIDouble, backend: SDWebUIBackend) -> AdapterRig:
        double.behave(step_s=0.01)

        def check(chunks: list[Chunk], finish: Finish) -> None:
            answer = answer_of(chunks)
            assert [image_of(picture).size for picture in answer["data"]] == [(64, 48)]
            assert answer["data"][0]["seed"] == 3
            assert finish.content_type == "application/json"

        return AdapterRig(
            backend=backend,
            capability=Capability.IMAGES,
            short=task(size="64x48", steps=2, seed=3),
            check=check,
            long=task(size="64x48", steps=1000),
            bad=task(sampler="heun"),
            idle=double.idle,
            kill=double.kill,
            start=double.start_slowly,
            progress=True,
        )


class TestCppContract(TestContract):
    """stable-diffusion.cpp's server: it cannot be stopped, so it is waited for."""

    @pytest.fixture
    async def rig(self, double: SDWebUIDouble, backend: SDWebUIBackend) -> AdapterRig:
        double.behave(step_s=0.01, cpp=True)

        def check(chunks: list[Chunk], _: Finish) -> None:
            assert len(answer_of(chunks)["data"]) == 1

        return AdapterRig(
            backend=backend,
            capability=Capability.IMAGES,
            short=task(size="64x48", steps=2),
            check=check,
            long=task(size="64x48", steps=40),
            bad=task(sampler="heun"),
            idle=double.idle,
            kill=double.kill,
            start=double.start_slowly,
        )


async def test_models_and_which_is_loaded(backend: SDWebUIBackend) -> None:
    found = await backend.discover()
    assert [(model.name, model.loaded) for model in found.models] == [("v1-5", True), ("sdxl", False)]
    assert found.slots == 1


async def test_everything_asked_for_reaches_the_server(double: SDWebUIDouble, backend: SDWebUIBackend) -> None:
    work = image_task("sdxl", size="64x32", seed=7, n=2, steps=3, guidance=5.5, negative_prompt="dogs")
    chunks, _, _ = await outputs_of(backend, work)
    assert [picture["seed"] for picture in answer_of(chunks)["data"]] == [7, 8]
    call = double.calls[0]
    assert (call["prompt"], call["negative_prompt"], call["seed"]) == ("a cat", "dogs", 7)
    assert (call["width"], call["height"], call["steps"], call["cfg_scale"]) == (64, 32, 3, 5.5)
    assert call["override_settings"] == {"sd_model_checkpoint": "sdxl [ab12]"}
    assert double.loaded == "sdxl"


async def test_a_request_chooses_among_what_the_server_has(double: SDWebUIDouble, backend: SDWebUIBackend) -> None:
    """A LoRA stands in the prompt, as the WebUI reads it; a name that would change the prompt is not offered."""
    described = await check_description(backend, "sdxl")
    properties = described.endpoints["/v1/images/generations"].parameters["properties"]
    assert (properties["sampler"]["enum"], properties["scheduler"]["enum"]) == (
        ["Euler a", "DPM++ 2M"],
        ["automatic", "karras"],
    )
    assert properties["loras"]["items"]["properties"]["name"]["enum"] == ["pixel-art"]
    double.calls.clear()
    loras = [{"name": "pixel-art", "weight": 0.8}]
    await outputs_of(backend, image_task("sdxl", sampler="DPM++ 2M", scheduler="karras", loras=loras))
    [call] = double.calls
    assert (call["sampler_name"], call["scheduler"]) == ("DPM++ 2M", "karras")
    assert call["prompt"] == "a cat <lora:pixel-art:0.8>"
    files = (file_of("image", png(64, 64)),)
    await outputs_of(backend, task(files=files, loras=json.dumps(loras)))
    assert double.calls[-1]["prompt"].endswith("<lora:pixel-art:0.8>")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sampler", "Nothing"),
        ("scheduler", 1),
        ("loras", "pixel-art"),
        ("loras", [{"name": "bad<name>"}]),
        ("loras", [{"name": "pixel-art", "weight": "1> <lora:x"}]),
        ("loras", [{"name": "pixel-art"}] * 17),
    ],
)
async def test_what_the_server_does_not_have_is_refused(backend: SDWebUIBackend, field: str, value: Any) -> None:
    with pytest.raises(BackendRefused) as caught:
        await outputs_of(backend, image_task("sdxl", **{field: value}))
    assert caught.value.info.param == field


async def test_a_server_without_lists_offers_no_choice(double: SDWebUIDouble, backend: SDWebUIBackend) -> None:
    double.behave(cpp=True)
    described = await check_description(backend, "v1-5")
    assert "sampler" not in described.endpoints["/v1/images/generations"].parameters["properties"]
    with pytest.raises(BackendRefused, match="sampler"):
        await outputs_of(backend, image_task("v1-5", sampler="Euler a"))


async def test_what_is_not_asked_for_is_the_operators_choice(double: SDWebUIDouble) -> None:
    backend = SDWebUIBackend(BackendConfig(url=double.url, options={"steps": "2", "size": "32x40"}))
    chunks, _, _ = await outputs_of(backend, task())
    assert image_of(answer_of(chunks)["data"][0]).size == (32, 40)
    assert double.calls[0]["steps"] == 2
    await backend.close()
    with pytest.raises(ValueError, match="sampler"):
        make_backend("sdwebui", BackendConfig(url="http://x", options={"sampler": "y"}))


async def test_an_edit_keeps_the_pictures_size_and_paints_where_the_mask_is_transparent(
    double: SDWebUIDouble, backend: SDWebUIBackend
) -> None:
    mask = Image.new("RGBA", (100, 60), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, 50, 60))
    out = BytesIO()
    mask.save(out, "PNG")
    files = (file_of("image", png(100, 60)), file_of("mask", out.getvalue()))
    await outputs_of(backend, task(files=files, strength="0.5"))
    call = double.calls[0]
    assert call["path"].endswith("/img2img")
    assert (call["width"], call["height"], call["denoising_strength"]) == (96, 56, 0.5)
    sent = Image.open(BytesIO(base64.b64decode(call["mask"])))
    assert (sent.getpixel((10, 10)), sent.getpixel((90, 10))) == (255, 0)


@pytest.mark.parametrize(
    ("field", "data"), [("image", b"no picture"), ("mask", b"no picture"), ("mask", picture_bytes((8, 8)))]
)
async def test_files_that_make_no_sense_are_refused(field: str, data: bytes, backend: SDWebUIBackend) -> None:
    files = {"image": png(8, 8), field: data}
    with pytest.raises(BackendRefused) as caught:
        await outputs_of(backend, task(files=tuple(file_of(name, content) for name, content in files.items())))
    assert caught.value.info.param == field


async def test_grids_and_what_extensions_add_are_left_out(double: SDWebUIDouble, backend: SDWebUIBackend) -> None:
    double.behave(grid=True, noisy=True)
    chunks, _, _ = await outputs_of(backend, task(size="64x48"))
    assert [image_of(picture).size for picture in answer_of(chunks)["data"]] == [(64, 48)]


async def test_it_says_how_far_it_is_and_shows_it(double: SDWebUIDouble, backend: SDWebUIBackend) -> None:
    double.behave(step_s=0.02, load_s=0.1, previews=True)
    work = image_task("sdxl", size="64x48", steps=20, stream=True, partial_images=1)
    chunks, progress, _ = await outputs_of(backend, work)
    assert progress[0].phase == "load"
    far = [one.fraction for one in progress if one.fraction is not None]
    assert far == sorted(far)
    assert all(one.preview and one.preview.startswith("data:image/png;base64,") for one in progress if one.step)
    events = events_of(chunks)
    assert [name for name, _ in events] == ["image_generation.partial_image", "image_generation.completed"]
    assert [image_of(data).size for _, data in events] == [(16, 16), (64, 48)]


async def test_an_interrupt_that_comes_too_early_is_said_again(double: SDWebUIDouble, backend: SDWebUIBackend) -> None:
    double.behave(step_s=0.01, begin_s=0.1)
    work = asyncio.create_task(outputs_of(backend, task(size="64x48", steps=1000)))
    await eventually(lambda: _not(double.idle()), 10)
    work.cancel()
    await asyncio.gather(work, return_exceptions=True)
    assert await double.idle()
    assert double.interrupts > 1


async def test_what_somebody_else_runs_is_left_alone(double: SDWebUIDouble, backend: SDWebUIBackend) -> None:
    """Work that waits behind it is queued; given up, it is interrupted when its turn has come."""
    double.behave(step_s=0.01)
    other = asyncio.create_task(double._work({"steps": 40, "seed": 1}))
    await asyncio.sleep(0)
    output = backend.run(task(size="64x48", steps=1000))
    assert await anext(output) == Progress(phase="queued")
    await output.aclose()
    assert other.done()
    assert double._step == 0 or double.interrupts
    assert await double.idle()
    assert (await other).status == 200


OOM = {"error": "OutOfMemoryError", "detail": "", "body": "", "errors": "CUDA out of memory. Tried to allocate 2 GiB"}
NANS = {"error": "NansException", "detail": "", "body": "", "errors": "A tensor with all NaNs was produced in Unet."}


@pytest.mark.parametrize(
    ("error", "kind", "transient", "says"),
    [
        ((500, OOM), BackendError, True, "ran out of memory"),
        ((500, NANS), BackendError, False, "NansException: A tensor with all NaNs"),
        ((404, {"detail": "Sampler not found"}), BackendRefused, False, "Sampler not found"),
        ((422, {"detail": [{"loc": ["body", "width"], "msg": "too wide"}]}), BackendRefused, False, "width: too wide"),
        ((400, {"error": "invalid params"}), BackendRefused, False, "invalid params"),
        ((500, {"error": "generate_image returned no results"}), BackendError, False, "no results"),
        ((503, {"detail": "busy"}), BackendError, True, "busy"),
        ((200, {"images": [], "info": "{}"}), BackendError, False, "without an image"),
    ],
)
async def test_failures(
    error: Any, kind: type[BackendError], transient: bool, says: str, double: SDWebUIDouble, backend: SDWebUIBackend
) -> None:
    double.behave(error=error)
    with pytest.raises(BackendError, match=says) as caught:
        await outputs_of(backend, task())
    assert isinstance(caught.value, kind)
    assert caught.value.transient is transient


async def test_work_whose_connection_breaks_is_not_handed_over_again(
    double: SDWebUIDouble, backend: SDWebUIBackend
) -> None:
    """Not even where the connection is one that was kept: the server may be at it."""
    await backend.discover()
    double.behave(drop=True)
    with pytest.raises(BackendError) as caught:
        await outputs_of(backend, task())
    assert caught.value.transient
    assert len(double.calls) == 1


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"seed": 2**64 - 1}, "seed"),
        ({"strength": 0.5}, "strength"),
        ({"files": (file_of("image", png(8, 8)),) * 2}, "image"),
    ],
    ids=["too large", "without a picture", "two pictures"],
)
async def test_what_these_servers_cannot_do_is_refused(
    fields: dict[str, Any], param: str, double: SDWebUIDouble, backend: SDWebUIBackend
) -> None:
    with pytest.raises(BackendRefused) as caught:
        await outputs_of(backend, task(**fields))
    assert caught.value.info.param == param
    assert not double.calls


async def test_a_server_with_a_password(double: SDWebUIDouble) -> None:
    double.behave(auth="user:secret")
    backend = SDWebUIBackend(BackendConfig(url=double.url, api_key="user:secret"))
    assert (await backend.discover()).models
    await backend.close()
    backend = SDWebUIBackend(BackendConfig(url=double.url, api_key="user:wrong"))
    with pytest.raises(BackendError, match="key"):
        await backend.discover()
    await backend.close()


async def _not(condition: Any) -> bool:
    return not await condition


async def test_a_server_that_is_slow_to_say_what_it_is_at_is_interrupted_at_once(
    double: SDWebUIDouble, backend: SDWebUIBackend
) -> None:
    """It has said so a moment ago."""
    double.behave(step_s=0.02)
    output = backend.run(task(size="64x48", steps=1000))
    async for piece in output:
        if isinstance(piece, Progress) and piece.fraction:
            break
    double.behave(step_s=0.02, answer_s=4.0)
    closing = asyncio.create_task(output.aclose())
    await asyncio.wait_for(double.stopped.wait(), 2)
    await closing
    assert await double.idle()
