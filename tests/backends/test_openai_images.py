"""Pictures of OpenAI-style servers: the number, the format and the fields that the caller gets, whatever the server does."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from io import BytesIO
from typing import Any, Literal

import pytest
from openai.types import ImageGenCompletedEvent, ImagesResponse
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tests.backends.image_tasks import answer_of, events_of, image_of, image_task
from tests.backends.kit.test_limitations import Answer, Quirky, refused
from workers.backends.base import (
    Adaptation,
    Backend,
    BackendConfig,
    BackendError,
    BackendRefused,
    Chunk,
    Finish,
    Task,
    make_backend,
)

JSON = dict[str, Any]
SIZES = Literal["1024x1024", "1024x1536", "1536x1024"]


class Painter(Quirky):
    """An image server of few gifts."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 10
        self.makes = "PNG"
        self.size = (1024, 1024)
        self.more: JSON = {}
        self.written = "{}"
        """How it writes base64."""
        self.metadata: PngInfo | None = None
        self.painted = ""
        """The base64 of the last picture."""
        self.refuses_n = ""
        self.quirk = self._painted

    def _painted(self, path: str, body: JSON) -> Answer:
        if "/images/" not in path:
            return None
        if self.refuses_n and body.get("n", 1) != 1:
            return refused(self.refuses_n)
        for name in self.media.refuses:
            if name in body:
                return refused(f"Unknown parameter: '{name}'.", name)
        out = BytesIO()
        Image.new("RGB", self.size, "red").save(out, self.makes, pnginfo=self.metadata)
        coded = self.painted = base64.b64encode(out.getvalue()).decode()
        count = min(self.most, int(body.get("n") or 1))
        usage: dict[str, Any] = {"input_tokens": 1, "output_tokens": count, "total_tokens": 1 + count}
        usage |= {"input_tokens_details": {"image_tokens": 0, "text_tokens": 1}}
        data = [{"b64_json": self.written.format(coded), "revised_prompt": "p", "mood": 7}] * count
        return 200, {"created": 7, "data": data, "usage": usage, **self.more}

    @property
    def asked(self) -> list[JSON]:
        return [seen.json for seen in self.seen if seen.method == "POST"]


@pytest.fixture
async def painter() -> AsyncIterator[Painter]:
    async with Painter() as double:
        yield double


@pytest.fixture
async def backend(painter: Painter) -> AsyncIterator[Backend]:
    made = make_backend("openai", BackendConfig(url=painter.url))
    yield made
    await made.close()


async def drawn(backend: Backend, task: Task) -> tuple[list[Chunk], tuple[str, ...]]:
    outputs = [output async for output in backend.run(task)]
    assert isinstance(outputs[-1], Finish)
    adapted = [one.parameters for one in outputs if isinstance(one, Adaptation)]
    return [one for one in outputs if isinstance(one, Chunk)], adapted[-1] if adapted else ()


@pytest.mark.parametrize("words", ["", "You must provide n=1 for this model.", "'n' must be 1"])
async def test_as_many_pictures_as_asked_for(painter: Painter, backend: Backend, words: str) -> None:
    """A server that makes one, or two, is asked for the rest; the usage is that of all requests."""
    painter.most, painter.refuses_n = 2, words
    chunks, adapted = await drawn(backend, image_task("sdxl", n=5, seed=3))
    answer = answer_of(chunks)
    assert (len(answer["data"]), adapted) == (5, ("n",))
    assert answer["usage"]["output_tokens"] == 5 if words else 2 + 2 + 1
    assert [body["seed"] for body in painter.asked[-2:]] == ([6, 7] if words else [5, 7])
    ImagesResponse.model_validate(answer)


@pytest.mark.parametrize("written", ["data:image/png;base64,{}", "{}\n", " {}\r\n"])
async def test_base64_however_it_is_written(painter: Painter, backend: Backend, written: str) -> None:
    painter.written = written
    chunks, _ = await drawn(backend, image_task("sdxl"))
    data = base64.b64decode(answer_of(chunks)["data"][0]["b64_json"], validate=True)
    assert Image.open(BytesIO(data)).format == "PNG"


@pytest.mark.parametrize("metadata_bytes", [0, 400_000])
async def test_an_image_in_the_requested_format_keeps_its_base64(
    painter: Painter, backend: Backend, metadata_bytes: int
) -> None:
    """The base64 of the server is passed on in pieces; the size is right also where metadata fills the image's first bytes."""
    painter.metadata = PngInfo()
    painter.metadata.add_text("workflow", "x" * metadata_bytes)
    chunks, _ = await drawn(backend, image_task("sdxl"))
    answer = answer_of(chunks)
    assert (answer["data"][0]["b64_json"], answer["size"]) == (painter.painted, "1024x1024")
    assert max(len(chunk.data) for chunk in chunks) <= 256 * 1024


@pytest.mark.parametrize("written", ["{}=", "{}A", "!!!!{}", "====", "=A==", "{}\u00e4\u00e4\u00e4\u00e4"])
async def test_an_image_that_is_not_base64_is_an_error(painter: Painter, backend: Backend, written: str) -> None:
    """A damaged image never reaches the caller."""
    painter.written = written
    with pytest.raises(BackendError, match="not base64"):
        await drawn(backend, image_task("sdxl"))


async def test_the_other_policy_refuses(painter: Painter, backend: Backend) -> None:
    painter.most = 1
    with pytest.raises(BackendRefused) as caught:
        await drawn(backend, replace(image_task("sdxl", n=2), adapt=False))
    assert (caught.value.info.code, caught.value.info.param) == ("unsupported_parameter", "n")
    for n in (11, 0):
        with pytest.raises(BackendRefused) as caught:
            await drawn(backend, image_task("sdxl", n=n))
        assert (caught.value.info.status, caught.value.info.param) == (400, "n")


