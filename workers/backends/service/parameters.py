"""What the models of a service can be told, by its descriptor: pure, and tolerant.

A service describes its parameters in either of two ways, or in both:

- an endpoint has `parameters`, a JSON Schema, and `example`, a first request;
- `ui.options` lists the fields of a form: `key`, and optionally `label`, `description`, `type`, `values`, `default`, `min`, `max`, `step`, `required`.

Options narrow the usual parameters of the endpoints, and add others. What is out of the bounds of a descriptor is left out, and is a problem.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from schemas.descriptors import (
    MAX_CHOICES,
    MAX_PARAMETERS,
    MAX_TEXT,
    MAX_TITLE,
    PARAMETER_NAME,
    DescriptorError,
    EndpointDescriptor,
    check_descriptor,
)

JSON = dict[str, Any]

NUMBERS = {
    "integer": "integer",
    "int": "integer",
    "number": "number",
    "float": "number",
    "slider": "number",
    "range": "number",
}
SWITCHES = frozenset({"boolean", "bool", "checkbox", "switch", "toggle"})
SLIDERS = frozenset({"slider", "range"})
TEXTS = frozenset({"textarea", "prompt", "multiline"})
WIDGETS = {"seed": "seed", "size": "size", "voice": "voice"}


def own_endpoints(documents: Iterable[JSON]) -> tuple[dict[str, EndpointDescriptor], tuple[str, ...]]:
    """Return the endpoints whose parameters a service gives as JSON Schema, and a problem for each invalid one."""
    found: dict[str, EndpointDescriptor] = {}
    problems: list[str] = []
    for document in documents:
        endpoints = document.get("endpoints")
        for one in endpoints if isinstance(endpoints, list) else ():
            if isinstance(one, dict) and isinstance(one.get("parameters"), dict) and isinstance(one.get("path"), str):
                path = str(one["path"])
                endpoint = {"parameters": one["parameters"], "example": one.get("example") or {}}
                try:
                    found[path] = check_descriptor({"endpoints": {path: endpoint}}).endpoints[path]
                except DescriptorError as error:
                    problems.append(f"the parameters in its descriptor are not used: {error}")
    return found, tuple(problems)


def form_fields(documents: Iterable[JSON]) -> tuple[dict[str, JSON], tuple[str, ...]]:
    """Return the schemas of the fields of a service's form, and the names of the required ones. The field `model` is left out."""
    fields: dict[str, JSON] = {}
    required: list[str] = []
    for option in _options(documents):
        key = option.get("key")
        if isinstance(key, str) and PARAMETER_NAME.fullmatch(key) and key != "model" and len(fields) < MAX_PARAMETERS:
            fields[key] = _schema(key, option)
            if option.get("required") is True:
                required.append(key)
    return fields, tuple(required)


def with_fields(
    endpoints: Mapping[str, EndpointDescriptor], fields: Mapping[str, JSON], required: tuple[str, ...]
) -> dict[str, EndpointDescriptor]:
    """Return the endpoints with the fields of a form: they replace what they say of a parameter, and come after those that it lacks."""
    return {path: _with_fields(one, fields, required) for path, one in endpoints.items()}


def _with_fields(
    endpoint: EndpointDescriptor, fields: Mapping[str, JSON], required: tuple[str, ...]
) -> EndpointDescriptor:
    properties = dict(endpoint.parameters["properties"])
    for name, schema in fields.items():
        known = properties.get(name, {})
        properties[name] = (known | schema) if known.get("type", schema["type"]) == schema["type"] else schema
    names = dict.fromkeys((*endpoint.parameters.get("required", ()), *required))
    parameters = endpoint.parameters | {"properties": properties, "required": list(names)}
    samples = {name: _sample(fields[name]) for name in required}
    return EndpointDescriptor(parameters=parameters, example=samples | endpoint.example)


def _sample(schema: JSON) -> Any:
    """Return a value of a required field for the example."""
    if "default" in schema:
        return schema["default"]
    if "enum" in schema:
        return schema["enum"][0]
    return {"boolean": True, "string": "example"}.get(schema["type"], schema.get("minimum", 1))


def _options(documents: Iterable[JSON]) -> Iterator[JSON]:
    for document in documents:
        ui = document.get("ui")
        options = ui.get("options") if isinstance(ui, dict) else None
        yield from (one for one in (options if isinstance(options, list) else ()) if isinstance(one, dict))


def _schema(key: str, option: JSON) -> JSON:
    kind = str(option.get("type") or "").lower()
    choices = (
        [one for one in map(_choice, option.get("values") or ()) if one is not None]
        if isinstance(option.get("values"), list)
        else []
    )
    default = option.get("default")
    schema: JSON = {"type": _type(kind, choices, default), "title": str(option.get("label") or key)[:MAX_TITLE]}
    if isinstance(option.get("description"), str):
        schema["description"] = option["description"][:MAX_TEXT]
    if choices and len(choices) <= MAX_CHOICES:
        schema["enum"] = choices
    for name, keyword in (("min", "minimum"), ("max", "maximum"), ("step", "x-nexus-step")):
        if schema["type"] in ("integer", "number") and _is_number(option.get(name)):
            schema[keyword] = option[name]
    if isinstance(default, str | int | float):
        schema["default"] = default
    if kind in SLIDERS and {"minimum", "maximum"} <= set(schema):
        schema["x-nexus-widget"] = "slider"
    elif kind in TEXTS:
        schema["x-nexus-widget"] = "prompt"
    elif kind in WIDGETS:
        schema["x-nexus-widget"] = WIDGETS[kind]
    return schema


def _type(kind: str, choices: list[Any], default: Any) -> str:
    if kind in SWITCHES or (not kind and isinstance(default, bool)):
        return "boolean"
    if kind in NUMBERS:
        return NUMBERS[kind]
    if kind == "seed":
        return "integer"
    sample = choices[0] if choices else default
    if not kind or choices:
        return (
            "integer"
            if isinstance(sample, int) and not isinstance(sample, bool)
            else "number"
            if isinstance(sample, float)
            else "string"
        )
    return "string"


def _choice(value: Any) -> str | int | float | None:
    """Return the value of a choice, which may be an object with `value`, or `id`."""
    if isinstance(value, dict):
        value = value.get("value", value.get("id"))
    return value if isinstance(value, str | int | float) and not isinstance(value, bool) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
