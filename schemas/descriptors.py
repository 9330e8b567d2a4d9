"""Define the descriptor of a model: the endpoints that it serves, and the parameters of each as JSON Schema (2020-12).

A worker publishes the descriptors of its models under their digests, so that models with the same parameters share one. A descriptor comes from an
adapter, and may repeat what a server says of itself: `parse_descriptor` accepts a small part of JSON Schema, in bounds, and nothing else. There are no
references, so that no schema has a circle, and no patterns but `SIZE_PATTERN`, so that none is slow to match.

Hints for forms are `x-nexus-…` keywords, `HINTS`. A reader that does not know them has a complete schema all the same.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

JSON = dict[str, Any]

DIALECT = "https://json-schema.org/draft/2020-12/schema"
SIZE_PATTERN = "^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$"
"""The pattern of a picture's size, `WIDTHxHEIGHT`."""

MAX_DESCRIPTOR_BYTES = 32 * 1024
MAX_WORKER_BYTES = 512 * 1024
"""Bytes of all descriptors of a worker. etcd takes 1.5 MB in one request."""
MAX_ENDPOINTS = 16
MAX_PARAMETERS = 64
"""Properties of one object."""
MAX_CHOICES = 1000
MAX_ALTERNATIVES = 4
MAX_DEPTH = 4
"""Levels of schemas: the parameters, a list's items, their properties, …"""
MAX_VALUE_DEPTH = 8
MAX_TITLE = 100
MAX_TEXT = 1000

WIDGETS = frozenset(
    {"prompt", "text", "slider", "seed", "size", "image", "mask", "audio", "voice", "messages", "texts", "json"}
)
"""The values of `x-nexus-widget`."""
GROUPS = frozenset({"basic", "advanced"})
"""The values of `x-nexus-group`. A parameter without one is basic."""
TYPES = frozenset({"object", "array", "string", "number", "integer", "boolean", "null"})
PARAMETER_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}")
DIGEST = re.compile(r"[0-9a-f]{32}")


class EndpointDescriptor(BaseModel):
    """What a model's requests to one endpoint may hold."""

    model_config = ConfigDict(frozen=True)

    parameters: JSON
    """The JSON Schema of a request's body, without `model`. Of a form, files are strings with a `contentMediaType`."""
    example: JSON = {}
    """The parameters of a first request that works. Files are base64."""


class ModelDescriptor(BaseModel):
    """The endpoints of a model, by path."""

    model_config = ConfigDict(frozen=True)

    endpoints: dict[str, EndpointDescriptor]

    def encode(self) -> str:
        """Return the descriptor's JSON. Equal descriptors have equal texts."""
        return json.dumps(self.model_dump(), ensure_ascii=False, separators=(",", ":"))


def digest_of(text: str) -> str:
    """Return the digest under which a descriptor's JSON is published."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class DescriptorError(ValueError):
    """A descriptor is out of bounds, or has a keyword that Nexus does not know. The message names the place."""


def parse_descriptor(text: str) -> ModelDescriptor:
    """Return the descriptor of a text. Raises DescriptorError."""
    if len(text.encode()) > MAX_DESCRIPTOR_BYTES:
        raise DescriptorError(f"the descriptor is larger than {MAX_DESCRIPTOR_BYTES} bytes")
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise DescriptorError(f"the descriptor is not JSON: {error}") from error
    return check_descriptor(value)


def check_descriptor(value: Any) -> ModelDescriptor:
    """Return the descriptor of a value of JSON. Raises DescriptorError."""
    endpoints = value.get("endpoints") if isinstance(value, dict) else None
    if not isinstance(endpoints, dict) or not 0 < len(endpoints) <= MAX_ENDPOINTS:
        raise DescriptorError(f"endpoints must be an object with 1 to {MAX_ENDPOINTS} paths")
    found: dict[str, EndpointDescriptor] = {}
    for path, endpoint in endpoints.items():
        if not isinstance(endpoint, dict) or not isinstance(endpoint.get("example", {}), dict):
            raise DescriptorError(f"{path[:100]}: an endpoint must have parameters, and its example must be an object")
        parameters, example = endpoint.get("parameters"), endpoint.get("example", {})
        check_parameters(parameters, path[:100])
        _check_value(example, f"{path[:100]} example", 0)
        found[path] = EndpointDescriptor(parameters=parameters, example=example)
    return ModelDescriptor(endpoints=found)


def check_parameters(schema: Any, place: str) -> None:
    """Check the schema of an endpoint's parameters. Raises DescriptorError."""
    _check_schema(schema, place, 0)
    if schema.get("type") != "object" or not isinstance(schema.get("properties"), dict):
        raise DescriptorError(f"{place}: the schema must have the type object, and properties")


