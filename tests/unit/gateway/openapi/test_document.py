"""The OpenAPI document: valid, complete, and made of what the gateway really has."""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator

from backbone.settings import PUBLIC_ROUTES
from gateway.app import make_app
from gateway.dependencies import Parts
from gateway.http.error_handlers import AllowedMethods
from gateway.openapi.enrichment import enrich
from gateway.openapi.operation import SSE_TYPE
from gateway.openapi.operations import OPERATIONS, TAGS
from gateway.openapi.operations.batches import BATCH_ENDPOINTS
from schemas.endpoints import ENDPOINTS

JSON = dict[str, Any]


@pytest.fixture(scope="module")
def api() -> Any:
    return make_app(cast("Parts", SimpleNamespace()), PUBLIC_ROUTES)


@pytest.fixture(scope="module")
def document(api: Any) -> JSON:
    return enrich(api.openapi())


@pytest.fixture(scope="module")
def operations(document: JSON) -> dict[str, JSON]:
    return {
        f"{method.upper()} {path}": operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }


def walk(value: Any) -> Iterator[JSON]:
    """Every object within."""
    if isinstance(value, list):
        for item in value:
            yield from walk(item)
    elif isinstance(value, dict):
        yield value
        for item in value.values():
            yield from walk(item)


def test_it_is_valid(document: JSON) -> None:
    """Every tool that reads OpenAPI 3.1 can read it."""
    assert document["openapi"].startswith("3.1")
    OpenAPIV31SpecValidator(document).validate()


def test_every_reference_leads_somewhere(document: JSON) -> None:
    """Every reference to a schema, header or mapping resolves, and every schema is referenced."""
    named = {part["$ref"] for part in walk(document) if "$ref" in part}
    for part in walk(document):
        named |= set(part.get("discriminator", {}).get("mapping", {}).values())
    there = {f"#/components/{kind}/{name}" for kind, parts in document["components"].items() for name in parts}
    assert named <= there
    assert {name for name in there - named if "securitySchemes" not in name} == set()


def test_names_of_schemas_are_their_own(document: JSON) -> None:
    """Generators name a class by its title: two of one title, and one of them is missing."""
    for name, schema in document["components"]["schemas"].items():
        assert re.fullmatch(r"[A-Z][A-Za-z]+", name)
        assert schema["title"] == name


def test_every_route_is_described(operations: dict[str, JSON]) -> None:
    """Every route has an operation, and every operation has a route."""
    assert set(operations) == set(OPERATIONS)
    assert {operation.tag for operation in OPERATIONS.values()} == set(TAGS)
    ids = [operation["operationId"] for operation in operations.values()]
    assert len(set(ids)) == len(ids)
    for route, operation in operations.items():
        assert re.fullmatch(r"[a-z][A-Za-z]+", operation["operationId"]), route
        assert operation["summary"][0].isupper() and not operation["summary"].endswith("."), route
        assert operation["description"].split("\n")[0].endswith("."), route
        assert "FastAPI" not in str(operation), route


def test_parameters_are_described_and_bounded(operations: dict[str, JSON]) -> None:
    """Each parameter has a description, and each id has a pattern."""
    for route, operation in operations.items():
        for parameter in operation.get("parameters", []):
            assert parameter.get("description"), (route, parameter["name"])
            assert not any("null" in str(part.get("type")) for part in walk(parameter["schema"])), (route, parameter)
            if parameter["name"].endswith("_id") and parameter["name"] not in {"model_id", "worker_id"}:
                assert parameter["schema"]["pattern"], route


def test_every_answer_says_what_it_is(operations: dict[str, JSON]) -> None:
    """No answer has an empty schema, and every error is OpenAI's or Anthropic's object, with the headers that come with it."""
    for route, operation in operations.items():
        for code, answer in operation["responses"].items():
            assert "x-request-id" in answer["headers"], (route, code)
            for content in answer.get("content", {}).values():
                assert content["schema"], (route, code)
            if not code.startswith("2") and route != "GET /readyz":
                error = "AnthropicError" if "/v1/messages" in route else "Error"
                assert answer["content"]["application/json"]["schema"] == {"$ref": f"#/components/schemas/{error}"}
            if code in {"429", "503", "529"} and route != "GET /readyz":
                assert "Retry-After" in answer["headers"], (route, code)
        assert "422" not in operation["responses"], route


