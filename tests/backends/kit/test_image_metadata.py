"""Images without their metadata."""

from __future__ import annotations

import json
import struct
import zlib
from base64 import b64decode
from collections.abc import AsyncIterator
from io import BytesIO
from time import process_time
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps, PngImagePlugin

from schemas.frames import Progress
from tests.backends.adapter_contract import outputs_of
from tests.backends.doubles.comfyui import ComfyDouble
from tests.backends.doubles.invokeai import InvokeAIDouble
from tests.backends.doubles.sdwebui import SDWebUIDouble
from tests.backends.image_tasks import answer_of, events_of, image_task
from workers.adapter_kit.images.formats import convert_image, detect_content_type, strip_metadata
from workers.adapter_kit.images.metadata import TooManyImageParts, read_orientation, remove_metadata
from workers.adapter_kit.images.responses import GeneratedImage, ImageRequest, parse_keep_metadata, respond_with_images
from workers.backends.base import BackendConfig, BackendError, Chunk, make_backend

SECRET = "operators-own-workflow"
WORKFLOW = json.dumps({"6": {"class_type": "CLIPTextEncode", "inputs": {"text": SECRET}}})
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
XMP = f"<x:xmpmeta xmlns:x='adobe:ns:meta/'>{SECRET}</x:xmpmeta>".encode()
LARGE = 32 * 1024 * 1024


def exif_of(orientation: int) -> Image.Exif:
    """Return the EXIF block that ComfyUI writes into a WebP or JPEG, with an orientation."""
    exif = Image.Exif()
    exif[0x010F], exif[0x0110] = f"workflow:{WORKFLOW}", f"prompt:{WORKFLOW}"
    exif[0x9286] = SECRET
    if orientation != 1:
        exif[0x0112] = orientation
    return exif


def picture(kind: str, mode: str = "RGB", orientation: int = 1, *, icc: bool = True, frames: int = 1) -> bytes:
    """Return an image with all metadata that a server may write."""
    image = Image.linear_gradient("L").resize((24, 16)).convert(mode)
    options: dict[str, Any] = {"exif": exif_of(orientation)} | ({"icc_profile": PROFILE} if icc else {})
    if frames > 1:
        more = [image.rotate(90 * n) for n in range(1, frames)]
        options |= {"save_all": True, "append_images": more, "duration": 40}
    if kind == "PNG":
        info = PngImagePlugin.PngInfo()
        info.add_text("prompt", WORKFLOW)
        info.add_text("parameters", SECRET * 40, zip=True)
        info.add_itxt("invokeai_metadata", WORKFLOW, "en", "é")
        info.add_itxt("XML:com.adobe.xmp", XMP.decode())
        info.add(b"comf", b"workflow\0" + WORKFLOW.encode(), after_idat=True)
        info.add(b"prVt", SECRET.encode())
        options |= {"pnginfo": info, "dpi": (300, 300)}
    elif kind == "GIF":
        options = {key: value for key, value in options.items() if key not in ("exif", "icc_profile")}
        options |= {"comment": WORKFLOW.encode(), "loop": 3}
    else:
        options |= {"xmp": XMP} | ({"comment": WORKFLOW.encode()} if kind == "JPEG" else {"lossless": True})
    out = BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def pixels(data: bytes) -> list[tuple[str, bytes]]:
    """Every frame, decoded."""
    found = []
    with Image.open(BytesIO(data)) as image:
        for number in range(getattr(image, "n_frames", 1)):
            image.seek(number)
            found.append((image.mode, image.tobytes()))
    return found


def opened(data: bytes) -> Image.Image:
    image = Image.open(BytesIO(data))
    image.load()
    return image


CASES = [
    *(("PNG", mode, 1) for mode in ("RGB", "RGBA", "L", "P")),
    *(("JPEG", mode, 1) for mode in ("RGB", "L", "CMYK")),
    *(("WEBP", mode, 1) for mode in ("RGB", "RGBA")),
    *((kind, "RGB", frames) for kind in ("PNG", "WEBP", "GIF") for frames in (3,)),
    ("GIF", "P", 1),
]


