"""Descriptors: the usual ones are valid, and nothing else than a bounded part of JSON Schema is accepted."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from schemas.descriptors import (
    MAX_CHOICES,
    MAX_DEPTH,
    MAX_DESCRIPTOR_BYTES,
    MAX_PARAMETERS,
    DescriptorError,
    check_descriptor,
    digest_of,
    parse_descriptor,
)
from schemas.endpoints import CAPABILITIES, INPUT_TOKENS, SERVED
from schemas.parameters.standard import standard_descriptor


def test_every_endpoint_has_usual_parameters() -> None:
    """They are valid JSON Schema, their examples pass them, and they are accepted as any worker's."""
    usual = standard_descriptor(CAPABILITIES)
    assert usual is not None
    assert set(usual.endpoints) == {
        spec.path for spec in SERVED if spec is not INPUT_TOKENS
    }  # it counts what chat is told
    for path, endpoint in usual.endpoints.items():
        jsonschema.Draft202012Validator.check_schema(endpoint.parameters)
        jsonschema.validate(endpoint.example, endpoint.parameters, cls=jsonschema.Draft202012Validator)
        schema = next(spec.schema for spec in SERVED if spec.path == path)
        fields = {name for name in endpoint.parameters["properties"] if name in schema.model_fields}
        assert fields >= set(endpoint.parameters["required"]) - {"image", "file", "mask"}
    assert parse_descriptor(usual.encode()) == usual
    assert standard_descriptor(CAPABILITIES) is usual


def test_equal_descriptors_have_equal_digests() -> None:
    one = standard_descriptor(CAPABILITIES[:1])
    assert one is not None
    assert digest_of(one.encode()) == digest_of(one.model_copy(deep=True).encode())


def endpoint(**parameters: Any) -> dict[str, Any]:
    schema = {"type": "object", "properties": {}} | parameters
    return {"endpoints": {"/v1/images/generations": {"parameters": schema, "example": {}}}}


def field(**schema: Any) -> dict[str, Any]:
    return endpoint(properties={"x": schema})


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.attack
@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        {},
        {"endpoints": {}},
        {"endpoints": {f"/{number}": {} for number in range(100)}},
        {"endpoints": {"/v1/x": None}},
        {"endpoints": {"/v1/x": {"parameters": {"type": "object", "properties": {}}, "example": []}}},
        endpoint(type="array"),
        endpoint(properties=[]),
        endpoint(properties={f"p{number}": {} for number in range(MAX_PARAMETERS + 1)}),
        endpoint(properties={"<b>": {}}),
        endpoint(properties={"x": True}),
        endpoint(required="x"),
        endpoint(required=[["x"]]),
        endpoint(additionalProperties={"type": "string"}),
        field(**{"$ref": "https://evil.example/schema.json"}),
        field(**{"$defs": {}}),
        field(pattern="(a+)+$"),
        field(type="tuple"),
        field(type=[{}]),
        field(title="x" * 5000),
        field(description=["x"]),
        field(enum=[]),
        field(enum=list(range(MAX_CHOICES + 1))),
        field(minimum="0"),
        field(maximum=True),
        field(minLength=-1),
        field(multipleOf=0),
        field(oneOf=[{"type": "string"}]),
        field(anyOf=[{"type": "string"}] * 50),
        field(anyOf=[{"pattern": "x*"}]),
        field(items=[{}]),
        field(contentEncoding="quoted-printable"),
        field(**{"x-nexus-widget": "script"}),
        field(**{"x-nexus-widget": ["slider"]}),
        field(**{"x-nexus-side": {"minimum": 1.5}}),
        field(**{"x-other": 1}),
        field(default=json.loads("[" * 50 + "]" * 50)),
        field(**nested(MAX_DEPTH + 1)),
        field(default=float("inf")),
    ],
)
def test_a_bad_descriptor_is_refused(value: Any) -> None:
    """A worker is not trusted: no reference, no pattern, no unknown keyword, nothing deep or long."""
    with pytest.raises(DescriptorError):
        check_descriptor(value)


@pytest.mark.attack
@pytest.mark.parametrize(
    "text",
    [
        "",
        "nonsense",
        '{"endpoints": NaN}',
        "[" * 100_000,
        "x" * (MAX_DESCRIPTOR_BYTES + 1),
        json.dumps(field(minimum=0)).replace("0", "1e999"),
    ],
)
def test_a_bad_text_is_refused(text: str) -> None:
    with pytest.raises(DescriptorError):
        parse_descriptor(text)


def test_the_bounds_leave_room() -> None:
    """What is just within the bounds is accepted."""
    check_descriptor(field(**nested(MAX_DEPTH - 1)))
    check_descriptor(field(enum=list(range(MAX_CHOICES)), default=1))
    check_descriptor(field(oneOf=[{"const": "a", "title": "A"}], **{"x-nexus-widget": "slider", "x-nexus-step": 0.5}))