def test_streams_are_said_to_be_streams(operations: dict[str, JSON]) -> None:
    """Streaming routes list the event stream; speech lists audio, metrics list text."""
    streamed = {
        route
        for route, operation in operations.items()
        if SSE_TYPE in operation["responses"].get("200", {}).get("content", {})
    }
    assert streamed == {
        "POST /v1/chat/completions", "POST /v1/completions", "POST /v1/images/generations", "POST /v1/images/edits",
        "POST /v1/messages",
        "POST /v1/audio/speech", "POST /v1/audio/transcriptions", "POST /v1/responses", "GET /v1/responses/{response_id}",
        "POST /v1/models/pull", "POST /v1/models/load", "POST /v1/models/unload",
        "GET /v1/jobs/{job_id}/result", "GET /v1/jobs/{job_id}/events", "GET /v1/overview/events",
    }  # fmt: skip
    speech = operations["POST /v1/audio/speech"]["responses"]["200"]["content"]
    assert {"audio/mpeg", "audio/ogg", "audio/wav"} <= set(speech)
    assert "application/json" not in speech
    assert list(operations["GET /metrics"]["responses"]["200"]["content"]) == ["text/plain"]


def test_bodies_are_those_that_are_read(operations: dict[str, JSON], document: JSON) -> None:
    """Fields and bounds come from the models that parse requests; a form's fields are never null."""
    schemas = document["components"]["schemas"]
    assert schemas["ChatRequest"]["required"] == ["model", "messages"]
    assert schemas["ImageGenerationRequest"]["properties"]["size"]["description"] == "`auto` or `WIDTHxHEIGHT`."
    for endpoint in ENDPOINTS:
        body = operations[f"POST {endpoint.path}"]["requestBody"]["content"]
        assert list(body) == ["multipart/form-data" if endpoint.files else "application/json"]
        if endpoint.files:
            form = body["multipart/form-data"]["schema"]
            assert set(endpoint.files) <= set(form["properties"])
            assert form["required"][0] == endpoint.files[0]
            assert not any(part.get("type") == "null" for part in walk(form))
    named = {endpoint.path for endpoint in ENDPOINTS if endpoint.batchable}
    assert set(BATCH_ENDPOINTS) == named | {"/v1/messages", "/v1/responses"}
    mapping = operations["POST /v1/jobs"]["requestBody"]["content"]["application/json"]["schema"]["discriminator"]
    assert set(mapping["mapping"]) == {endpoint.path for endpoint in ENDPOINTS} | {"/v1/messages"}


def test_keys_are_asked_for_where_they_are_needed(operations: dict[str, JSON]) -> None:
    """The scope that a route names is the one that it checks: `tests/flow/test_route_walk.py` holds that for every route."""
    from tests.flow.test_route_walk import PUBLIC, ROUTES

    needs = {re.sub(r":path(?=})", "", route): need for route, need in ROUTES.items()}
    for route, operation in OPERATIONS.items():
        need = needs[route]
        assert (operation.scope is None) == (need == PUBLIC), route
        assert bool(operations[route].get("security")) == (need != PUBLIC), route
        assert operation.scope in {None, "", *(need.scopes or ())}, route
        assert bool(operation.scope) == bool(need.scopes), route


def test_options_names_the_methods_of_a_path(api: Any) -> None:
    """`Allow` holds what the path takes, and nothing else."""
    methods = AllowedMethods(api.routes)
    assert methods.allow_header("/v1/chat/completions") == b"OPTIONS, POST"
    assert methods.allow_header("/v1/files/file-1") == b"DELETE, GET, HEAD, OPTIONS"
    assert methods.allow_header("/v1/aliases/a/b") == b"DELETE, OPTIONS, PUT"
    assert methods.allow_header("/v1/models/pull") == b"OPTIONS, POST"
    assert methods.allow_header("/v1/nothing") == b""
