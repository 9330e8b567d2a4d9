"""The InvokeAI adapter, on a server that speaks its protocol. tests/slow/test_invokeai_real.py runs it on InvokeAI itself."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
from PIL import Image

from schemas.frames import Progress
from schemas.jobs import Capability
from tests.backends.adapter_contract import AdapterContract, AdapterRig, eventually, outputs_of
from tests.backends.doubles.invokeai import InvokeAIDouble, jpeg, png
from workers.adapter_kit.images.responses import EDITS, GENERATIONS
from workers.backends.base import (
    BackendConfig,
    BackendError,
    BackendRefused,
    BackendUnavailable,
    Chunk,
    Finish,
    ModelNotServed,
    Task,
    UploadedFile,
)
from workers.backends.invokeai.adapter import InvokeAIBackend

JSON = dict[str, Any]


@pytest.fixture
async def invoke() -> AsyncIterator[InvokeAIDouble]:
    async with InvokeAIDouble() as double:
        yield double


@pytest.fixture
async def backend(invoke: InvokeAIDouble) -> AsyncIterator[InvokeAIBackend]:
    backend = InvokeAIBackend(BackendConfig(url=invoke.url))
    yield backend
    await backend.close()


def task(model: str = "dream", stream: bool = False, files: tuple[UploadedFile, ...] = (), **fields: Any) -> Task:
    body = {"model": model, "prompt": "a lighthouse", "seed": 7, "steps": 3, "size": "64x64"} | fields
    endpoint = EDITS if files else GENERATIONS
    return Task("job_1", "req_1", Capability.IMAGES, endpoint, model, model, stream, json.dumps(body).encode(), files)


def file(field: str, data: bytes, content_type: str = "image/png") -> UploadedFile:
    async def pieces() -> AsyncIterator[bytes]:
        yield data

    return UploadedFile(field, f"{field}.png", content_type, len(data), pieces)


def image(width: int = 64, height: int = 64) -> UploadedFile:
    return file("image", png(width, height, 1))


def mask() -> UploadedFile:
    out = io.BytesIO()
    Image.new("RGBA", (64, 64), (0, 0, 0, 0)).save(out, "PNG")
    return file("mask", out.getvalue())


def answer_of(chunks: list[Chunk]) -> JSON:
    answer: JSON = json.loads(b"".join(chunk.data for chunk in chunks))
    return answer


def pictures_in(chunks: list[Chunk]) -> list[bytes]:
    return [base64.b64decode(item["b64_json"]) for item in answer_of(chunks)["data"]]


async def made_by(backend: InvokeAIBackend, work: Task) -> list[bytes]:
    return pictures_in((await outputs_of(backend, work))[0])


class TestContract(AdapterContract):
    @pytest.fixture
    async def rig(self, invoke: InvokeAIDouble, backend: InvokeAIBackend) -> AdapterRig:
        def check(chunks: list[Chunk], finish: Finish) -> None:
            assert pictures_in(chunks) == [png(64, 64, 7)]
            assert finish.content_type == "application/json"

        async def idle() -> bool:
            return not invoke.working

        return AdapterRig(
            backend=backend,
            capability=Capability.IMAGES,
            short=task(),
            check=check,
            long=task(steps=1000, n=2),
            bad=task(size="65x64"),
            idle=idle,
            kill=invoke.kill,
            start=invoke.start,
            progress=True,
        )


async def test_only_models_with_a_graph_are_offered(invoke: InvokeAIDouble, backend: InvokeAIBackend) -> None:
    """Main models of known kinds; a second one of the same name goes by its key; one job at a time."""
    invoke.models.append(invoke.models[1] | {"key": "key-other", "name": "dream"})
    found = await backend.discover()
    assert [offer.name for offer in found.models] == ["dream", "dream-xl", "flux-dev", "flux-schnell", "key-other"]
    assert found.slots == 1


async def test_configured_models_must_be_there(invoke: InvokeAIDouble) -> None:
    """Only they are offered; one that is missing is named."""
    backend = InvokeAIBackend(BackendConfig(url=invoke.url, models=("dream-xl",)))
    assert [offer.name for offer in (await backend.discover()).models] == ["dream-xl"]
    with pytest.raises(ModelNotServed):
        await made_by(backend, task("dream"))
    await backend.close()
    backend = InvokeAIBackend(BackendConfig(url=invoke.url, models=("dreem",)))
    with pytest.raises(BackendError, match="lacks dreem; it has dream, dream-xl"):
        await backend.discover()
    await backend.close()


@pytest.mark.parametrize("options", [{"keep": "true"}, {"keep_images": "maybe"}])
def test_options_that_make_no_sense_are_refused(options: dict[str, str]) -> None:
    """At once, not at the first job."""
    with pytest.raises(ValueError, match="keep_images"):
        InvokeAIBackend(BackendConfig(url="http://127.0.0.1:1", options=options))


@pytest.mark.parametrize(
    ("model", "loader"),
    [
        ("dream", "main_model_loader"),
        ("dream-xl", "sdxl_model_loader"),
        ("flux-dev", "flux_model_loader"),
        ("flux-schnell", "flux_model_loader"),
    ],
)
async def test_the_graph_fits_the_model(
    invoke: InvokeAIDouble, backend: InvokeAIBackend, model: str, loader: str
) -> None:
    """From text, from a picture, and with a mask."""
    assert await made_by(backend, task(model)) == [png(64, 64, 7)]
    assert await made_by(backend, task(model, files=(image(),))) == [png(64, 64, 7)]
    assert await made_by(backend, task(model, files=(image(), mask()))) == [png(64, 64, 7)]
    assert {batch["graph"]["nodes"]["loader"]["type"] for batch in invoke.batches} == {loader}


async def test_one_picture_per_seed_in_their_order(invoke: InvokeAIDouble, backend: InvokeAIBackend) -> None:
    """The seeds follow the first, around the end of InvokeAI's range, and are told."""
    chunks, _, _ = await outputs_of(backend, task(n=3, seed=2**32 - 2))
    seeds = [2**32 - 2, 2**32 - 1, 0]
    assert pictures_in(chunks) == [png(64, 64, seed) for seed in seeds]
    assert [item["seed"] for item in answer_of(chunks)["data"]] == seeds
    assert len(invoke.batches) == 1


