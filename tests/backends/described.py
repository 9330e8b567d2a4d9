"""Whether what an adapter says of a model's parameters is true."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator
from typing import Any

import jsonschema

from schemas.descriptors import EndpointDescriptor, ModelDescriptor, file_types, parse_descriptor
from schemas.endpoints import BY_PATH
from schemas.parameters.standard import features_of, standard_descriptor
from workers.backends.base import Backend, Finish, Task, UploadedFile


async def check_description(backend: Backend, model: str) -> ModelDescriptor:
    """Each endpoint's parameters are valid JSON Schema, and its example passes them and is served. Returns the descriptor."""
    found = await backend.discover()
    offer = next(one for one in found.models if one.name == model)
    descriptor = backend.describe(offer)
    assert backend.describe(offer) is descriptor
    described = descriptor or standard_descriptor(offer.capabilities, features_of(offer))
    assert described is not None
    assert parse_descriptor(described.encode()) == described
    for path, endpoint in described.endpoints.items():
        assert BY_PATH[path].capability in offer.capabilities
        jsonschema.Draft202012Validator.check_schema(endpoint.parameters)
        jsonschema.validate(endpoint.example, endpoint.parameters, cls=jsonschema.Draft202012Validator)
        _check_defaults(endpoint)
        outputs = [output async for output in backend.run(example_task(path, model, endpoint))]
        assert isinstance(outputs[-1], Finish), path
    return described


def _check_defaults(endpoint: EndpointDescriptor) -> None:
    for name, schema in endpoint.parameters["properties"].items():
        for value in [schema["default"]] if "default" in schema else []:
            jsonschema.validate(value, schema, cls=jsonschema.Draft202012Validator)
        assert schema.get("title"), name


def example_task(path: str, model: str, endpoint: EndpointDescriptor) -> Task:
    """The endpoint's example, as a worker gets it."""
    properties = endpoint.parameters["properties"]
    files = {name for name in endpoint.example if BY_PATH[path].files and name in BY_PATH[path].files}
    body = {"model": model} | {name: value for name, value in endpoint.example.items() if name not in files}
    sent = tuple(_file(name, endpoint.example[name], properties[name]) for name in files)
    data = json.dumps(body).encode()
    return Task("job_1", "req_1", BY_PATH[path].capability, path, model, model, False, data, sent)


def _file(field: str, value: str, schema: dict[str, Any]) -> UploadedFile:
    data = base64.b64decode(value)

    async def pieces() -> AsyncIterator[bytes]:
        yield data

    kind = {"audio/*": "audio/wav"}.get(next(iter(file_types(schema)), ""), "image/png")
    return UploadedFile(field, f"{field}.{kind[-3:]}", kind, len(data), pieces)
