"""Build the parameters of pictures: `/v1/images/generations` and `/v1/images/edits`."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from schemas.descriptors import JSON, EndpointDescriptor
from schemas.parameters.fields import MAX_SEED, advanced, body, choice, file, flag, integer, prompt, seed, size, slider

MAX_PROMPT = 32_000
MAX_IMAGES = 10
MAX_STEPS = 1000
MAX_GUIDANCE = 100.0
ALL_FIELDS = frozenset({"negative_prompt", "size", "seed", "steps", "guidance", "strength"})


@dataclass(frozen=True)
class PictureOptions:
    """What a model's pictures can be told. `fields`: of `ALL_FIELDS`, those that it honors."""

    fields: Collection[str] = ALL_FIELDS
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Values of a request that leaves the parameter out, where they are known."""
    side: Mapping[str, int] = field(default_factory=dict)
    """What the sides of a size must be: `minimum`, `maximum`, `multipleOf`."""
    max_seed: int = MAX_SEED
    min_guidance: float = 0.0
    images: int = MAX_IMAGES
    """The most pictures of one request."""
    extra: Mapping[str, JSON] = field(default_factory=dict)
    """Parameters that only this model has."""
    enforced: bool = True
    """The adapter refuses values out of bounds."""


def generations(options: PictureOptions) -> EndpointDescriptor:
    """Return the parameters of `/v1/images/generations`."""
    fields = {"prompt": _prompt()} | _fields(options, edit=False)
    schema = body(fields, ("prompt",), enforced=options.enforced)
    return EndpointDescriptor(parameters=schema, example={"prompt": "A lighthouse at dusk"})


def edits(
    options: PictureOptions, *, mask: bool = True, mask_required: bool = False, several: bool = False
) -> EndpointDescriptor:
    """Return the parameters of `/v1/images/edits`. `mask`: only a masked area can be changed; `several`: it takes several pictures."""
    picture = file("Picture", "image/*", "image")
    if several:
        picture = {
            "title": "Pictures",
            "anyOf": [picture, {"type": "array", "items": picture, "minItems": 1}],
            "x-nexus-widget": "image",
        }
    fields: dict[str, JSON] = {"image": picture, "prompt": _prompt()}
    if mask or mask_required:
        fields["mask"] = file("Mask", "image/png", "mask", "Transparent where the picture may change.")
    fields |= _fields(options, edit=True)
    required = ("image", "prompt", "mask") if mask_required else ("image", "prompt")
    example: JSON = {"image": SAMPLE_PICTURE, "prompt": "Make the sky red"} | (
        {"mask": SAMPLE_MASK} if mask_required else {}
    )
    return EndpointDescriptor(parameters=body(fields, required, enforced=options.enforced), example=example)


def _prompt() -> JSON:
    return prompt("Prompt", "What the picture shows.", max_length=MAX_PROMPT)


def _fields(options: PictureOptions, *, edit: bool) -> dict[str, JSON]:
    defaults = options.defaults
    known: dict[str, JSON] = {
        "negative_prompt": {
            "type": "string",
            "title": "Negative prompt",
            "description": "What the picture must not show.",
            "x-nexus-widget": "prompt",
        },
        "size": size(default=None if edit else defaults.get("size"), side=options.side),
        "steps": slider(
            "Steps", "More steps take longer.", least=1, most=MAX_STEPS, step=1, default=defaults.get("steps")
        ),
        "guidance": slider(
            "Guidance",
            "How closely the picture follows the prompt.",
            least=options.min_guidance,
            most=MAX_GUIDANCE,
            step=0.5,
            default=defaults.get("guidance"),
        ),
        "strength": slider(
            "Strength",
            "0 keeps the picture, 1 replaces it.",
            least=0.0,
            most=1.0,
            step=0.05,
            default=defaults.get("strength"),
        ),
        "seed": seed("-1 chooses one at random.", most=options.max_seed),
    }
    wanted = {name: schema for name, schema in known.items() if name in options.fields and (edit or name != "strength")}
    return wanted | dict(options.extra) | _output(options)


def _output(options: PictureOptions) -> dict[str, JSON]:
    fields: dict[str, JSON] = {}
    if options.images > 1:
        fields["n"] = integer("Number of pictures", least=1, most=options.images, default=1)
    fields["output_format"] = advanced(choice("Format", ("png", "jpeg", "webp")))
    fields["output_compression"] = advanced(
        integer("Quality", "Of JPEG and WebP; 100 is the best.", least=0, most=100, **{"x-nexus-unit": "%"})
    )
    fields["response_format"] = advanced(choice("Delivery", ("b64_json", "url"), default="b64_json"))
    fields["stream"] = advanced(flag("Stream", "Send previews while the picture is made."))
    fields["partial_images"] = advanced(integer("Previews", "Of a stream.", least=0, most=3, default=0))
    return fields


def _png(channels: int, pixel: bytes, side: int = 64) -> str:
    """Return a picture of one color as a PNG in base64."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 6 if channels == 4 else 2, 0, 0, 0)
    rows = zlib.compress((b"\0" + pixel * side) * side, 9)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return base64.b64encode(data).decode()


SAMPLE_PICTURE = _png(3, b"\x40\x80\xc0")
SAMPLE_MASK = _png(4, b"\0\0\0\0")