async def test_without_a_seed_every_answer_is_another(backend: InvokeAIBackend) -> None:
    """And says its seed, so that it can be had again."""
    answers = [answer_of((await outputs_of(backend, task(seed=None)))[0]) for _ in range(2)]
    first, second = (answer["data"][0]["seed"] for answer in answers)
    assert first != second


async def test_what_is_asked_for_reaches_the_nodes(invoke: InvokeAIDouble, backend: InvokeAIBackend) -> None:
    """Prompts, steps, guidance and size, each where the model's nodes have them."""
    await made_by(backend, task(negative_prompt="fog", guidance=3.5))
    nodes = invoke.batches[0]["graph"]["nodes"]
    assert (nodes["positive"]["prompt"], nodes["negative"]["prompt"]) == ("a lighthouse", "fog")
    assert (nodes["denoise"]["steps"], nodes["denoise"]["cfg_scale"]) == (3, 3.5)
    assert (nodes["noise"]["width"], nodes["noise"]["height"]) == (64, 64)
    await made_by(backend, task("flux-dev", guidance=2))
    nodes = invoke.batches[1]["graph"]["nodes"]
    assert (nodes["denoise"]["num_steps"], nodes["denoise"]["guidance"]) == (3, 2)


async def test_what_is_not_asked_for_is_the_models_own(invoke: InvokeAIDouble, backend: InvokeAIBackend) -> None:
    """The operator's defaults for the model come before ours."""
    invoke.step_s = 0
    plain = task(size=None, steps=None)
    await made_by(backend, plain)
    nodes = invoke.batches[0]["graph"]["nodes"]
    assert (nodes["noise"]["width"], nodes["denoise"]["steps"], nodes["denoise"]["cfg_scale"]) == (512, 30, 7.5)
    invoke.models[0]["default_settings"] = {"width": 640, "height": 384, "steps": 9, "cfg_scale": 5, "scheduler": "lcm"}
    await backend.discover()
    await made_by(backend, plain)
    nodes = invoke.batches[1]["graph"]["nodes"]
    assert (nodes["noise"]["width"], nodes["noise"]["height"]) == (640, 384)
    assert (nodes["denoise"]["steps"], nodes["denoise"]["cfg_scale"]) == (9, 5)
    assert nodes["denoise"]["scheduler"] == "lcm"
    await made_by(backend, replace(plain, model="flux-schnell"))
    assert invoke.batches[2]["graph"]["nodes"]["denoise"]["num_steps"] == 4


