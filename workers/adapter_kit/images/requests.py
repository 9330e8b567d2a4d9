"""Requests to `/v1/images/generations` and `/v1/images/edits`, parsed and checked. Pure.

Beyond OpenAI's fields there are `negative_prompt`, `seed`, `steps`, `guidance` (also `guidance_scale`, `cfg_scale`) and, for edits,
`strength` (0 keeps the image, 1 replaces it).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from workers.adapter_kit.request_fields import parse_json_object
from workers.backends.base import BackendRefused, Task, UploadedFile

GENERATIONS = "/v1/images/generations"
EDITS = "/v1/images/edits"
MAX_PROMPT = 32_000
MAX_SIDE_PIXELS = 16_384
MAX_SEED = 2**64 - 1
SIZE = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})")
GUIDANCE_NAMES = ("guidance", "guidance_scale", "cfg_scale")
READ_FIELDS = frozenset(
    {
        *("model", "prompt", "negative_prompt", "n", "size", "seed", "steps", "strength", "output_format"),
        *("output_compression", "response_format", "stream", "partial_images", *GUIDANCE_NAMES),
    }
)
IGNORED_FIELDS = frozenset({"user", "safety_identifier", "moderation", "service_tier", "metadata"})
"""Fields that change nothing in the image."""
NO_EFFECT_VALUES: Mapping[str, frozenset[str]] = {
    "background": frozenset({"auto", "opaque"}),
    "quality": frozenset({"auto", "standard", "medium"}),
    "input_fidelity": frozenset({"low"}),
}
"""Values that change nothing in the image, by field."""
UNSUPPORTED_HINTS = {
    "quality": "give steps instead",
    "style": "describe it in the prompt instead",
    "background": "it makes opaque images only",
    "edit": "use /v1/images/generations",
}

OutputFormat = Literal["png", "jpeg", "webp"]


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """A caller's request for images, checked. None: the caller leaves the value to the backend."""

    prompt: str
    negative_prompt: str | None = None
    n: int = 1
    width: int | None = None
    height: int | None = None
    """Pixels; width and height are both given, or both None."""
    seed: int | None = None
    """The seed of the first image; the next ones have seed + 1, …"""
    steps: int | None = None
    guidance: float | None = None
    strength: float | None = None
    output_format: OutputFormat = "png"
    format_given: bool = False
    """The caller named the format; otherwise an adapter may return its server's own."""
    output_compression: int | None = None
    """0 to 100, as OpenAI counts it: 100 is the best quality."""
    response_format: Literal["b64_json", "url"] = "b64_json"
    """The default is `b64_json`: OpenAI's newer models know nothing else, and it stores no files."""
    stream: bool = False
    partial_images: int = 0
    edit: bool = False
    images: tuple[UploadedFile, ...] = ()
    """The images to edit, at least one; empty for a generation."""
    mask: UploadedFile | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Other fields that may change the image: `background`, `quality`, `sampler`, …"""

    @classmethod
    def from_task(cls, task: Task) -> ImageRequest:
        """Parse a task. Raises BackendRefused, with the field as `param`, when the request is invalid."""
        if task.endpoint not in (GENERATIONS, EDITS):
            raise BackendRefused(f"this backend does not serve {task.endpoint}")
        edit = task.endpoint == EDITS
        fields = _ImageFields(parse_json_object(task.body), text=edit)
        width, height = fields.size()
        images, mask = _sort_files(task.files, edit=edit)
        request = cls(
            prompt=fields.prompt(),
            negative_prompt=fields.string("negative_prompt"),
            n=fields.integer("n", 1, 10) or 1,
            width=width,
            height=height,
            seed=fields.seed(),
            steps=fields.integer("steps", 1, 1000),
            guidance=fields.guidance(),
            strength=fields.number("strength", 0, 1),
            output_format=cast("OutputFormat", fields.choice("output_format", ("png", "jpeg", "webp"))),
            format_given=bool(fields.body.get("output_format")),
            output_compression=fields.integer("output_compression", 0, 100),
            response_format=cast("Literal['b64_json', 'url']", fields.choice("response_format", ("b64_json", "url"))),
            stream=task.stream,
            partial_images=fields.integer("partial_images", 0, 3) or 0,
            edit=edit,
            images=images,
            mask=mask,
            extra=fields.extra(),
        )
        request._check_combinations()
        return request

    @property
    def size(self) -> str | None:
        """`WIDTHxHEIGHT`; None where the caller gave no size."""
        return f"{self.width}x{self.height}" if self.width else None

    def seed_for(self, index: int) -> int | None:
        """Return the seed of the image at `index`."""
        return None if self.seed is None else (self.seed + index) % (MAX_SEED + 1)

    def requested_features(self) -> dict[str, str]:
        """Return the features that the request uses beyond its prompt and n, with the field of each."""
        used = {
            "negative_prompt": bool(self.negative_prompt),
            "size": self.width is not None,
            "seed": self.seed is not None,
            "steps": self.steps is not None,
            "guidance": self.guidance is not None,
            "strength": self.strength is not None,
            "edit": self.edit,
            "mask": self.mask is not None,
            "images": len(self.images) > 1,
        }
        fields = {"edit": "image", "images": "image"}
        wanted = {name: fields.get(name, name) for name, there in used.items() if there}
        return wanted | {name: name for name in self.extra}

    def require_supported(self, *can: str) -> None:
        """Raise BackendRefused for a requested feature that is not in `can` and would be ignored.

        `can` names fields of this class, `edit` and `images` (several of them), and fields of `extra`.
        """
        for what, name in self.requested_features().items():
            if what not in can:
                known = ", ".join(what for what in can if what not in ("edit", "images"))
                hint = UNSUPPORTED_HINTS.get(what) or (
                    f"it takes prompt, n, {known}" if known else "it takes prompt and n"
                )
                lacking = {"edit": "edit images", "images": "take several images"}.get(what, f"honor {name!r}")
                raise BackendRefused(f"this model cannot {lacking}; {hint}", param=name)

    def _check_combinations(self) -> None:
        if self.stream and self.response_format == "url":
            raise BackendRefused(
                "a stream carries images as b64_json; leave response_format out, or send the request without stream",
                param="response_format",
            )
        if self.output_format == "png" and self.output_compression not in (None, 100):
            raise BackendRefused("output_compression needs output_format jpeg or webp", param="output_compression")


@dataclass(frozen=True, slots=True)
class _ImageFields:
    """Reads the request's fields. `text`: they come from a form, where numbers are texts."""

    body: dict[str, Any]
    text: bool

    def prompt(self) -> str:
        prompt = self.string("prompt")
        if not prompt or not prompt.strip():
            raise BackendRefused("prompt must describe the image", param="prompt")
        if len(prompt) > MAX_PROMPT:
            raise BackendRefused(f"prompt may have at most {MAX_PROMPT} characters", param="prompt")
        return prompt

    def string(self, name: str) -> str | None:
        value = self.body.get(name)
        if value is None or isinstance(value, str):
            return value
        raise BackendRefused(f"{name} must be one string", param=name)

    def choice(self, name: str, choices: tuple[str, ...]) -> str:
        value = self.body.get(name)
        if value is None:
            return choices[0]
        if value not in choices:
            raise BackendRefused(f"{name} must be one of {', '.join(choices)}", param=name)
        return str(value)

    def integer(self, name: str, least: int, most: int) -> int | None:
        value = self.number(name, least, most)
        if value is not None and not isinstance(value, int):
            raise BackendRefused(f"{name} must be a whole number", param=name)
        return value

    def number(self, name: str, least: int, most: int) -> float | None:
        value = self.body.get(name)
        if value is None:
            return None
        if self.text and isinstance(value, str):
            value = _parse_number(value)
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            raise BackendRefused(f"{name} must be a number from {least} to {most}", param=name)
        return value

    def seed(self) -> int | None:
        """Return the seed; None for -1, with which several servers choose one."""
        seed = self.integer("seed", -1, MAX_SEED)
        return None if seed == -1 else seed

    def guidance(self) -> float | None:
        return next((self.number(name, 0, 100) for name in GUIDANCE_NAMES if self.body.get(name) is not None), None)

    def size(self) -> tuple[int | None, int | None]:
        value = self.string("size")
        if value in (None, "", "auto"):
            return None, None
        match = SIZE.fullmatch(value or "")
        if match is None or max(int(side) for side in match.groups()) > MAX_SIDE_PIXELS:
            raise BackendRefused(f"size must be auto, or WIDTHxHEIGHT of at most {MAX_SIDE_PIXELS} each", param="size")
        return int(match[1]), int(match[2])

    def extra(self) -> dict[str, Any]:
        return {
            name: value
            for name, value in self.body.items()
            if value not in (None, "")
            and name not in READ_FIELDS
            and name not in IGNORED_FIELDS
            and not (isinstance(value, str) and value in NO_EFFECT_VALUES.get(name, ()))
        }


def _parse_number(text: str) -> int | float | None:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return None


def _sort_files(files: tuple[UploadedFile, ...], *, edit: bool) -> tuple[tuple[UploadedFile, ...], UploadedFile | None]:
    images = tuple(file for file in files if file.field == "image")
    masks = [file for file in files if file.field == "mask"]
    other = next((file.field for file in files if file.field not in ("image", "mask")), None)
    if other is not None:
        raise BackendRefused(f"the form has an unknown file {other!r}; send image and mask only", param=other)
    if edit and not images:
        raise BackendRefused("an edit needs a file in the field 'image'", param="image")
    if len(masks) > 1:
        raise BackendRefused("an edit takes at most one mask", param="mask")
    return images, masks[0] if masks else None
