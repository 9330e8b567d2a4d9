"""Ollama's models, parsed from `/api/tags`, `/api/show` and `/api/ps`: pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from schemas.jobs import Capability
from schemas.presence import ModelOffer

JSON = dict[str, Any]

COMPLETION, EMBEDDING, VISION = "completion", "embedding", "vision"
NUM_CTX = re.compile(r"^\s*num_ctx\s+(\d{1,9})\s*$", re.MULTILINE)
SERVED = {COMPLETION: (Capability.CHAT, Capability.COMPLETIONS), EMBEDDING: (Capability.EMBEDDINGS,)}


def full_name(name: str) -> str:
    """Return a model's name with its tag: `llama3.2` is `llama3.2:latest`."""
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"


@dataclass(frozen=True, slots=True)
class ModelDetails:
    """A model's description in `/api/show`. It does not change while the digest stays the same."""

    capabilities: frozenset[str] = frozenset()
    """Ollama's names: completion, embedding, vision, tools, thinking, insert, …"""
    reported: bool = True
    """False for an old server, which does not report `capabilities`: they are a guess."""
    context_length: int | None = None
    """The context length of the training."""
    configured_context: int | None = None
    """The Modelfile's `num_ctx`."""
    embedding_length: int | None = None

    @classmethod
    def of(cls, details: JSON) -> ModelDetails:
        """Parse an answer of `/api/show`."""
        info = details.get("model_info")
        info = info if isinstance(info, dict) else {}
        family = str(info.get("general.architecture") or "")
        reported = details.get("capabilities")
        guess = (EMBEDDING,) if "bert" in family else (COMPLETION,)
        return cls(
            frozenset(str(word) for word in reported) if isinstance(reported, list) else frozenset(guess),
            isinstance(reported, list),
            context_length=_length(info, family, "context_length"),
            configured_context=_num_ctx(details.get("parameters")),
            embedding_length=_length(info, family, "embedding_length"),
        )

    def lacks(self, capability: str) -> bool:
        """Return whether the model certainly lacks a capability."""
        return self.reported and capability not in self.capabilities


def _length(info: JSON, family: str, name: str) -> int | None:
    return _positive(info.get(f"{family}.{name}"))


def _positive(value: Any) -> int | None:
    return value if isinstance(value, int) and value > 0 else None


def _num_ctx(parameters: Any) -> int | None:
    """Return the `num_ctx` of the Modelfile's parameters, which Ollama shows as lines of a name and a value."""
    found = NUM_CTX.search(parameters) if isinstance(parameters, str) else None
    return _positive(int(found.group(1))) if found else None


def loaded_contexts(answer: JSON) -> dict[str, int | None]:
    """Return the models that `/api/ps` lists, with the context each was loaded with; None before Ollama 0.9.7."""
    return {listed_name(entry): _positive(entry.get("context_length")) for entry in listed_models(answer)}


@dataclass(frozen=True, slots=True)
class OllamaModel:
    """A model of an Ollama server."""

    name: str
    """The name with its tag."""
    details: ModelDetails
    remote: bool
    """Whether the model runs on another server, to which this one forwards requests."""
    created: int

    @property
    def capabilities(self) -> tuple[Capability, ...]:
        """The capabilities that Nexus offers for the model."""
        return tuple(ours for word, served in SERVED.items() if word in self.details.capabilities for ours in served)

    def offer(self, *, loaded: bool, loading: bool, loaded_context: int | None) -> ModelOffer:
        """Return the model's offer. `loaded_context`: the context length with which it was loaded last."""
        capabilities, details = self.capabilities, self.details
        return ModelOffer(
            name=self.name,
            capabilities=capabilities,
            loaded=None if self.remote else loaded and not loading,
            loading=loading,
            context_length=loaded_context or details.configured_context or details.context_length,
            owned_by="ollama",
            created=self.created,
            embedding_length=self.details.embedding_length if Capability.EMBEDDINGS in capabilities else None,
        )


def listed_models(answer: JSON) -> list[JSON]:
    """Return the entries of `/api/tags` or `/api/ps` that have a name."""
    models = answer.get("models")
    return [one for one in models or () if isinstance(one, dict) and _name(one)] if isinstance(models, list) else []


def listed_name(entry: JSON) -> str:
    """Return the name of an entry, with its tag."""
    return full_name(_name(entry))


def _name(entry: JSON) -> str:
    return str(entry.get("name") or entry.get("model") or "")


def parse_model(entry: JSON, details: ModelDetails) -> OllamaModel:
    """Return the model of an entry of `/api/tags`."""
    return OllamaModel(listed_name(entry), details, bool(entry.get("remote_host")), _unix(entry.get("modified_at")))


def _unix(time: Any) -> int:
    try:
        return int(datetime.fromisoformat(str(time)).timestamp())
    except ValueError:
        return 0


def parse_version(answer: JSON) -> tuple[int, ...] | None:
    """Return the numbers of `/api/version`; None for a build without a version (`0.0.0`)."""
    parts = str(answer.get("version") or "").partition("-")[0].split(".")
    numbers = tuple(int(part) for part in parts if part.isdecimal())
    return numbers if any(numbers) else None
