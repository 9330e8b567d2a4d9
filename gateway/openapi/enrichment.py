"""Adds to FastAPI's OpenAPI document: authentication, bodies, responses, errors, summaries and descriptions."""

from __future__ import annotations

import copy
from typing import Any, get_args

from pydantic import BaseModel

from gateway.openapi.components import REF, component_name, component_schemas
from gateway.openapi.errors import HEADERS, error_response, errors_of, request_id_headers
from gateway.openapi.operation import JSON, JSON_TYPE, Operation, Schema, SuccessResponse
from gateway.openapi.operations import DESCRIPTION, OPERATIONS, TAGS
from gateway.openapi.shapes.errors import AnthropicError, Error

BEARER = "bearer"
FORM_TYPE = "multipart/form-data"


def enrich(document: JSON) -> JSON:
    """Return a copy of FastAPI's document with the descriptions from `OPERATIONS`. Does not change `document`."""
    document = copy.deepcopy(document)
    models: dict[type[BaseModel], None] = {Error: None, AnthropicError: None}
    for path, methods in document["paths"].items():
        for method, found in methods.items():
            operation = OPERATIONS.get(f"{method.upper()} {path}")
            if operation is not None:
                methods[method] = _enriched(path, found, operation, models)
    document["info"] |= {"description": DESCRIPTION, "license": {"name": "Apache 2.0", "identifier": "Apache-2.0"}}
    used = {tag for methods in document["paths"].values() for found in methods.values() for tag in found["tags"]}
    document["tags"] = [{"name": name, "description": text} for name, text in TAGS.items() if name in used]
    document["components"] = {
        "schemas": component_schemas(models),
        "headers": HEADERS,
        "securitySchemes": {
            BEARER: {
                "type": "http",
                "scheme": "bearer",
                "description": "An API key of Nexus. Create one with `nexus keys create NAME`. A key has the scopes `inference`, `jobs`, "
                "`admin:read`, `admin:operate`, `admin:keys`, or `admin`, which includes the three before it; each route names the "
                "scope that it needs.",
            }
        },
    }
    return document


def _enriched(path: str, found: JSON, operation: Operation, models: dict[type[BaseModel], None]) -> JSON:
    api = path.startswith("/v1/")
    result: JSON = {
        "tags": [operation.tag],
        "summary": operation.summary,
        "description": _with_scope(operation),
        "operationId": operation.id,
    }
    if parameters := _parameters(found.get("parameters", []), operation):
        result["parameters"] = parameters
    if operation.body is not None:
        result["requestBody"] = _body(operation, models)
    ids = request_id_headers(operation)
    successes = {str(status): _success_response(one, ids, models) for status, one in operation.responses.items()}
    failures = {
        code: error_response(code, text, operation)
        for code, text in errors_of(operation, api=api).items()
        if code not in successes
    }
    result["responses"] = successes | failures
    if operation.scope is not None:
        result["security"] = [{BEARER: []}]
    return result


def _with_scope(operation: Operation) -> str:
    if operation.scope is None:
        return operation.description
    needed = f"the scope `{operation.scope}`" if operation.scope else "any valid key"
    return f"{operation.description}\n\n**Key:** {needed}."


def _parameters(found: list[JSON], operation: Operation) -> list[JSON]:
    """Return FastAPI's parameters and the operation's own parameters, with descriptions."""
    more = {name: dict(text) for name, text in operation.parameters.items()}
    result = []
    for parameter in found:
        added = more.pop(parameter["name"], {})
        schema = _plain(parameter["schema"]) | added.pop("schema", {})
        result.append({"name": parameter["name"], "in": parameter["in"], "required": parameter["required"]} | added)
        result[-1]["schema"] = schema
    for name, parameter in more.items():
        result.append({"name": name, "required": parameter["in"] == "path"} | parameter)
    return result


def _plain(schema: JSON) -> JSON:
    """Return a parameter's schema without `null`: an optional parameter is left out, never null."""
    schema = {name: value for name, value in schema.items() if name != "title"}
    kinds = [kind for kind in schema.pop("anyOf", []) if kind != {"type": "null"}]
    return schema | kinds[0] if len(kinds) == 1 else schema | ({"anyOf": kinds} if kinds else {})


def _body(operation: Operation, models: dict[type[BaseModel], None]) -> JSON:
    assert operation.body is not None
    if operation.files:
        return {"required": True, "content": {FORM_TYPE: {"schema": _form(operation)}}}
    content: JSON = {"schema": _reference(operation.body, models)}
    if operation.examples:
        content["examples"] = {
            title.lower().replace(" ", "-"): {"summary": title, "value": value}
            for title, value in operation.examples.items()
        }
    return {"required": True, "content": {JSON_TYPE: content}}


def _form(operation: Operation) -> JSON:
    """Return a form's schema. Form fields are text, so they are never null, and an empty field counts as left out."""
    assert operation.body is not None
    assert not isinstance(operation.body, tuple)
    if isinstance(operation.body, dict):
        schema = copy.deepcopy(operation.body)
    else:
        schemas = component_schemas([operation.body])
        schema = schemas[component_name(operation.body)]
        schema["properties"] = {name: _plain(field) for name, field in schema["properties"].items()}
        assert REF not in str(schema["properties"]), "a form's field refers to another schema"
        schema.pop("title", None)
    for name, field in schema["properties"].items():
        if field.get("default", ...) is None:
            del field["default"]
        if "pattern" in field and name not in schema.get("required", []):
            field["pattern"] = f"^$|{field['pattern']}"
    files = {
        name: {"type": "string", "format": "binary", "minLength": 1, "description": text}
        for name, text in operation.files.items()
    }
    schema["properties"] = files | schema["properties"]
    schema["required"] = [next(iter(files)), *schema.get("required", [])]
    schema["propertyNames"] = {"minLength": 1}
    if operation.examples:
        schema["example"] = next(iter(operation.examples.values()))
    return schema


def _success_response(one: SuccessResponse, ids: tuple[str, ...], models: dict[type[BaseModel], None]) -> JSON:
    result: JSON = {
        "description": one.description,
        "headers": {name: {"$ref": f"#/components/headers/{name}"} for name in (*ids, *one.headers)},
    }
    if one.content:
        result["content"] = {kind: {"schema": _reference(schema, models)} for kind, schema in one.content.items()}
        if one.example is not None:
            result["content"][JSON_TYPE]["example"] = one.example
    return result


def _reference(schema: Schema, models: dict[type[BaseModel], None]) -> Any:
    if isinstance(schema, dict):
        return schema
    if isinstance(schema, tuple):
        return _one_of(schema, models)
    models[schema] = None
    return {"$ref": REF + component_name(schema)}


def _one_of(schemas: tuple[type[BaseModel], ...], models: dict[type[BaseModel], None]) -> JSON:
    references = [_reference(schema, models)["$ref"] for schema in schemas]
    mapping = {
        endpoint: reference
        for schema, reference in zip(schemas, references, strict=True)
        for endpoint in get_args(schema.model_fields["endpoint"].annotation)
    }
    return {
        "oneOf": [{"$ref": reference} for reference in references],
        "discriminator": {"propertyName": "endpoint", "mapping": mapping},
    }
