"""What an HTTP service reports about itself: its metadata, its descriptor, its list of models. Pure, and tolerant.

Services write `endpoints` as a list of objects, as a list of paths, or as an object whose values are paths; `capabilities` as an object with `domains`, or as
a list of such names; their name in `service` or at the top.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from schemas.descriptors import EndpointDescriptor
from schemas.endpoints import SERVED
from schemas.jobs import Capability
from schemas.presence import ModelOffer
from workers.adapter_kit.openai.audio import parse_voice_list
from workers.adapter_kit.openai.capabilities import TEXT, CapabilitySelector
from workers.backends.service.parameters import form_fields, own_endpoints

JSON = dict[str, Any]

ENDPOINTS: Mapping[str, Capability] = {spec.path: spec.capability for spec in SERVED}
"""The paths that callers of Nexus can reach."""
ENDPOINT_BY_NAME: Mapping[str, str] = {word: spec.path for spec in SERVED for word in spec.service_words}
"""The endpoints of the capability names that a service without a list of endpoints may use."""
CAPABILITY_FIELDS = ("capabilities", "type", "task")
"""Fields in which a model reports its capabilities."""
CONTEXT_LENGTH_FIELDS = ("context_length", "max_model_len", "context_window")
EMBEDDING_LENGTH_FIELDS = ("embedding_length", "dimensions")


@dataclass(frozen=True, slots=True)
class ServiceMetadata:
    """The endpoints and models of a service."""

    endpoints: frozenset[str]
    """Paths of `ENDPOINTS`."""
    models: tuple[ModelOffer, ...]
    concurrency: int | None = None
    """Concurrent requests; None where the service does not report them."""
    streams: bool = True
    """False for a service that reports that it does not stream."""
    parameters: Mapping[str, EndpointDescriptor] = field(default_factory=dict)
    """The parameters that the service gives as JSON Schema, by path."""
    fields: Mapping[str, JSON] = field(default_factory=dict)
    """The schemas of the fields of its form."""
    required: tuple[str, ...] = ()
    """The required fields of its form."""
    problems: tuple[str, ...] = ()
    """Parts of its description that are not used."""


def endpoints_in(document: JSON) -> frozenset[str]:
    """Return the paths of `ENDPOINTS` that a document names, by its endpoints or else by its capabilities."""
    found = frozenset(path for path in map(_known_path, _paths(document.get("endpoints"))) if path)
    return found or frozenset(
        ENDPOINT_BY_NAME[word] for word in _capability_names(document) if word in ENDPOINT_BY_NAME
    )


def endpoints_in_openapi(openapi: JSON) -> frozenset[str]:
    """Return the paths of `ENDPOINTS` in an OpenAPI document, which FastAPI writes for every service."""
    paths = openapi.get("paths")
    known = paths if isinstance(paths, dict) else {}
    return frozenset(path for path in ENDPOINTS if isinstance(known.get(path), dict) and "post" in known[path])


def names_models(document: JSON) -> bool:
    """Return whether a document lists models."""
    return bool(_parse_models(document.get("models")) or _models_of_form(document))


def parse_metadata(
    service: str, endpoints: frozenset[str], documents: Iterable[JSON], listed: object, *, guessed: bool = False
) -> ServiceMetadata:
    """Return the metadata of a service, from all of its documents.

    Models are those of a document, else those `listed`, else one with the name of the service. A model has the capabilities that it reports, else those that its name is
    known for, else all of the service's. `guessed`: the service did not report its endpoints itself (servers with one code for all models have all
    paths): then a model that reports nothing serves text.
    """
    documents = list(documents)
    merged: JSON = {}
    for document in documents:
        merged = document | merged
    models = _parse_models(merged.get("models")) or _models_of_form(merged) or _parse_models(listed)
    capabilities = tuple(dict.fromkeys(ENDPOINTS[path] for path in ENDPOINTS if path in endpoints))
    reported = merged.get("capabilities")
    limits = reported if isinstance(reported, dict) else {}
    parameters, problems = own_endpoints(documents)
    fields, required = form_fields(documents)
    concurrency = (source.get(key) for source in (merged, limits) for key in ("concurrency", "max_concurrency"))
    return ServiceMetadata(
        endpoints,
        tuple(
            _make_offer(service, model, _model_capabilities(model, capabilities, guessed=guessed), merged)
            for model in models or [{"id": service, "capabilities": list(capabilities)}]
        ),
        next(_positive_numbers(concurrency), None),
        limits.get("streaming") is not False,
        {known: one for path, one in parameters.items() if (known := _known_path(path))},
        fields,
        required,
        problems,
    )


def _model_capabilities(model: JSON, capabilities: tuple[Capability, ...], *, guessed: bool) -> tuple[Capability, ...]:
    words = model.get("capabilities")
    own = (
        frozenset(ENDPOINTS[ENDPOINT_BY_NAME[word]] for word in words if word in ENDPOINT_BY_NAME)
        if isinstance(words, list)
        else frozenset()
    )
    if not own:
        known = CapabilitySelector({}).select(str(model["id"]), model)
        silent = known == TEXT and not guessed and not any(model.get(field) for field in CAPABILITY_FIELDS)
        own = frozenset() if silent else frozenset(known)
    return tuple(one for one in capabilities if one in own) or capabilities


def _make_offer(service: str, model: JSON, capabilities: tuple[Capability, ...], merged: JSON) -> ModelOffer:
    voices = parse_voice_list(model) or parse_voice_list({"voices": merged.get("voices")})
    return ModelOffer(
        name=str(model["id"]),
        capabilities=capabilities,
        owned_by=service,
        context_length=next(_positive_numbers(model.get(key) for key in CONTEXT_LENGTH_FIELDS), None),
        voices=voices if Capability.SPEECH in capabilities else (),
        embedding_length=next(_positive_numbers(model.get(key) for key in EMBEDDING_LENGTH_FIELDS), None)
        if Capability.EMBEDDINGS in capabilities
        else None,
    )


def _parse_models(models: Any) -> list[JSON]:
    """Return a list of models, each an object with an `id`. The list may stand in an object's `data`, as in OpenAI's API."""
    if isinstance(models, dict):
        models = models.get("data")
    found: dict[str, JSON] = {}
    for one in models if isinstance(models, list) else ():
        name = one if isinstance(one, str) else (one.get("id") or one.get("name")) if isinstance(one, dict) else None
        if isinstance(name, str) and name:
            found[name] = (one if isinstance(one, dict) else {}) | {"id": name}
    return list(found.values())


def _models_of_form(document: JSON) -> list[JSON]:
    """Return the models in the values of the form field `model`, where the document describes a form."""
    ui = document.get("ui")
    options = ui.get("options") if isinstance(ui, dict) else None
    for option in options if isinstance(options, list) else ():
        if isinstance(option, dict) and option.get("key") == "model":
            return _parse_models(option.get("values")) or _parse_models([option.get("default")])
    return []


def _paths(endpoints: Any) -> Iterator[str]:
    if isinstance(endpoints, dict):
        endpoints = list(endpoints.values())
    for one in endpoints if isinstance(endpoints, list) else ():
        if isinstance(one, str):
            yield one
        elif isinstance(one, dict) and isinstance(one.get("path"), str):
            methods = one.get("methods") or [one.get("method") or "POST"]
            if "POST" in [str(method).upper() for method in methods]:
                yield one["path"]


def _known_path(path: str) -> str | None:
    """Return the path in `ENDPOINTS` that a path or URL stands for; it may lack the `/v1`. None for any other path."""
    try:
        plain = "/" + urlsplit(path).path.strip("/")
    except ValueError:
        return None
    return next((one for one in (plain, f"/v1{plain}") if one in ENDPOINTS), None)


def _capability_names(document: JSON) -> Iterator[str]:
    reported = document.get("capabilities")
    words = reported.get("domains") if isinstance(reported, dict) else reported
    for word in words if isinstance(words, list) else ():
        yield str(word).lower()


def _positive_numbers(values: Iterable[Any]) -> Iterator[int]:
    return (value for value in values if isinstance(value, int) and not isinstance(value, bool) and value > 0)