@pytest.mark.parametrize(("kind", "mode", "frames"), CASES, ids=lambda value: str(value))
def test_the_workflow_goes_and_the_picture_stays(kind: str, mode: str, frames: int) -> None:
    """Pixels, profile, resolution and animation are as they were, byte for byte where they are compressed."""
    icc = mode not in ("L", "CMYK")
    data = picture(kind, mode, icc=icc, frames=frames)
    clean = remove_metadata(data)
    assert SECRET.encode() not in clean
    assert len(clean) < len(data)
    assert pixels(clean) == pixels(data)
    before, after = opened(data), opened(clean)
    assert after.info.get("icc_profile") == before.info.get("icc_profile")
    if kind == "PNG":  # Pillow makes up one for a JPEG with EXIF
        assert after.info["dpi"] == before.info["dpi"]
    assert after.info.get("loop") == before.info.get("loop")
    assert after.info.get("duration") == before.info.get("duration")
    assert not dict(after.getexif())
    assert not [key for key in after.info if key in ("xmp", "comment", "prompt", "workflow", "parameters", "exif")]
    assert remove_metadata(clean) is clean


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
async def test_it_is_shown_the_same_way_up(kind: str, orientation: int) -> None:
    """The orientation is all that stays of EXIF; it is applied to a converted image."""
    data = picture(kind, orientation=orientation)
    clean = remove_metadata(data)
    assert SECRET.encode() not in clean
    assert dict(opened(clean).getexif()) == {0x0112: orientation}
    wanted = ImageOps.exif_transpose(opened(data))
    assert ImageOps.exif_transpose(opened(clean)).tobytes() == wanted.tobytes()
    assert remove_metadata(clean) == clean
    made = await convert_image(data, "png")
    assert opened(made).tobytes() == wanted.tobytes()
    assert SECRET.encode() not in made


@pytest.mark.parametrize("output", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
async def test_nothing_comes_along_into_another_format(kind: str, output: str) -> None:
    """Converted images have no metadata, from any format."""
    out = BytesIO()
    opened(picture("PNG")).save(out, kind) if kind in ("TIFF", "BMP") else out.write(picture(kind))
    made = await convert_image(out.getvalue(), output)
    assert SECRET.encode() not in made
    assert detect_content_type(made) == f"image/{output}"
    if kind not in ("GIF", "BMP"):
        assert opened(made).info.get("icc_profile") == PROFILE


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def test_what_follows_the_end_goes() -> None:
    """Programs hide whole archives behind pictures."""
    for kind in ("PNG", "JPEG", "GIF", "WEBP"):
        clean = remove_metadata(picture(kind))
        assert remove_metadata(clean + SECRET.encode()) == clean


def test_comments_between_the_scans_of_a_jpeg_go() -> None:
    """A progressive picture has several scans, with tables between them."""
    out = BytesIO()
    Image.effect_noise((64, 64), 50).convert("RGB").save(out, "JPEG", progressive=True)
    data = out.getvalue()
    at = data.index(b"\xff\xc4", data.index(b"\xff\xda"))
    hidden = data[:at] + b"\xff\xfe" + struct.pack(">H", 2 + len(SECRET)) + SECRET.encode() + data[at:]
    assert remove_metadata(hidden) == data


def test_chunks_within_the_frames_of_a_webp_go() -> None:
    data = bytearray(remove_metadata(picture("WEBP", frames=3)))
    at = data.index(b"ANMF")
    extra = b"XTRA" + struct.pack("<I", len(SECRET)) + SECRET.encode()
    (length,) = struct.unpack_from("<I", data, at + 4)
    hidden = data[: at + 8 + length] + extra + data[at + 8 + length :]
    struct.pack_into("<I", hidden, at + 4, length + len(extra))
    struct.pack_into("<I", hidden, 4, len(hidden) - 8)
    clean = remove_metadata(bytes(hidden))
    assert SECRET.encode() not in clean
    assert pixels(clean) == pixels(bytes(data))


SAMPLES = [
    picture(kind, frames=frames)
    for kind, frames in (("PNG", 1), ("PNG", 2), ("JPEG", 1), ("WEBP", 1), ("WEBP", 2), ("GIF", 1))
]


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(SAMPLES), st.data())
def test_a_damaged_picture_never_crashes_it(sample: bytes, data: st.DataObject) -> None:
    """A cut or changed image never grows, and a second pass changes nothing."""
    damaged = bytearray(sample[: data.draw(st.integers(0, len(sample)))])
    for _ in range(data.draw(st.integers(0, 4))):
        if damaged:
            damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    clean = remove_metadata(bytes(damaged))
    assert len(clean) <= len(damaged) + 26
    assert remove_metadata(clean) == clean


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\xff\xff\0\0WEBP", b"GIF89a", b""]),
    st.binary(max_size=400),
)
def test_any_bytes_will_do(head: bytes, rest: bytes) -> None:
    clean = remove_metadata(head + rest)
    assert remove_metadata(clean) == clean


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=120))
def test_an_orientation_is_read_from_anything(tiff: bytes) -> None:
    assert 1 <= read_orientation(b"II*\0" + tiff) <= 8
    assert 1 <= read_orientation(b"MM\0*" + tiff) <= 8


