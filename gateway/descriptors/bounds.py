"""Check a request's parameters against a schema: types, choices and bounds of single values. Pure.

A parameter that the schema does not name passes, and so does null. Of a form, values are text: a number is read from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from schemas.descriptors import JSON

Check = Callable[[Any, Any], bool]
KINDS: Mapping[str, tuple[type, ...]] = {
    "string": (str,),
    "array": (list, tuple),
    "object": (dict,),
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
}
BOUNDS: Mapping[str, tuple[Check, str]] = {
    "minimum": (lambda value, bound: value >= bound, "at least {}"),
    "maximum": (lambda value, bound: value <= bound, "at most {}"),
    "exclusiveMinimum": (lambda value, bound: value > bound, "more than {}"),
    "exclusiveMaximum": (lambda value, bound: value < bound, "less than {}"),
}
LENGTHS: Mapping[str, tuple[Check, str]] = {
    "minLength": (lambda value, bound: len(value) >= bound, "at least {} characters long"),
    "maxLength": (lambda value, bound: len(value) <= bound, "at most {} characters long"),
}
MAX_NAMED = 20
"""Choices that a message names."""


def find_violation(parameters: JSON, values: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the first parameter that the schema does not allow, and what it must be; None if all are allowed."""
    for name, schema in parameters["properties"].items():
        value = values.get(name)
        if value is not None and (must := _violation(schema, value)) is not None:
            return name, must
    return None


def _violation(schema: JSON, value: Any) -> str | None:
    choices = schema.get("enum")
    if choices is not None and value not in choices:
        more = ", …" if len(choices) > MAX_NAMED else ""
        return f"must be one of {', '.join(map(str, choices[:MAX_NAMED]))}{more}"
    kind = schema.get("type")
    if kind in ("integer", "number"):
        number = _number(value)
        if number is None:
            return "must be a number"
        return _first(BOUNDS, schema, number)
    if isinstance(kind, str) and not isinstance(value, KINDS.get(kind, (object,))):
        return f"must be of the type {kind}" if kind != "boolean" or not isinstance(value, str) else None
    if isinstance(value, str):
        return _first(LENGTHS, schema, value) or _side_violation(schema.get("x-nexus-side"), value)
    return None


def _number(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    return value if isinstance(value, int | float) else None


def _first(checks: Mapping[str, tuple[Check, str]], schema: JSON, value: Any) -> str | None:
    failed = (
        text.format(schema[word])
        for word, (check, text) in checks.items()
        if word in schema and not check(value, schema[word])
    )
    found = next(failed, None)
    return f"must be {found}" if found is not None else None


def _side_violation(side: Mapping[str, int] | None, size: str) -> str | None:
    """Return what the sides of a size must be."""
    parts = size.split("x")
    if not side or len(parts) != 2 or not all(part.isdecimal() for part in parts):
        return None
    multiple = side.get("multipleOf", 1) or 1
    least, most = side.get("minimum", 0), side.get("maximum")
    for pixels in map(int, parts):
        if pixels % multiple:
            return f"must have sides that are multiples of {multiple}"
        if pixels < least or (most is not None and pixels > most):
            return f"must have sides from {least} pixels" + (f" to {most}" if most is not None else "")
    return None
