"""What an HTTP service says about itself: its metadata, its descriptor, its list of models. Pure, and tolerant.

Services write `endpoints` as a list of objects, as a list of paths, or as an object whose values are paths; their
`capabilities` as an object with `domains`, or as a list of such words; their name in `service` or at the top.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from schemas.endpoints import SERVED
from schemas.jobs import Capability
from schemas.presence import ModelOffer
from workers.adapter_kit.openai.audio import parse_voice_list
from workers.adapter_kit.openai.capabilities import TEXT, CapabilitySelector

JSON = dict[str, Any]

ENDPOINTS: Mapping[str, Capability] = {spec.path: spec.capability for spec in SERVED}
"""The paths that callers of Nexus can reach."""
WORDS: Mapping[str, str] = {word: spec.path for spec in SERVED for word in spec.service_words}
"""What a service without a list of endpoints may call what it does."""
KINDS = ("capabilities", "type", "task")
"""Fields in which a model says what it serves."""
LENGTHS = ("context_length", "max_model_len", "context_window")
SIZES = ("embedding_length", "dimensions")


@dataclass(frozen=True, slots=True)
class ServiceMetadata:
    """What a service offers."""

    endpoints: frozenset[str]
    """Of `ENDPOINTS`."""
    models: tuple[ModelOffer, ...]
    concurrency: int | None = None
    """Requests at once, where it says."""
    streams: bool = True
    """False: it has said that it does not."""


def endpoints_in(document: JSON) -> frozenset[str]:
    """The paths of `ENDPOINTS` that a document names, by its endpoints or else by its capabilities."""
    found = frozenset(path for path in map(_known, _paths(document.get("endpoints"))) if path)
    return found or frozenset(WORDS[word] for word in _words(document) if word in WORDS)


def paths_of(openapi: JSON) -> frozenset[str]:
    """The paths of `ENDPOINTS` in an OpenAPI document, which FastAPI writes for every service."""
    paths = openapi.get("paths")
    known = paths if isinstance(paths, dict) else {}
    return frozenset(path for path in ENDPOINTS if isinstance(known.get(path), dict) and "post" in known[path])


def names_models(document: JSON) -> bool:
    """Whether a document says which models there are."""
    return bool(_objects(document.get("models")) or _choices(document))


def parse_metadata(
    service: str, endpoints: frozenset[str], documents: Iterable[JSON], listed: object, *, guessed: bool = False
) -> ServiceMetadata:
    """Everything put together. Models: those of a document, else those `listed`, else one called as the service.

    A model serves what it says; what its name is well known for; else everything that the service does. `guessed`: what
    the service does is not its own word (servers with one code for all models have all paths): then text, where a model
    says nothing.
    """
    whole: JSON = {}
    for document in documents:
        whole = document | whole
    models = _objects(whole.get("models")) or _choices(whole) or _objects(listed)
    capabilities = tuple(dict.fromkeys(ENDPOINTS[path] for path in ENDPOINTS if path in endpoints))
    said = whole.get("capabilities")
    limits = said if isinstance(said, dict) else {}
    concurrency = (source.get(key) for source in (whole, limits) for key in ("concurrency", "max_concurrency"))
    return ServiceMetadata(
        endpoints,
        tuple(
            _offer(service, model, _served(model, capabilities, guessed=guessed), whole)
            for model in models or [{"id": service, "capabilities": list(capabilities)}]
        ),
        next(_positive(concurrency), None),
        limits.get("streaming") is not False,
    )


def _served(model: JSON, capabilities: tuple[Capability, ...], *, guessed: bool) -> tuple[Capability, ...]:
    words = model.get("capabilities")
    own = (
        frozenset(ENDPOINTS[WORDS[word]] for word in words if word in WORDS) if isinstance(words, list) else frozenset()
    )
    if not own:
        known = CapabilitySelector({}).select(str(model["id"]), model)
        silent = known == TEXT and not guessed and not any(model.get(field) for field in KINDS)
        own = frozenset() if silent else frozenset(known)
    return tuple(one for one in capabilities if one in own) or capabilities


def _offer(service: str, model: JSON, capabilities: tuple[Capability, ...], whole: JSON) -> ModelOffer:
    voices = parse_voice_list(model) or parse_voice_list({"voices": whole.get("voices")})
    return ModelOffer(
        name=str(model["id"]),
        capabilities=capabilities,
        owned_by=service,
        context_length=next(_positive(model.get(key) for key in LENGTHS), None),
        voices=voices if Capability.SPEECH in capabilities else (),
        embedding_length=next(_positive(model.get(key) for key in SIZES), None)
        if Capability.EMBEDDINGS in capabilities
        else None,
    )


def _objects(models: Any) -> list[JSON]:
    """A list of models, each an object with an `id`; the list may be in an object's `data`, as OpenAI writes it."""
    if isinstance(models, dict):
        models = models.get("data")
    found: dict[str, JSON] = {}
    for one in models if isinstance(models, list) else ():
        name = one if isinstance(one, str) else (one.get("id") or one.get("name")) if isinstance(one, dict) else None
        if isinstance(name, str) and name:
            found[name] = (one if isinstance(one, dict) else {}) | {"id": name}
    return list(found.values())


def _choices(document: JSON) -> list[JSON]:
    """The values of the form field `model`, where the document describes a form."""
    ui = document.get("ui")
    options = ui.get("options") if isinstance(ui, dict) else None
    for option in options if isinstance(options, list) else ():
        if isinstance(option, dict) and option.get("key") == "model":
            return _objects(option.get("values")) or _objects([option.get("default")])
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


def _known(path: str) -> str | None:
    """The path as `ENDPOINTS` has it; it may be a whole URL, or lack the `/v1`."""
    try:
        plain = "/" + urlsplit(path).path.strip("/")
    except ValueError:
        return None
    return next((one for one in (plain, f"/v1{plain}") if one in ENDPOINTS), None)


def _words(document: JSON) -> Iterator[str]:
    said = document.get("capabilities")
    words = said.get("domains") if isinstance(said, dict) else said
    for word in words if isinstance(words, list) else ():
        yield str(word).lower()


def _positive(values: Iterable[Any]) -> Iterator[int]:
    return (value for value in values if isinstance(value, int) and not isinstance(value, bool) and value > 0)
