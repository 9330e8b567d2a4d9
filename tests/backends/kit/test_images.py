"""The request, the answer and the formats that image adapters share, and the gateway's reading of a request."""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import AsyncGenerator
from dataclasses import replace
from io import BytesIO
from typing import Any

import pytest
from openai.types import (
    ImageEditCompletedEvent,
    ImageEditPartialImageEvent,
    ImageGenCompletedEvent,
    ImageGenPartialImageEvent,
    ImagesResponse,
)
from PIL import Image
from pydantic import ValidationError

from schemas.frames import MAX_PREVIEW, Progress
from schemas.openai.images import ImageEditRequest, ImageGenerationRequest
from tests.backends.image_tasks import answer_of, events_of, file_of, image_of, image_task, picture_bytes
from workers.adapter_kit.images.responses import (
    GeneratedImage,
    ImageRequest,
    authorization_header,
    make_edit_mask,
    make_preview,
    read_size,
    respond_with_images,
)
from workers.backends.base import BackendError, BackendRefused, Chunk, Finish, Task

PNG = picture_bytes((40, 30))


def request_of(**fields: Any) -> ImageRequest:
    return ImageRequest.from_task(image_task("m", **fields))


def noise(side: int) -> bytes:
    """Return an image that does not compress."""
    out = BytesIO()
    Image.effect_noise((side, side), 80).save(out, "PNG")
    return out.getvalue()


async def outputs(work: Task, *items: Progress | GeneratedImage) -> tuple[list[Chunk], list[Progress], Finish]:
    async def pictures() -> AsyncGenerator[Progress | GeneratedImage]:
        for item in items:
            yield item

    got = [output async for output in respond_with_images(work, ImageRequest.from_task(work), pictures())]
    finish = got.pop()
    assert isinstance(finish, Finish)
    chunks = [output for output in got if isinstance(output, Chunk)]
    return chunks, [output for output in got if isinstance(output, Progress)], finish


# Requests


def test_a_request_says_what_it_wants() -> None:
    request = request_of(size="64x48", n=2, seed=2**64 - 1, cfg_scale=7.5, output_format="jpeg", output_compression=80)
    assert (request.width, request.height, request.size, request.n) == (64, 48, "64x48", 2)
    assert (request.seed_for(0), request.seed_for(1)) == (2**64 - 1, 0)
    assert (request.guidance, request.output_format, request.output_compression) == (7.5, "jpeg", 80)
    assert request.response_format == "b64_json"


def case_name(value: object) -> str:
    """Return a test's name, the same in every process."""
    if isinstance(value, dict) and "files" in value:
        return "files=" + "+".join(file.field for file in value["files"])
    return str(value)


@pytest.mark.parametrize("fields", [{"size": "auto", "seed": -1}, {"size": None, "seed": None}, {}])
def test_what_is_left_open_is_the_backends_choice(fields: dict[str, Any]) -> None:
    request = request_of(user="me", quality="auto", background="opaque", moderation="low", **fields)
    assert (request.width, request.height, request.seed) == (None, None, None)
    request.require_supported()


def test_a_forms_numbers_are_text() -> None:
    request = request_of(files=(file_of("image", PNG),), n="3", seed="5", strength="0.25", partial_images="1")
    assert (request.n, request.seed, request.strength, request.partial_images) == (3, 5, 0.25, 1)
    assert request.edit
    with pytest.raises(BackendRefused):
        request_of(n="3")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": ["a"]}, "prompt"),
        ({"prompt": "x" * 32_001}, "prompt"),
        ({"n": 0}, "n"),
        ({"n": 11}, "n"),
        ({"n": True}, "n"),
        ({"n": 1.5}, "n"),
        ({"size": "64"}, "size"),
        ({"size": "0x64"}, "size"),
        ({"size": "99999x64"}, "size"),
        ({"seed": "x"}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"output_format": "gif"}, "output_format"),
        ({"response_format": "file"}, "response_format"),
        ({"output_compression": 50}, "output_compression"),
        ({"partial_images": 4}, "partial_images"),
        ({"stream": True, "response_format": "url"}, "response_format"),
        ({"files": (file_of("picture", PNG),)}, "picture"),
        ({"files": (file_of("mask", PNG),)}, "image"),
        ({"files": (file_of("image", PNG), file_of("mask", PNG), file_of("mask", PNG))}, "mask"),
    ],
    ids=case_name,
)
def test_a_request_that_makes_no_sense_is_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(BackendRefused) as caught:
        request_of(**fields)
    assert (caught.value.info.status, caught.value.info.param) == (400, param)


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"seed": 1}, "seed", "prompt, n, size, steps"),
        ({"quality": "hd"}, "quality", "steps"),
        ({"background": "transparent"}, "background", "opaque"),
        ({"sampler": "heun"}, "sampler", "size"),
        ({"files": (file_of("image", PNG),)}, "image", "generations"),
    ],
    ids=case_name,
)
def test_what_a_backend_cannot_do_is_refused_with_what_it_can(fields: dict[str, Any], param: str, says: str) -> None:
    request = request_of(**fields)
    with pytest.raises(BackendRefused, match=says) as caught:
        request.require_supported("size", "steps")
    assert caught.value.info.param == param
    request.require_supported("seed", "quality", "background", "sampler", "edit")


