"""Build the schemas of single parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from schemas.descriptors import DIALECT, JSON, SIZE_PATTERN

MAX_SEED = 2**64 - 1
COMMON_SIZES = ("512x512", "768x768", "1024x1024", "1024x1536", "1536x1024")


def body(properties: Mapping[str, JSON], required: Iterable[str] = (), *, enforced: bool = False) -> JSON:
    """Return the schema of a request's body. `enforced`: the adapter certainly refuses values that the schema does not allow."""
    schema: JSON = {"$schema": DIALECT, "type": "object", "properties": dict(properties)}
    if required := list(required):
        schema["required"] = required
    if enforced:
        schema["x-nexus-enforced"] = True
    return schema


def advanced(schema: JSON) -> JSON:
    """Return the parameter for the part of a form that is closed at first."""
    return schema | {"x-nexus-group": "advanced"}


def prompt(title: str = "Prompt", description: str = "", *, max_length: int | None = None) -> JSON:
    """Return a text of several lines that the model reads."""
    schema: JSON = {"type": "string", "title": title, "minLength": 1, "x-nexus-widget": "prompt"}
    return _described(schema, description) | ({"maxLength": max_length} if max_length else {})


def text(title: str, description: str = "", **more: Any) -> JSON:
    """Return a line of text."""
    return _described({"type": "string", "title": title}, description) | more


def flag(title: str, description: str = "", *, default: bool = False) -> JSON:
    """Return a switch."""
    return _described({"type": "boolean", "title": title}, description) | {"default": default}


def integer(
    title: str, description: str = "", *, least: int | None = None, most: int | None = None, **more: Any
) -> JSON:
    """Return a whole number, with its bounds."""
    return _bounded({"type": "integer", "title": title}, description, least, most) | more


def slider(
    title: str, description: str = "", *, least: float, most: float, step: float, default: float | None = None
) -> JSON:
    """Return a number between two bounds. `step`: the distance of a slider's stops; other values are valid as well."""
    whole = all(isinstance(one, int) for one in (least, most, step))
    schema = _bounded({"type": "integer" if whole else "number", "title": title}, description, least, most)
    schema |= {"x-nexus-widget": "slider", "x-nexus-step": step}
    return schema | ({} if default is None else {"default": default})


def choice(title: str, choices: Iterable[str], description: str = "", *, default: str | None = None) -> JSON:
    """Return one of several texts."""
    schema = _described({"type": "string", "title": title}, description) | {"enum": list(choices)}
    return schema | ({} if default is None else {"default": default})


def seed(description: str = "", *, least: int = -1, most: int = MAX_SEED) -> JSON:
    """Return a seed. -1, where it is allowed, stands for a random one."""
    schema = _bounded({"type": "integer", "title": "Seed"}, description, least, most)
    return schema | {"x-nexus-widget": "seed"}


def size(description: str = "", *, default: str | None = None, side: Mapping[str, int] | None = None) -> JSON:
    """Return a picture's size. `side`: what each of its sides must be: `minimum`, `maximum`, `multipleOf`."""
    schema = _described({"type": "string", "title": "Size"}, description)
    choices = [default, *COMMON_SIZES] if default else list(COMMON_SIZES)
    schema |= {"pattern": SIZE_PATTERN, "examples": list(dict.fromkeys(choices)), "x-nexus-widget": "size"}
    schema |= {"x-nexus-side": dict(side), "x-nexus-unit": "px"} if side else {"x-nexus-unit": "px"}
    return schema | ({"default": default} if default else {})


def file(title: str, media_type: str, widget: str, description: str = "") -> JSON:
    """Return a file of a form."""
    schema = _described({"type": "string", "title": title}, description)
    return schema | {"contentEncoding": "base64", "contentMediaType": media_type, "x-nexus-widget": widget}


def _described(schema: JSON, description: str) -> JSON:
    return schema | ({"description": description} if description else {})


def _bounded(schema: JSON, description: str, least: float | None, most: float | None) -> JSON:
    schema = _described(schema, description)
    schema |= {} if least is None else {"minimum": least}
    return schema | ({} if most is None else {"maximum": most})