async def test_a_picture_of_too_many_parts_is_refused() -> None:
    """No real one has so many; each costs time."""
    data = remove_metadata(picture("PNG"))
    flood = data[:-12] + chunk(b"tEXt", b"") * 500_001 + data[-12:]
    with pytest.raises(TooManyImageParts):
        remove_metadata(flood)
    with pytest.raises(BackendError, match="more than 500000 parts"):
        await strip_metadata(flood)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_large_picture_costs_one_pass(kind: str) -> None:
    """32 MiB of incompressible pixels take at most a second of CPU."""
    if kind == "PNG":
        small = remove_metadata(picture("PNG"))
        data = small[:-12] + chunk(b"IDAT", bytes(65_536)) * (LARGE // 65_536) + chunk(b"tEXt", b"x\0y") + small[-12:]
    else:
        small = remove_metadata(picture("JPEG"))
        data = small[:-2] + b"\x12\xff\x00\x34" * (LARGE // 4) + b"\xff\xfe\0\4xy" + small[-2:]
    began = process_time()
    clean = remove_metadata(data)
    assert process_time() - began < 1.0
    assert len(data) - len(clean) in (15, 6)


# Through the adapters


async def given_pictures(data: bytes) -> AsyncIterator[Progress | GeneratedImage]:
    yield GeneratedImage(data)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("keep", [False, True])
async def test_an_answer_holds_it_only_where_the_operator_wants(keep: bool, stream: bool) -> None:
    work = image_task("m", stream=stream)
    data = picture("PNG")
    request = ImageRequest.from_task(work)
    outputs = [out async for out in respond_with_images(work, request, given_pictures(data), keep_metadata=keep)]
    chunks = [out for out in outputs if isinstance(out, Chunk)]
    found = events_of(chunks)[-1][1] if stream else answer_of(chunks)["data"][0]
    made = b64decode(found["b64_json"])
    assert (made == data) is keep
    assert (SECRET.encode() in made) is keep


def test_the_option_is_true_or_false() -> None:
    assert not parse_keep_metadata({})
    assert parse_keep_metadata({"keep_metadata": "True"})
    with pytest.raises(ValueError, match="keep_metadata must be true or false"):
        parse_keep_metadata({"keep_metadata": "yes"})


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("kind", ["comfyui", "invokeai", "sdwebui"])
async def test_no_adapter_passes_on_what_its_server_writes(
    kind: str, keep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the operator's option keeps the metadata."""
    import tests.backends.doubles.comfyui as comfyui
    import tests.backends.doubles.invokeai as invokeai
    import tests.backends.doubles.sdwebui as sdwebui

    for module in (comfyui, invokeai, sdwebui):
        monkeypatch.setattr(module, "png", lambda *_, **__: picture("PNG"))
    doubles: dict[str, Any] = {"comfyui": ComfyDouble, "invokeai": InvokeAIDouble, "sdwebui": SDWebUIDouble}
    async with doubles[kind]() as double:
        backend = make_backend(kind, BackendConfig(url=double.url, options={"keep_metadata": "true"} if keep else {}))
        model = (await backend.discover()).models[0].name
        chunks, progress, _ = await outputs_of(backend, image_task(model))
        await backend.close()
    made = b64decode(answer_of(chunks)["data"][0]["b64_json"])
    assert (SECRET.encode() in made) is keep
    for one in progress:
        assert not one.preview or SECRET.encode() not in b64decode(one.preview.partition(",")[2])