def test_another_endpoint_is_refused() -> None:
    with pytest.raises(BackendRefused, match="/v1/chat"):
        ImageRequest.from_task(replace(image_task("m"), endpoint="/v1/chat/completions"))


# Answers


async def test_an_answer_has_openais_shape_and_goes_out_in_pieces() -> None:
    big = noise(800)
    chunks, _, finish = await outputs(
        image_task("m", n=2), GeneratedImage(big, seed=4), GeneratedImage(PNG, revised_prompt='a "cat"')
    )
    assert max(len(chunk.data) for chunk in chunks) <= 256 * 1024
    assert sum(chunk.tokens for chunk in chunks) == 2
    answer = answer_of(chunks)
    assert [base64.b64decode(picture["b64_json"]) for picture in answer["data"]] == [big, PNG]
    assert (answer["data"][0]["seed"], answer["data"][1]["revised_prompt"]) == (4, 'a "cat"')
    assert (answer["output_format"], answer.keys() & {"size", "quality", "background"}) == ("png", set())
    assert ImagesResponse.model_validate(answer).created > 0
    assert finish.content_type == "application/json"


@pytest.mark.parametrize(("output_format", "kind"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
@pytest.mark.parametrize("made", ["PNG", "JPEG", "WEBP"])
async def test_formats_are_converted(made: str, output_format: str, kind: str) -> None:
    data = picture_bytes((40, 30), made)
    chunks, _, _ = await outputs(image_task("m", output_format=output_format), GeneratedImage(data))
    image = image_of(answer_of(chunks)["data"][0])
    assert (image.format, image.size) == (kind, (40, 30))
    if made == kind:
        assert base64.b64decode(answer_of(chunks)["data"][0]["b64_json"]) == data


async def test_a_jpeg_has_white_behind_what_is_transparent_and_the_quality_asked_for() -> None:
    clear = picture_bytes((8, 8), mode="RGBA", color=(0, 0, 0, 0))
    chunks, _, _ = await outputs(image_task("m", output_format="jpeg"), GeneratedImage(clear))
    assert image_of(answer_of(chunks)["data"][0]).getpixel((4, 4)) == (255, 255, 255)
    rough, fine = [
        (await outputs(image_task("m", output_format="jpeg", output_compression=quality), GeneratedImage(noise(64))))[0]
        for quality in (10, 90)
    ]
    assert len(answer_of(rough)["data"][0]["b64_json"]) < len(answer_of(fine)["data"][0]["b64_json"])


async def test_urls_are_what_the_worker_keeps() -> None:
    kept: list[tuple[bytes, str]] = []

    async def store_file(data: bytes, content_type: str) -> str:
        kept.append((data, content_type))
        return f"kept:{len(kept)}"

    work = replace(image_task("m", response_format="url", output_format="webp", n=2), store_file=store_file)
    chunks, _, _ = await outputs(work, GeneratedImage(PNG), GeneratedImage(PNG, seed=3))
    assert answer_of(chunks)["data"] == [{"url": "kept:1"}, {"url": "kept:2", "seed": 3}]
    assert [content_type for _, content_type in kept] == ["image/webp"] * 2
    assert Image.open(BytesIO(kept[0][0])).format == "WEBP"


@pytest.mark.parametrize("edit", [False, True])
async def test_a_stream_has_openais_events(edit: bool) -> None:
    files = (file_of("image", PNG),) if edit else ()
    work = image_task("m", files=files, stream=True, partial_images=1, output_format="webp")
    preview = GeneratedImage(PNG, final=False)
    chunks, progress, finish = await outputs(
        work, Progress(fraction=0.1), preview, Progress(fraction=0.5), preview, preview, GeneratedImage(PNG, seed=1)
    )
    assert [one.fraction for one in progress] == [0.1, 0.5]
    kind = "image_edit" if edit else "image_generation"
    (first, partial), (last, completed) = events_of(chunks)
    assert (first, last) == (f"{kind}.partial_image", f"{kind}.completed")
    partials, ends = (
        (ImageEditPartialImageEvent, ImageEditCompletedEvent)
        if edit
        else (ImageGenPartialImageEvent, ImageGenCompletedEvent)
    )
    assert partials.model_validate(partial).partial_image_index == 0
    assert ends.model_validate(completed).size == "auto"
    assert image_of(completed).size == (40, 30)
    assert image_of(completed).format == image_of(partial).format == "WEBP"
    assert finish.content_type == "text/event-stream"


async def test_previews_are_spread_over_the_work() -> None:
    items: list[Progress | GeneratedImage] = []
    for step in range(1, 11):
        items += [Progress(fraction=step / 10), GeneratedImage(picture_bytes((step, 1)), final=False)]
    work = image_task("m", stream=True, partial_images=3)
    chunks, _, _ = await outputs(work, *items, GeneratedImage(PNG))
    assert [image_of(data).size for _, data in events_of(chunks)] == [(3, 1), (5, 1), (8, 1), (40, 30)]


async def test_fewer_pictures_than_asked_for_is_a_failure() -> None:
    with pytest.raises(BackendError, match="1 of 2"):
        await outputs(image_task("m", n=2), GeneratedImage(PNG))
    with pytest.raises(BackendError, match="cannot be read"):
        await outputs(image_task("m", output_format="webp"), GeneratedImage(b"nothing"))


async def test_closing_the_answer_closes_what_makes_the_pictures() -> None:
    closed = False

    async def pictures() -> AsyncGenerator[Progress | GeneratedImage]:
        nonlocal closed
        try:
            yield Progress()
            yield GeneratedImage(PNG)
        finally:
            closed = True

    work = image_task("m")
    output = respond_with_images(work, ImageRequest.from_task(work), pictures())
    await anext(output)
    await output.aclose()
    assert closed


async def test_without_pillow_only_what_needs_converting_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    chunks, _, _ = await outputs(image_task("m", size="40x30"), GeneratedImage(PNG))
    assert "size" not in answer_of(chunks)
    with pytest.raises(BackendRefused, match="the model makes png") as caught:
        await outputs(image_task("m", output_format="jpeg"), GeneratedImage(PNG))
    assert (caught.value.info.status, caught.value.info.param) == (400, "output_format")


# Formats


async def test_previews_are_made_small_enough() -> None:
    small = await make_preview(PNG, "image/png")
    assert small == f"data:image/png;base64,{base64.b64encode(PNG).decode()}"
    shrunk = await make_preview(noise(900), "image/png")
    assert shrunk is not None
    assert len(shrunk) <= MAX_PREVIEW
    assert shrunk.startswith("data:image/jpeg;base64,")
    assert await make_preview(b"x" * MAX_PREVIEW, "image/png") is None


async def test_a_mask_is_white_where_it_was_transparent() -> None:
    mask = picture_bytes((4, 4), mode="RGBA", color=(9, 9, 9, 0))
    assert Image.open(BytesIO(await make_edit_mask(mask))).getpixel((1, 1)) == 255
    mask = picture_bytes((4, 4), mode="RGBA", color=(9, 9, 9, 128))
    assert Image.open(BytesIO(await make_edit_mask(mask))).getpixel((1, 1)) == 0
    for wrong in (PNG, b"nothing"):
        with pytest.raises(BackendRefused) as caught:
            await make_edit_mask(wrong)
        assert caught.value.info.param == "mask"


async def test_sizes() -> None:
    assert await read_size(PNG) == (40, 30)
    assert await read_size(b"nothing") is None


def test_keys() -> None:
    assert authorization_header("") == {}
    assert authorization_header("key") == {"authorization": "Bearer key"}
    assert authorization_header("u:p") == {"authorization": "Basic dTpw"}


# What the gateway reads


def test_generations_are_strict_and_pass_on_what_they_do_not_know() -> None:
    body = {"model": "m", "prompt": "x", "n": 2, "stream": True, "steps": 9}
    request = ImageGenerationRequest.model_validate_json(json.dumps(body))
    assert (request.n, request.stream, request.model_extra) == (2, True, {"steps": 9})


@pytest.mark.parametrize(
    "wrong",
    [
        {"n": "2"},
        {"n": 11},
        {"model": ""},
        {"prompt": None},
        {"size": "big"},
        {"stream": "yes"},
        {"partial_images": 4},
        {"output_format": "gif"},
        {"response_format": "file"},
        {"service_tier": "best"},
        {"seed": 2**64},
    ],
    ids=str,
)
def test_generations_that_make_no_sense_are_refused_before_they_are_queued(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        ImageGenerationRequest.model_validate_json(json.dumps({"model": "m", "prompt": "x"} | wrong))
    assert [error["loc"][0] for error in caught.value.errors()] == list(wrong)


def test_edits_take_text_for_numbers() -> None:
    fields = {"model": "m", "prompt": "x", "n": "2", "stream": "true", "seed": "5", "partial_images": "1"}
    request = ImageEditRequest.model_validate(fields)
    assert (request.n, request.stream, request.seed, request.partial_images) == (2, True, 5, 1)
    for wrong in ({"n": "two"}, {"n": ["1", "2"]}, {"stream": "perhaps"}, {"prompt": ""}):
        with pytest.raises(ValidationError) as caught:
            ImageEditRequest.model_validate(fields | wrong)
        assert [error["loc"][0] for error in caught.value.errors()] == list(wrong)
