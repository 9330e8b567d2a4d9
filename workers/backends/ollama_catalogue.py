"""What Ollama has, from its own words: pure."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from schemas.jobs import Capability
from schemas.presence import ModelOffer

JSON = dict[str, Any]

COMPLETION, EMBEDDING, VISION = "completion", "embedding", "vision"
SERVED = {COMPLETION: (Capability.CHAT, Capability.COMPLETIONS), EMBEDDING: (Capability.EMBEDDINGS,)}


def full_name(name: str) -> str:
    """`llama3.2` is `llama3.2:latest`."""
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"


@dataclass(frozen=True, slots=True)
class Details:
    """What `/api/show` says of a model; the same as long as its digest is."""

    capabilities: frozenset[str] = frozenset()
    """Ollama's words: completion, embedding, vision, tools, thinking, insert, …"""
    told: bool = True
    """False: an old server, which does not say; `capabilities` is then a guess."""
    context_length: int | None = None
    embedding_length: int | None = None

    @classmethod
    def of(cls, shown: JSON) -> Details:
        """From an answer of `/api/show`."""
        info = shown.get("model_info")
        info = info if isinstance(info, dict) else {}
        family = str(info.get("general.architecture") or "")
        told = shown.get("capabilities")
        guess = (EMBEDDING,) if "bert" in family else (COMPLETION,)
        return cls(
            frozenset(str(word) for word in told) if isinstance(told, list) else frozenset(guess),
            isinstance(told, list),
            _length(info, family, "context_length"),
            _length(info, family, "embedding_length"),
        )

    def lacks(self, capability: str) -> bool:
        """Whether it is certain that the model cannot do that."""
        return self.told and capability not in self.capabilities


def _length(info: JSON, family: str, name: str) -> int | None:
    value = info.get(f"{family}.{name}")
    return value if isinstance(value, int) and value > 0 else None


@dataclass(frozen=True, slots=True)
class Model:
    """One model of the server."""

    name: str
    """The server's name for it, with its tag."""
    details: Details
    remote: bool
    """It runs elsewhere: this server only passes requests on."""
    created: int

    @property
    def capabilities(self) -> tuple[Capability, ...]:
        """What it serves here."""
        return tuple(ours for word, served in SERVED.items() if word in self.details.capabilities for ours in served)

    def offer(self, name: str, loaded: bool) -> ModelOffer:
        """As the registry shows it, under `name`."""
        capabilities = self.capabilities
        return ModelOffer(
            name=name,
            capabilities=capabilities,
            loaded=None if self.remote else loaded,
            context_length=self.details.context_length,
            owned_by="ollama",
            created=self.created,
            embedding_length=self.details.embedding_length if Capability.EMBEDDINGS in capabilities else None,
        )


def listed_models(answer: JSON) -> list[JSON]:
    """The entries of `/api/tags` and `/api/ps` that have a name."""
    models = answer.get("models")
    return [one for one in models or () if isinstance(one, dict) and _name(one)] if isinstance(models, list) else []


def listed_name(entry: JSON) -> str:
    """Its name, with its tag."""
    return full_name(_name(entry))


def _name(entry: JSON) -> str:
    return str(entry.get("name") or entry.get("model") or "")


def model_of(entry: JSON, details: Details) -> Model:
    """From an entry of `/api/tags`."""
    return Model(listed_name(entry), details, bool(entry.get("remote_host")), _unix(entry.get("modified_at")))


def _unix(time: Any) -> int:
    try:
        return int(datetime.fromisoformat(str(time)).timestamp())
    except ValueError:
        return 0


def version_of(answer: JSON) -> tuple[int, ...] | None:
    """`/api/version` as numbers; None for a build that has none (`0.0.0`)."""
    parts = str(answer.get("version") or "").partition("-")[0].split(".")
    numbers = tuple(int(part) for part in parts if part.isdecimal())
    return numbers if any(numbers) else None