@pytest.mark.parametrize(
    ("model", "fields", "param", "words"),
    [
        ("dream", {"size": "101x64"}, "size", "nearest size is 104x64"),
        ("flux-dev", {"size": "72x64"}, "size", "nearest size is 64x64"),
        ("dream", {"size": "8x64"}, "size", "nearest size is 64x64"),
        ("dream", {"guidance": 0.5}, "guidance", "1 or more"),
        ("dream", {"seed": 2**32}, "seed", "4294967295"),
        ("dream", {"style": "vivid"}, "style", "describe it in the prompt"),
        ("dream", {"strength": 0.5}, "strength", "strength"),
        ("flux-dev", {"negative_prompt": "fog"}, "negative_prompt", "negative_prompt"),
        ("flux-schnell", {"guidance": 3}, "guidance", "guidance"),
    ],
)
async def test_what_the_model_cannot_do_is_refused(
    invoke: InvokeAIDouble, backend: InvokeAIBackend, model: str, fields: JSON, param: str, words: str
) -> None:
    """Before InvokeAI hears of it, naming the field."""
    with pytest.raises(BackendRefused, match=words) as caught:
        await made_by(backend, task(model, **fields))
    assert caught.value.info.param == param
    assert not invoke.batches


async def test_missing_parts_of_flux_are_named(invoke: InvokeAIDouble, backend: InvokeAIBackend) -> None:
    """All of them, before anything is uploaded; a pipeline that brings its own needs none."""
    invoke.models = [model for model in invoke.models if model["key"] not in ("key-t5", "key-vae")]
    with pytest.raises(BackendRefused, match="lacks what flux-dev needs: a T5 encoder, a FLUX VAE"):
        await made_by(backend, task("flux-dev", files=(image(),)))
    assert not invoke.uploads
    invoke.models[2]["format"] = "sdnq_quantized"
    await backend.discover()
    assert await made_by(backend, task("flux-dev")) == [png(64, 64, 7)]
    assert "t5_encoder_model" not in invoke.batches[0]["graph"]["nodes"]["loader"]


async def test_an_edit_has_the_pictures_size_or_less(invoke: InvokeAIDouble, backend: InvokeAIBackend) -> None:
    """In the multiples that the model needs; a large picture is made as large as the model's own."""
    await made_by(backend, task(files=(image(100, 75),), size="auto"))
    await made_by(backend, task(files=(image(2048, 1024),), size="auto"))
    sizes = [(b["graph"]["nodes"]["noise"]["width"], b["graph"]["nodes"]["noise"]["height"]) for b in invoke.batches]
    assert sizes == [(96, 72), (720, 360)]


async def test_strength_says_how_much_changes(invoke: InvokeAIDouble, backend: InvokeAIBackend) -> None:
    """By default three quarters without a mask, and everything where a mask is transparent."""
    for files in ((image(),), (image(), mask())):
        await made_by(backend, task(files=files))
    await made_by(backend, task(files=(image(),), strength=0.25))
    starts = [batch["graph"]["nodes"]["denoise"]["denoising_start"] for batch in invoke.batches]
    assert starts == [0.25, 0.0, 0.75]


async def test_kontext_looks_at_the_picture(invoke: InvokeAIDouble, backend: InvokeAIBackend) -> None:
    """It begins with noise, so it can honor neither strength nor mask."""
    invoke.models[2]["name"] = "FLUX.1 Kontext dev"
    await backend.discover()
    await made_by(backend, task("FLUX.1 Kontext dev", files=(image(),)))
    nodes = invoke.batches[0]["graph"]["nodes"]
    assert nodes["reference"]["image"] == {"image_name": invoke.uploads[0]}
    assert "encode" not in nodes
    with pytest.raises(BackendRefused, match="strength"):
        await made_by(backend, task("FLUX.1 Kontext dev", files=(image(),), strength=0.5))
    with pytest.raises(BackendRefused, match="mask"):
        await made_by(backend, task("FLUX.1 Kontext dev", files=(image(), mask())))


@pytest.mark.parametrize("field", ["image", "mask"])
async def test_an_upload_that_is_no_picture_is_refused(
    invoke: InvokeAIDouble, backend: InvokeAIBackend, field: str
) -> None:
    """Naming the file."""
    files = (file("image", b"nonsense"),) if field == "image" else (image(), file("mask", b"nonsense"))
    with pytest.raises(BackendRefused, match=field) as caught:
        await made_by(backend, task(files=files))
    assert caught.value.info.param == field
    assert not invoke.images