def file_types(schema: JSON) -> tuple[str, ...]:
    """Return the media types of the files that a parameter takes; nothing for a parameter of JSON."""
    kind = schema.get("contentMediaType") or schema.get("items", {}).get("contentMediaType")
    return (str(kind),) if kind else ()


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _check_schema(schema: Any, place: str, depth: int) -> None:
    if not isinstance(schema, dict):
        raise DescriptorError(f"{place}: a schema must be an object")
    if depth > MAX_DEPTH:
        raise DescriptorError(f"{place}: schemas may have {MAX_DEPTH} levels at most")
    for keyword, value in schema.items():
        check = _KEYWORDS.get(keyword)
        if check is None:
            raise DescriptorError(f"{place}: the keyword {keyword[:50]!r} is not known")
        if not check(value):
            raise DescriptorError(f"{place}: the value of {keyword} is invalid, or out of bounds")
        for name, inner in _inner_schemas(keyword, value):
            _check_schema(inner, f"{place}.{name}", depth + 1)
        if keyword in {"default", "examples", "enum", "const"}:
            _check_value(value, f"{place} {keyword}", 0)


def _inner_schemas(keyword: str, value: Any) -> Iterator[tuple[str, Any]]:
    if keyword == "properties":
        yield from value.items()
    elif keyword == "items":
        yield "items", value
    elif keyword in {"anyOf", "oneOf"}:
        yield from ((keyword, one) for one in value)


def _check_value(value: Any, place: str, depth: int) -> None:
    if depth > MAX_VALUE_DEPTH:
        raise DescriptorError(f"{place}: values may have {MAX_VALUE_DEPTH} levels at most")
    if isinstance(value, float) and not math.isfinite(value):  # 1e999
        raise DescriptorError(f"{place}: a number is too large")
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for one in inner:
        _check_value(one, place, depth + 1)


def _is_text(limit: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and len(value) <= limit


def _is_word(words: Collection[str]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and value in words


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_list(value: Any, limit: int) -> bool:
    return isinstance(value, list) and 0 < len(value) <= limit


def _is_type(value: Any) -> bool:
    names = [value] if isinstance(value, str) else value
    return _is_list(names, len(TYPES)) and all(map(_is_word(TYPES), names))


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= MAX_PARAMETERS and all(map(_is_text(64), value))


def _are_properties(value: Any) -> bool:
    return isinstance(value, dict) and len(value) <= MAX_PARAMETERS and all(map(PARAMETER_NAME.fullmatch, value))


def _are_choices(value: Any) -> bool:
    return _is_list(value, MAX_CHOICES) and all(
        isinstance(one, dict) and set(one) <= {"const", "title", "description"} for one in value
    )


def _is_side(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and set(value) <= {"minimum", "maximum", "multipleOf"}
        and all(map(_is_count, value.values()))
    )


HINTS: Mapping[str, Callable[[Any], bool]] = {
    "x-nexus-widget": _is_word(WIDGETS),
    "x-nexus-group": _is_word(GROUPS),
    "x-nexus-unit": _is_text(20),
    "x-nexus-step": _is_number,
    "x-nexus-side": _is_side,
    "x-nexus-media": lambda value: _is_list(value, 10) and all(map(_is_text(100), value)),
    "x-nexus-enforced": _is_flag,
}
"""The keywords for forms, with a check of their values. docs/reference/descriptors.md describes each."""

_KEYWORDS: Mapping[str, Callable[[Any], bool]] = {
    "$schema": lambda value: value == DIALECT,
    "type": _is_type,
    "title": _is_text(MAX_TITLE),
    "description": _is_text(MAX_TEXT),
    "default": lambda _: True,
    "examples": lambda value: _is_list(value, MAX_CHOICES),
    "enum": lambda value: _is_list(value, MAX_CHOICES),
    "const": lambda _: True,
    "oneOf": _are_choices,
    "anyOf": lambda value: _is_list(value, MAX_ALTERNATIVES),
    "properties": _are_properties,
    "required": _are_names,
    "additionalProperties": _is_flag,
    "items": lambda value: isinstance(value, dict),
    "minimum": _is_number,
    "maximum": _is_number,
    "exclusiveMinimum": _is_number,
    "exclusiveMaximum": _is_number,
    "multipleOf": lambda value: _is_number(value) and value > 0,
    "minLength": _is_count,
    "maxLength": _is_count,
    "minItems": _is_count,
    "maxItems": _is_count,
    "pattern": lambda value: value == SIZE_PATTERN,
    "contentEncoding": lambda value: value == "base64",
    "contentMediaType": _is_text(100),
    **HINTS,
}
