"""What a WebUI offers besides its checkpoints: samplers, schedulers and LoRAs. Pure.

A request names them in `sampler`, `scheduler` and `loras` (`[{"name": "pixel-art", "weight": 0.8}]`).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import orjson

from schemas.descriptors import JSON
from schemas.parameters.fields import advanced, choice
from workers.backends.base import BackendRefused

FIELDS = ("sampler", "scheduler", "loras")
MAX_LISTED = 300
"""Choices that a descriptor lists; of more, requests may name any."""
MAX_LORAS = 16
MAX_WEIGHT = 5.0


@dataclass(frozen=True, slots=True)
class PictureChoices:
    """Names by field. Empty: the server lists none, and requests cannot choose."""

    sampler: tuple[str, ...] = ()
    scheduler: tuple[str, ...] = ()
    loras: tuple[str, ...] = ()

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields in which a request may choose."""
        return tuple(name for name in FIELDS if getattr(self, name))

    def parameters(self) -> dict[str, JSON]:
        """Return the schemas of the fields."""
        found: dict[str, JSON] = {}
        for name, title in (("sampler", "Sampler"), ("scheduler", "Scheduler")):
            if choices := getattr(self, name)[:MAX_LISTED]:
                found[name] = choice(title, choices)
        if self.loras:
            weight: JSON = {
                "type": "number",
                "title": "Weight",
                "minimum": -MAX_WEIGHT,
                "maximum": MAX_WEIGHT,
                "default": 1.0,
                "x-nexus-step": 0.05,
            }
            lora = {
                "type": "object",
                "properties": {"name": choice("Name", self.loras[:MAX_LISTED]), "weight": weight},
                "required": ["name"],
            }
            found["loras"] = advanced({"type": "array", "title": "LoRAs", "items": lora, "maxItems": MAX_LORAS})
        return found

    def request_fields(self, extra: Mapping[str, Any], prompt: str) -> JSON:
        """Return the fields of the server's request, its prompt included. Raises BackendRefused for a name that the server does not have."""
        fields: JSON = {"prompt": prompt + "".join(self._tags(extra.get("loras")))}
        for name, theirs in (("sampler", "sampler_name"), ("scheduler", "scheduler")):
            if extra.get(name) is not None:
                fields[theirs] = _known(name, extra[name], getattr(self, name))
        return fields

    def _tags(self, given: Any) -> list[str]:
        """Return the LoRAs in the form of the WebUI's prompts."""
        if given is None:
            return []
        if isinstance(given, str):  # of a form
            with suppress(orjson.JSONDecodeError):
                given = orjson.loads(given)
        if not isinstance(given, list) or len(given) > MAX_LORAS or not all(isinstance(one, dict) for one in given):
            raise BackendRefused(
                f"loras must be a list of at most {MAX_LORAS} objects with a name and a weight", param="loras"
            )
        return [_tag(_known("loras", one.get("name"), self.loras), one.get("weight", 1.0)) for one in given]


def _tag(name: str, weight: Any) -> str:
    if isinstance(weight, bool) or not isinstance(weight, int | float) or abs(weight) > MAX_WEIGHT:
        raise BackendRefused(
            f"the weight of a LoRA must be a number from -{MAX_WEIGHT:g} to {MAX_WEIGHT:g}", param="loras"
        )
    return f" <lora:{name}:{weight:g}>"


def _known(field: str, value: Any, names: tuple[str, ...]) -> str:
    if value not in names:
        more = ", …" if len(names) > 20 else ""
        raise BackendRefused(
            f"{field}: the server has {', '.join(names[:20])}{more}, but not {str(value)[:100]!r}", param=field
        )
    return str(value)


def listed_names(answer: Any) -> tuple[str, ...]:
    """Return the names of a list of the server. Names that a prompt cannot hold are left out."""
    names = [one.get("name") for one in answer if isinstance(one, dict)] if isinstance(answer, list) else []
    return tuple(
        dict.fromkeys(name for name in names if isinstance(name, str) and name and not set(name) & set("<>:\n"))
    )
