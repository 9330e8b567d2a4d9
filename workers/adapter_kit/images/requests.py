"""What a caller asks of `/v1/images/generations` and `/v1/images/edits`: pure.

Beyond OpenAI's fields there are `negative_prompt`, `seed`, `steps`, `guidance` (also `guidance_scale`, `cfg_scale`) and, for edits,
`strength` (0 keeps the picture, 1 paints it anew).
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
MAX_SIDE = 16_384
MAX_SEED = 2**64 - 1
SIZE = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})")
GUIDANCE_NAMES = ("guidance", "guidance_scale", "cfg_scale")
READ = frozenset(
    {
        *("model", "prompt", "negative_prompt", "n", "size", "seed", "steps", "strength", "output_format"),
        *("output_compression", "response_format", "stream", "partial_images", *GUIDANCE_NAMES),
    }
)
HARMLESS = frozenset({"user", "safety_identifier", "moderation", "service_tier", "metadata"})
"""They change nothing in the picture."""
NO_CHANGE: Mapping[str, frozenset[str]] = {
    "background": frozenset({"auto", "opaque"}),
    "quality": frozenset({"auto", "standard", "medium"}),
    "input_fidelity": frozenset({"low"}),
}
"""Values with which a field asks for nothing in particular."""
INSTEAD = {
    "quality": "give steps instead",
    "style": "describe it in the prompt instead",
    "background": "it makes opaque pictures only",
    "edit": "use /v1/images/generations",
}

OutputFormat = Literal["png", "jpeg", "webp"]


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """A request for pictures, checked. None: the caller leaves it to the backend."""

    prompt: str
    negative_prompt: str | None = None
    n: int = 1
    width: int | None = None
    height: int | None = None
    """Pixels; both are given or neither is."""
    seed: int | None = None
    """Of the first picture; the others' follow it: seed + 1, …"""
    steps: int | None = None
    guidance: float | None = None
    strength: float | None = None
    output_format: OutputFormat = "png"
    format_given: bool = False
    """The caller named the format; otherwise an adapter may give its server's own."""
    output_compression: int | None = None
    """0 to 100, as OpenAI counts it: 100 is the best quality."""
    response_format: Literal["b64_json", "url"] = "b64_json"
    """OpenAI's newer models know only `b64_json`, which needs nothing to be kept; hence the default."""
    stream: bool = False
    partial_images: int = 0
    edit: bool = False
    images: tuple[UploadedFile, ...] = ()
    """Of an edit, at least one."""
    mask: UploadedFile | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Fields that are none of the above and that may change the picture: `background`, `quality`, `sampler`, …"""

    @classmethod
    def from_task(cls, task: Task) -> ImageRequest:
        """Raises BackendRefused, with the field as `param`, when the request makes no sense."""
        if task.endpoint not in (GENERATIONS, EDITS):
            raise BackendRefused(f"this backend does not serve {task.endpoint}")
        edit = task.endpoint == EDITS
        fields = _ImageFields(parse_json_object(task.body), text=edit)
        width, height = fields.size()
        images, mask = _files(task.files, edit=edit)
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
        request._agree()
        return request

    @property
    def size(self) -> str | None:
        """`WIDTHxHEIGHT`, where the caller said it."""
        return f"{self.width}x{self.height}" if self.width else None

    def seed_for(self, index: int) -> int | None:
        """The seed of the picture at `index`."""
        return None if self.seed is None else (self.seed + index) % (MAX_SEED + 1)

    def requested_features(self) -> dict[str, str]:
        """What the request asks for beyond its prompt and n, and the field that says so."""
        asked = {
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
        wanted = {name: fields.get(name, name) for name, there in asked.items() if there}
        return wanted | {name: name for name in self.extra}

    def require_supported(self, *can: str) -> None:
        """Refuse what would be ignored: raises BackendRefused for anything of `requested_features()` that is not in `can`.

        `can` names fields of this class, `edit` and `images` (several of them), and fields of `extra`.
        """
        for what, name in self.requested_features().items():
            if what not in can:
                known = ", ".join(what for what in can if what not in ("edit", "images"))
                hint = INSTEAD.get(what) or (f"it takes prompt, n, {known}" if known else "it takes prompt and n")
                said = {"edit": "edit pictures", "images": "take several images"}.get(what, f"honour {name!r}")
                raise BackendRefused(f"this model cannot {said}; {hint}", param=name)

    def _agree(self) -> None:
        if self.stream and self.response_format == "url":
            raise BackendRefused(
                "a stream carries pictures as b64_json; leave response_format out, or ask without stream",
                param="response_format",
            )
        if self.output_format == "png" and self.output_compression not in (None, 100):
            raise BackendRefused("output_compression goes with jpeg or webp", param="output_compression")


@dataclass(frozen=True, slots=True)
class _ImageFields:
    """The request's fields. `text`: they come from a form, where numbers are text too."""

    body: dict[str, Any]
    text: bool

    def prompt(self) -> str:
        prompt = self.string("prompt")
        if not prompt or not prompt.strip():
            raise BackendRefused("prompt must say what the picture is to show", param="prompt")
        if len(prompt) > MAX_PROMPT:
            raise BackendRefused(f"prompt may hold {MAX_PROMPT} characters", param="prompt")
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
            value = _number(value)
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            raise BackendRefused(f"{name} must be a number from {least} to {most}", param=name)
        return value

    def seed(self) -> int | None:
        """-1 is what several servers call a seed of their own choice."""
        seed = self.integer("seed", -1, MAX_SEED)
        return None if seed == -1 else seed

    def guidance(self) -> float | None:
        return next((self.number(name, 0, 100) for name in GUIDANCE_NAMES if self.body.get(name) is not None), None)

    def size(self) -> tuple[int | None, int | None]:
        value = self.string("size")
        if value in (None, "", "auto"):
            return None, None
        match = SIZE.fullmatch(value or "")
        if match is None or max(int(side) for side in match.groups()) > MAX_SIDE:
            raise BackendRefused(f"size must be auto, or WIDTHxHEIGHT of at most {MAX_SIDE} each", param="size")
        return int(match[1]), int(match[2])

    def extra(self) -> dict[str, Any]:
        return {
            name: value
            for name, value in self.body.items()
            if value not in (None, "")
            and name not in READ
            and name not in HARMLESS
            and not (isinstance(value, str) and value in NO_CHANGE.get(name, ()))
        }


def _number(text: str) -> int | float | None:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return None


def _files(files: tuple[UploadedFile, ...], *, edit: bool) -> tuple[tuple[UploadedFile, ...], UploadedFile | None]:
    images = tuple(file for file in files if file.field == "image")
    masks = [file for file in files if file.field == "mask"]
    other = next((file.field for file in files if file.field not in ("image", "mask")), None)
    if other is not None:
        raise BackendRefused(f"nothing is known of a file called {other!r}; there are image and mask", param=other)
    if edit and not images:
        raise BackendRefused("an edit needs a file called image", param="image")
    if len(masks) > 1:
        raise BackendRefused("there may be one mask", param="mask")
    return images, masks[0] if masks else None