async def test_a_picture_without_a_content_type_is_taken(backend: InvokeAIBackend) -> None:
    """Clients do not all say what they send."""
    files = (file("image", png(64, 64, 1), "application/octet-stream"),)
    assert await made_by(backend, task(files=files)) == [png(64, 64, 7)]


async def test_nothing_is_left_in_the_gallery(invoke: InvokeAIDouble, backend: InvokeAIBackend) -> None:
    """Neither results nor uploads nor what was made on the way; nor does any of it ever show."""
    await made_by(backend, task(files=(image(), mask()), n=2))
    assert not invoke.images
    assert all(invoke.intermediate.values())


async def test_results_are_kept_where_the_operator_wants_them(invoke: InvokeAIDouble) -> None:
    """The results alone."""
    backend = InvokeAIBackend(BackendConfig(url=invoke.url, options={"keep_images": "true"}))
    await made_by(backend, task(files=(image(), mask()), n=2))
    assert len(invoke.images) == 2
    assert not any(invoke.intermediate[name] for name in invoke.images)
    await backend.close()


async def test_says_how_far_all_pictures_are(backend: InvokeAIBackend) -> None:
    """Loading, then fractions that rise to one over all of them, with previews."""
    _, progress, _ = await outputs_of(backend, task(n=2, steps=8))
    fractions = [output.fraction for output in progress if output.fraction is not None]
    assert fractions == sorted(fractions)
    assert fractions[0] < 0.5 < fractions[-1] <= 1
    assert any(output.preview == jpeg() for output in progress)
    assert [output.phase for output in progress if output.phase == "load"]
    assert all(output.phase != "load" for output in progress if output.fraction)


async def test_previews_reach_a_stream(backend: InvokeAIBackend) -> None:
    """As many as asked for, before the picture."""
    chunks, _, finish = await outputs_of(backend, task(stream=True, partial_images=1, steps=20))
    events = [json.loads(frame.split(b"data: ")[1]) for frame in b"".join(c.data for c in chunks).split(b"\n\n")[:-1]]
    kinds = [event["type"] for event in events]
    assert kinds == ["image_generation.partial_image", "image_generation.completed"]
    assert finish.content_type == "text/event-stream"


async def test_waiting_within_invokeai_is_said(invoke: InvokeAIDouble, backend: InvokeAIBackend) -> None:
    """A job that waits for another one's pictures is queued; giving it up takes it out of the queue, and leaves the other."""
    first = asyncio.create_task(outputs_of(backend, task(steps=1000)))
    await eventually(lambda: _working(invoke), 10)
    async for output in (second := backend.run(task())):
        assert output == Progress(phase="queued")
        break
    await second.aclose()
    assert [item.status for item in invoke.items.values()] == ["in_progress", "canceled"]
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first


async def test_closing_waits_for_the_step_that_runs(invoke: InvokeAIDouble, backend: InvokeAIBackend) -> None:
    """InvokeAI calls an item cancelled while it still works on it: the slot is free only when it has stopped."""
    outputs = backend.run(task(steps=1000, n=2))
    async for output in outputs:
        if isinstance(output, Progress) and output.fraction:
            break
    invoke.step_s = 0.3
    await outputs.aclose()
    assert not invoke.working
    assert [item.status for item in invoke.items.values()] == ["canceled", "canceled"]
    assert not invoke.images


async def test_being_cancelled_while_enqueueing_leaves_nothing_in_the_queue(
    invoke: InvokeAIDouble, backend: InvokeAIBackend
) -> None:
    """What InvokeAI has taken in by then is cancelled too."""
    invoke.enqueue_gate = asyncio.Event()
    running = asyncio.create_task(outputs_of(backend, task(steps=1000)))
    await invoke.enqueuing.wait()
    running.cancel()
    await asyncio.sleep(0)
    invoke.enqueue_gate.set()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert [item.status for item in invoke.items.values()] == ["canceled"]