async def test_a_server_that_honors_n_is_asked_once(painter: Painter, backend: Backend) -> None:
    chunks, adapted = await drawn(backend, image_task("sdxl", n=3))
    assert (len(answer_of(chunks)["data"]), adapted, len(painter.asked)) == (3, (), 1)


@pytest.mark.parametrize("makes", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("wanted", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("knows", [False, True], ids=["refuses the field", "ignores the field"])
async def test_the_format_that_was_asked_for(
    painter: Painter, backend: Backend, makes: str, wanted: str, knows: bool
) -> None:
    """Converted, where the server makes another; and the answer says what its pictures are."""
    painter.makes = makes
    if not knows:
        painter.media.refuses = ("output_format",)
    chunks, _ = await drawn(backend, image_task("sdxl", output_format=wanted))
    answer = answer_of(chunks)
    assert image_of(answer["data"][0]).format == wanted.upper()
    assert answer["output_format"] == wanted


@pytest.mark.parametrize("makes", ["PNG", "JPEG", "WEBP"])
async def test_who_names_no_format_gets_the_servers(painter: Painter, backend: Backend, makes: str) -> None:
    painter.makes = makes
    answer = answer_of((await drawn(backend, image_task("sdxl")))[0])
    assert (image_of(answer["data"][0]).format, answer["output_format"]) == (makes, makes.lower())


async def test_urls_are_of_the_format_too(painter: Painter, backend: Backend) -> None:
    kept: list[tuple[bytes, str]] = []

    async def store_file(data: bytes, content_type: str) -> str:
        kept.append((data[:4], content_type))
        return "kept"

    task = image_task("sdxl", output_format="webp", response_format="url")
    answer = answer_of((await drawn(backend, replace(task, store_file=store_file)))[0])
    assert (kept, answer["data"][0]["url"]) == ([(b"RIFF", "image/webp")], "kept")


async def test_what_the_server_says_beside_its_pictures_is_kept(painter: Painter, backend: Backend) -> None:
    painter.more = {"quality": "high", "background": "opaque", "cost": 0.04}
    answer = answer_of((await drawn(backend, image_task("sdxl")))[0])
    assert (answer["created"], answer["cost"], answer["quality"], answer["background"]) == (7, 0.04, "high", "opaque")
    assert (answer["size"], answer["data"][0]["mood"], answer["data"][0]["revised_prompt"]) == ("1024x1024", 7, "p")


@pytest.mark.parametrize("stream", [False, True])
async def test_words_that_openai_does_not_have_are_left_out(painter: Painter, backend: Backend, stream: bool) -> None:
    """Strict clients refuse the whole answer for one of them. A server's own word for the size is not believed."""
    painter.size = (640, 480)
    painter.more = {"quality": "hd", "background": "auto", "size": "1024x1024", "output_format": "tiff"}
    chunks, _ = await drawn(backend, image_task("sdxl", stream=stream))
    if stream:
        [(_, event)] = events_of(chunks)
        assert (event["size"], event["quality"], event["background"], event["output_format"]) == (
            "auto", "auto", "auto", "png",
        )  # fmt: skip
        ImageGenCompletedEvent.model_validate(event)
    else:
        answer = answer_of(chunks)
        assert not answer.keys() & {"size", "quality", "background"}
        assert answer["output_format"] == "png"


async def test_a_size_that_the_server_does_not_honor_is_named(painter: Painter, backend: Backend) -> None:
    painter.size = (512, 512)
    task = image_task("sdxl", size="1024x1024")
    assert (await drawn(backend, task))[1] == ("size",)
    with pytest.raises(BackendRefused) as caught:
        await drawn(backend, replace(task, adapt=False))
    assert (caught.value.info.code, caught.value.info.param) == ("unsupported_parameter", "size")
    assert (await drawn(backend, image_task("sdxl", size="512x512")))[1] == ()


async def test_a_stream_of_several_pictures(painter: Painter, backend: Backend) -> None:
    chunks, adapted = await drawn(backend, image_task("sdxl", n=3, stream=True, output_format="webp"))
    events = events_of(chunks)
    assert [(name, image_of(event).format, event["output_format"]) for name, event in events] == [
        ("image_generation.completed", "WEBP", "webp")
    ] * 3
    assert adapted == ("n",)
    with pytest.raises(BackendRefused):
        await drawn(backend, replace(image_task("sdxl", n=3, stream=True), adapt=False))


async def test_events_of_the_server_are_made_right(
    painter: Painter, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A format that it does not know, in fields that are not true."""
    out = BytesIO()
    Image.new("RGB", (1024, 1536), "red").save(out, "PNG")
    coded = base64.b64encode(out.getvalue()).decode()
    kinds = ("image_generation.partial_image", "image_generation.completed")
    sent = [
        {"type": kind, "b64_json": coded, "size": "9x9", "quality": "hd", "created_at": 5, "usage": {"total_tokens": 1}}
        for kind in kinds
    ]

    def events(_: JSON, edit: bool) -> tuple[str, list[bytes]]:
        return "text/event-stream", [b"data: %b\n\n" % json.dumps(event).encode() for event in sent]

    painter.quirk = lambda path, body: None
    monkeypatch.setattr(painter, "_images", events)
    chunks, _ = await drawn(backend, image_task("sdxl", stream=True, partial_images=1, output_format="jpeg"))
    found = events_of(chunks)
    assert [name for name, _ in found] == list(kinds)
    for _, event in found:
        assert (image_of(event).format, event["output_format"], event["size"]) == ("JPEG", "jpeg", "1024x1536")
        assert (event["quality"], event["created_at"], event["usage"]) == ("auto", 5, {"total_tokens": 1})
