"""Join the descriptors of workers that serve one model. A job goes to any of them, so only what all of them accept is offered.

Of two schemas of a parameter, the narrower bound and the common choices count. A parameter that only some workers have is left out; one that any of
them requires is required. The names of parameters that were left out or narrowed are returned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from schemas.descriptors import JSON, EndpointDescriptor, ModelDescriptor

NARROWER: Mapping[str, Callable[..., Any]] = {
    "minimum": max,
    "exclusiveMinimum": max,
    "minLength": max,
    "minItems": max,
    "maximum": min,
    "exclusiveMaximum": min,
    "maxLength": min,
    "maxItems": min,
}
FIRST_COUNTS = frozenset({"title", "description", "x-nexus-widget", "x-nexus-group", "x-nexus-step", "x-nexus-side"})
"""Keywords for people and forms, which may differ."""


def merge_descriptors(descriptors: Sequence[ModelDescriptor]) -> tuple[ModelDescriptor, tuple[str, ...]]:
    """Return the common descriptor, and the names of parameters that differ between workers."""
    if len(descriptors) == 1:
        return descriptors[0], ()
    endpoints: dict[str, EndpointDescriptor] = {}
    differing: set[str] = set()
    for path in dict.fromkeys(path for one in descriptors for path in one.endpoints):
        # An endpoint that only some workers have gets jobs of its own capability, which go to them.
        endpoints[path] = _merge([one.endpoints[path] for one in descriptors if path in one.endpoints], differing)
    return ModelDescriptor(endpoints=endpoints), tuple(sorted(differing))


def _merge(found: list[EndpointDescriptor], differing: set[str]) -> EndpointDescriptor:
    schemas = [one.parameters for one in found]
    first = schemas[0]
    properties: dict[str, JSON] = {}
    for name in dict.fromkeys(name for schema in schemas for name in schema["properties"]):
        merged = _merge_parameter([schema["properties"].get(name) for schema in schemas])
        if merged is not None:
            properties[name] = merged
        if any(schema["properties"].get(name) != merged for schema in schemas):
            differing.add(name)
    required = [name for name in _names(schema.get("required", ()) for schema in schemas) if name in properties]
    parameters = first | {"properties": properties, "required": required}
    if not all(schema.get("x-nexus-enforced") for schema in schemas):
        parameters.pop("x-nexus-enforced", None)
    return EndpointDescriptor(parameters=parameters, example=_example(found, properties))


def _names(lists: Iterable[Iterable[str]]) -> dict[str, None]:
    return dict.fromkeys(name for names in lists for name in names)


def _example(found: list[EndpointDescriptor], properties: Mapping[str, JSON]) -> JSON:
    """Return the first example whose parameters all remain; else what remains of the first."""
    whole = (one.example for one in found if one.example and set(one.example) <= set(properties))
    return next(whole, {name: value for name, value in found[0].example.items() if name in properties})


def _merge_parameter(schemas: list[JSON | None]) -> JSON | None:
    """Return the common schema of a parameter; None where there is none."""
    known = [schema for schema in schemas if schema is not None]
    first = known[0]
    if len(known) < len(schemas) or any(schema.get("type") != first.get("type") for schema in known):
        return None
    if all(schema == first for schema in known):
        return first
    merged: JSON = {}
    for keyword in _names(known):
        values = [schema[keyword] for schema in known if keyword in schema]
        if keyword in NARROWER:
            merged[keyword] = NARROWER[keyword](values)
        elif keyword in {"enum", "examples"}:
            others = [set(map(repr, other)) for other in values[1:]]
            merged[keyword] = [value for value in values[0] if all(repr(value) in other for other in others)]
        elif keyword in FIRST_COUNTS or (len(values) == len(known) and all(value == values[0] for value in values)):
            merged[keyword] = values[0]
    if not merged.get("enum", True) or merged.get("minimum", 0) > merged.get("maximum", merged.get("minimum", 0)):
        return None
    if not merged.get("examples", True):
        del merged["examples"]
    return merged