async def test_without_socket_io_the_queue_is_asked(
    invoke: InvokeAIDouble, backend: InvokeAIBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures are the same; of progress, only signs of life are left."""
    monkeypatch.setattr("workers.backends.invokeai.queue.POLL_INTERVAL_S", 0.01)
    await invoke.kill()
    invoke.deaf = True
    await invoke.start()
    chunks, progress, _ = await outputs_of(backend, task(steps=50))
    assert pictures_in(chunks) == [png(64, 64, 7)]
    assert Progress() in progress
    assert not any(output.fraction for output in progress)


async def test_a_lost_connection_for_events_does_not_fail_the_job(
    invoke: InvokeAIDouble, backend: InvokeAIBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on by asking."""
    monkeypatch.setattr("workers.backends.invokeai.queue.POLL_INTERVAL_S", 0.01)
    invoke.hangs_up_at = 2
    assert await made_by(backend, task(steps=10)) == [png(64, 64, 7)]
    assert invoke.listeners == 1


async def test_lost_events_do_not_stall_the_job(
    invoke: InvokeAIDouble, backend: InvokeAIBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The queue is asked now and then though Socket.IO is connected."""
    monkeypatch.setattr("workers.backends.invokeai.queue.POLL_INTERVAL_WITH_EVENTS_S", 0.05)
    invoke.silent = True
    assert await made_by(backend, task()) == [png(64, 64, 7)]


@pytest.mark.parametrize(
    ("kind", "message", "error", "transient"),
    [
        ("OutOfMemoryError", "CUDA out of memory. Tried to allocate 2 GiB", BackendError, True),
        ("RuntimeError", "DefaultCPUAllocator: can't allocate memory", BackendError, True),
        ("NodeInputError", "denoise: cfg_scale must be greater than 1", BackendRefused, False),
        ("Exception", "Unknown model key-sd", ModelNotServed, False),
        ("RuntimeError", "mat1 and mat2 shapes cannot be multiplied", BackendError, False),
    ],
)
async def test_late_failures_are_told_apart(
    invoke: InvokeAIDouble,
    backend: InvokeAIBackend,
    kind: str,
    message: str,
    error: type[BackendError],
    transient: bool,
) -> None:
    """By what InvokeAI says of the failed item; the rest of the batch is taken back."""
    invoke.fails = (kind, message)
    with pytest.raises(BackendError) as caught:
        await made_by(backend, task(n=2))
    assert type(caught.value) is error
    assert caught.value.transient is transient
    assert message in caught.value.info.message
    assert [item.status for item in invoke.items.values()] == ["failed", "canceled"]


async def test_a_model_removed_meanwhile_is_not_found(invoke: InvokeAIDouble, backend: InvokeAIBackend) -> None:
    """InvokeAI takes any key, and fails later."""
    await backend.discover()
    invoke.models = []
    with pytest.raises(ModelNotServed, match="Unknown model key-sd"):
        await made_by(backend, task())


async def test_cancelled_at_invokeai(invoke: InvokeAIDouble, backend: InvokeAIBackend) -> None:
    """Somebody who cancels the job there means it: it is not tried again."""
    running = asyncio.create_task(outputs_of(backend, task(steps=1000)))
    await eventually(lambda: _working(invoke), 10)
    await invoke.end(invoke.items[1], "canceled")
    with pytest.raises(BackendError, match="canceled in InvokeAI") as caught:
        await running
    assert not caught.value.transient


async def test_deleted_at_invokeai(invoke: InvokeAIDouble, backend: InvokeAIBackend) -> None:
    """It is not tried again, and what is left of the batch is taken back."""
    running = asyncio.create_task(outputs_of(backend, task(steps=1000, n=3)))
    await eventually(lambda: _working(invoke), 10)
    invoke.items.pop(2)
    item = invoke.items.pop(1)
    await invoke.end(item, "canceled")
    with pytest.raises(BackendError, match="deleted from InvokeAI's queue") as caught:
        await running
    assert not caught.value.transient
    assert invoke.items[3].status == "canceled"


async def test_a_full_queue_is_worth_another_attempt(invoke: InvokeAIDouble, backend: InvokeAIBackend) -> None:
    """Later, or elsewhere."""
    invoke.full = True
    with pytest.raises(BackendUnavailable, match="queue is full"):
        await made_by(backend, task())


async def test_multi_user_mode_takes_the_key(invoke: InvokeAIDouble) -> None:
    """For the API and for events; without it, the error says what is wrong and not the key."""
    invoke.token = "secret"
    backend = InvokeAIBackend(BackendConfig(url=invoke.url, api_key="secret"))
    _, progress, _ = await outputs_of(backend, task())
    assert any(output.fraction for output in progress)
    await backend.close()
    backend = InvokeAIBackend(BackendConfig(url=invoke.url, api_key="wrong"))
    with pytest.raises(BackendError, match="refused the worker's key"):
        await backend.discover()
    await backend.close()


async def _working(invoke: InvokeAIDouble) -> bool:
    return invoke.working
