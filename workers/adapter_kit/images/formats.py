"""Conversion of images, in a thread. Needs Pillow: the extra `images`."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable
from io import BytesIO
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from schemas.frames import MAX_PREVIEW
from schemas.installation import install_hint
from workers.adapter_kit.images.metadata import remove_metadata
from workers.backends.base import BackendError, BackendRefused

if TYPE_CHECKING:
    from PIL.Image import Image

P = ParamSpec("P")
T = TypeVar("T")


class PillowMissing(BackendError):
    """Pillow is not installed beside the worker."""


PREVIEW_SIDES = (512, 256, 128)
"""Pixels of a preview's longer side, tried in this order until the preview is small enough."""
DEFAULT_QUALITY = 95
RGB_MODES = ("RGB", "RGBA", "RGBX", "P")
"""Pillow's modes whose color profile is for RGB, and stays valid after a conversion."""


def detect_content_type(data: bytes) -> str:
    """Return an image's content type, by its first bytes; an empty string for an unknown format."""
    if data.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "image/webp"
    if data.startswith(b"\x89PNG"):
        return "image/png"
    return "image/gif" if data.startswith(b"GIF8") else ""


async def convert_image(data: bytes, output_format: str, quality: int | None = None) -> bytes:
    """Convert an image into `png`, `jpeg` or `webp`. Raises BackendError when `data` is not an image, BackendRefused without Pillow."""
    try:
        return await _in_thread(_convert, data, output_format, quality)
    except PillowMissing as error:
        made = detect_content_type(data).removeprefix("image/") or "another format"
        raise BackendRefused(
            f"the model makes {made}, and {error.info.message}. Ask for output_format '{made}', or leave it out",
            param="output_format",
            code="unsupported_parameter",
        ) from error


async def strip_metadata(data: bytes) -> bytes:
    """Return the image without its metadata; pixels and orientation stay. See `images.metadata`."""
    return await _in_thread(remove_metadata, data)


async def read_size(data: bytes) -> tuple[int, int] | None:
    """Return width and height; None where the image cannot be read."""
    try:
        return await _in_thread(_read_size, data)
    except BackendError:
        return None


async def make_preview(data: bytes, content_type: str) -> str | None:
    """Return an image as the data URL of a `Progress.preview`, scaled down where necessary; None where that fails."""
    try:
        if len(data) <= MAX_PREVIEW:
            url = _data_url(await strip_metadata(data), content_type)
            if len(url) <= MAX_PREVIEW:
                return url
        return await _in_thread(_make_small_preview, data)
    except BackendError:
        return None


async def make_edit_mask(mask: bytes, field: str = "mask") -> bytes:
    """Convert OpenAI's mask, whose transparent area is to be edited, into a PNG that is white in that area and black elsewhere.

    Raises BackendRefused when the mask has no transparency, or is not an image.
    """
    try:
        return await _in_thread(_make_edit_mask, mask, field)
    except (BackendRefused, PillowMissing):
        raise
    except BackendError as error:
        raise BackendRefused(f"{field} cannot be read as an image", param=field) from error


async def _in_thread(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run `work` in a thread. Raises BackendError for any error of Pillow, and where Pillow is missing."""
    try:
        return await asyncio.to_thread(work, *args, **kwargs)
    except ImportError as error:
        text = (
            "this image needs converting, and Pillow is not installed beside the worker; its operator can add it with: "
            f"{install_hint('images')}"
        )
        raise PillowMissing(text) from error
    except BackendError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly everything: ValueError, SyntaxError, struct.error, …
        raise BackendError(f"an image cannot be read: {error}") from error


def _convert(data: bytes, output_format: str, quality: int | None) -> bytes:
    """Convert an image without its metadata; the orientation is applied to the pixels, and a color profile stays."""
    from PIL import Image, ImageOps

    with Image.open(BytesIO(data)) as image:
        out = BytesIO()
        profile = image.info.get("icc_profile") if image.mode in RGB_MODES else None
        upright = ImageOps.exif_transpose(image)
        if output_format == "png":
            upright.save(out, "PNG", icc_profile=profile)
        else:
            quality = DEFAULT_QUALITY if quality is None else quality
            picture = upright if output_format == "webp" else _on_white(upright)
            picture.save(out, output_format.upper(), quality=quality, icc_profile=profile)
        return remove_metadata(out.getvalue())


def _on_white(image: Image) -> Image:
    """Return an image on a white background, since JPEG has no transparency."""
    from PIL import Image

    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    white = Image.new("RGBA", layer.size, "white")
    return Image.alpha_composite(white, layer).convert("RGB")


def _read_size(data: bytes) -> tuple[int, int]:
    from PIL import Image

    with Image.open(BytesIO(data)) as image:
        return image.size


def _make_small_preview(data: bytes) -> str | None:
    from PIL import Image

    with Image.open(BytesIO(data)) as image:
        for side in PREVIEW_SIDES:
            image.thumbnail((side, side))
            out = BytesIO()
            _on_white(image).save(out, "JPEG", quality=80)
            url = _data_url(out.getvalue(), "image/jpeg")
            if len(url) <= MAX_PREVIEW:
                return url
    return None


def _make_edit_mask(mask: bytes, field: str) -> bytes:
    from PIL import Image

    with Image.open(BytesIO(mask)) as image:
        if not image.has_transparency_data:
            raise BackendRefused(
                f"{field} has no transparency: the area to edit must be fully transparent in it", param=field
            )
        alpha = image.convert("RGBA").getchannel("A")
        out = BytesIO()
        alpha.point([255] + [0] * 255).save(out, "PNG")
        return out.getvalue()


def _data_url(data: bytes, content_type: str) -> str:
    return f"data:{content_type};base64,{base64.b64encode(data).decode()}"
