"""Index the models and aliases of the registry's snapshot.

A model has precedence over an alias of the same name, also while it has no live worker: an alias never takes requests from a model.
An alias refers to models only, never to another alias.

A name without a tag means `:latest`, as in Ollama: `llama3` finds `llama3:latest` unless a live model or an alias has exactly the
requested name, and the other way round. Both forms share one queue and one entry in the list.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from gateway.model_suggestions import ModelSuggestions, did_you_mean
from schemas.errors import InvalidRequest, ModelNotFound, Unavailable
from schemas.jobs import Capability
from schemas.presence import Alias, CatalogEntry, ModelOffer, RegistrySnapshot, WorkerPresence, WorkerState

LATEST = ":latest"
LOADED, LOADING, COLD = "loaded", "loading", "cold"
MANAGEMENT = frozenset({Capability.MODELS})


@dataclass(frozen=True, slots=True)
class CatalogModel:
    """A model or an alias, as callers see it."""

    name: str
    capabilities: frozenset[Capability]
    live: frozenset[Capability]
    """Capabilities that a ready worker serves now."""
    owned_by: str = "nexus"
    created: int = 0
    context_length: int | None = None
    """The smallest context length of the workers that serve the model."""
    voices: tuple[str, ...] = ()
    embedding_length: int | None = None
    loads: tuple[tuple[str, str], ...] = ()
    """Ready workers with the load state that their servers report: LOADED, LOADING or COLD."""
    alias_for: tuple[str, ...] = ()
    """Targets, if this is an alias."""
    resolves_to: str | None = None
    """The target of an alias that serves now; None for models, and for aliases without a live target."""


class ModelCatalog:
    """Resolves names of models and aliases against the newest snapshot of the registry."""

    def __init__(self) -> None:
        self._models: dict[str, CatalogModel] = {}
        self._aliases: dict[str, Alias] = {}
        self._unsupported: dict[str, Literal["refuse", "adapt"]] = {}
        self._ready = False
        self._suggestions = ModelSuggestions()

    @property
    def ready(self) -> bool:
        """Whether a snapshot was loaded."""
        return self._ready

    def load(self, snapshot: RegistrySnapshot) -> None:
        """Replace the index by the content of `snapshot`."""
        known = {entry.name: _from_entry(entry) for entry in snapshot.models.values()}
        for worker in snapshot.workers.values():
            for offer in worker.models:
                known[offer.name] = _with_offer(offer, worker, known.get(offer.name))
        self._models = known
        self._aliases = snapshot.aliases
        policies = ((name, alias.unsupported_parameters) for name, alias in self._aliases.items() if name not in known)
        self._unsupported = {name: policy for name, policy in policies if policy is not None}
        self._ready = True
        usable = (name for name, model in known.items() if model.live - MANAGEMENT)
        self._suggestions.load((*usable, *(name for name in snapshot.aliases if name not in known)))

    def list_known(self) -> Collection[CatalogModel]:
        """Return every model that is or was served."""
        return self._models.values()

    def list_live(self) -> list[CatalogModel]:
        """Return the models that a ready worker serves, sorted by name."""
        return sorted((m for m in self._models.values() if m.live), key=lambda m: m.name)

    def list_usable(self) -> list[CatalogModel]:
        """Return the live models and aliases that callers may use, sorted by name; without those that can only be managed."""
        aliases = (self._as_model(alias) for name, alias in self._aliases.items() if name not in self._models)
        listed = [*self.list_live(), *(alias for alias in aliases if alias.live)]
        return sorted((model for model in listed if model.live - MANAGEMENT), key=lambda model: model.name)

    def list_all(self) -> list[CatalogModel]:
        """Return all models and aliases that callers may name, live or not, sorted by name; without those that can only be managed."""
        aliases = (self._as_model(alias) for name, alias in self._aliases.items() if name not in self._models)
        models = (model for model in self._models.values() if model.capabilities - MANAGEMENT)
        return sorted((*models, *aliases), key=lambda model: model.name)

    def get(self, name: str) -> CatalogModel | None:
        """Return a model that is or was served, or an alias for one; None for other names."""
        model = self._find(name)
        if name in self._aliases and name not in self._models:
            model = self._as_model(self._aliases[name])
        return model if model is not None and model.capabilities - MANAGEMENT else None

    def _find(self, name: str) -> CatalogModel | None:
        """Return the model with this name or its other form (with or without `:latest`), preferring the live one."""
        model = self._models.get(name)
        if model is None or not model.live:
            other = self._models.get(other_form(name))
            if other is not None and (model is None or other.live):
                return other
        return model

    def is_model(self, name: str) -> bool:
        """Return whether a model of this name is or was served."""
        return name in self._models

    def is_alias(self, name: str) -> bool:
        """Return whether requests for this name go to an alias's targets."""
        return name in self._aliases and name not in self._models

    def resolved_target(self, alias: Alias) -> str | None:
        """Return the model that serves an alias now; None: no target is live, or a model of that name hides the alias."""
        return None if self.is_model(alias.name) else self._as_model(alias).resolves_to

    def aliases_of(self, target: str) -> list[str]:
        """Return the names of the aliases that have `target` among their targets."""
        return sorted(alias.name for alias in self._aliases.values() if target in alias.targets)

    def unsupported(self, name: str) -> Literal["", "refuse", "adapt"]:
        """Return an alias's policy for parameters that a server does not support; empty: the worker decides."""
        return self._unsupported.get(name, "")

    def is_live(self, name: str, capability: Capability) -> bool:
        """Return whether a ready worker serves the model's capability."""
        model = self._models.get(name)
        return model is not None and capability in model.live

    def resolve(self, name: str, capability: Capability, *, may_wait: bool = False) -> str:
        """Return the model that serves `name`; with `may_wait`, also one without a live worker.

        Raises ModelNotFound; InvalidRequest if the model lacks the capability; Unavailable without a live worker.
        """
        model = None if name in self._aliases and name not in self._models else self._find(name)
        if model is not None:
            if capability in model.live or (may_wait and capability in model.capabilities):
                return model.name
            if capability in model.capabilities:
                raise Unavailable(f"The model '{_truncated(name)}' has no live worker right now; try again shortly.")
            raise _unsupported(f"model '{_truncated(name)}'", capability)
        alias = self._aliases.get(name)
        if alias is not None:
            return self._resolve_alias(alias, capability, may_wait=may_wait)
        if not self._ready:
            raise Unavailable("The gateway has not read the list of models yet; try again shortly.")
        raise self.not_found(name)

    def not_found(self, name: str) -> ModelNotFound:
        """Return the error for an unknown model, with the most similar known name."""
        return ModelNotFound(
            f"The model '{_truncated(name)}' does not exist.{self.suggestion(name)} GET /v1/models lists those that do.",
            param="model",
        )

    def suggestion(self, name: str) -> str:
        """Return a sentence, after a space, that names the most similar model or alias; empty if none is similar."""
        return did_you_mean(self._suggestions.nearest(name))

    def _resolve_alias(self, alias: Alias, capability: Capability, *, may_wait: bool) -> str:
        targets = self._targets(alias)
        for target in targets:
            if capability in target.live:
                return target.name
        for target in targets:
            if may_wait and capability in target.capabilities:
                return target.name
        description = f"alias '{_truncated(alias.name)}' (for {_quoted(alias.targets)})"
        if any(capability in target.capabilities for target in targets):
            raise Unavailable(f"No model of the {description} has a live worker right now; try again shortly.")
        if targets:
            raise _unsupported(description, capability)
        suggestion = self.suggestion(alias.targets[0])
        raise ModelNotFound(
            f"No model of the {description} exists.{suggestion} GET /v1/models lists those that do.", param="model"
        )

    def _targets(self, alias: Alias) -> list[CatalogModel]:
        """Return the alias's targets that are known models."""
        return [model for model in map(self._find, alias.targets) if model is not None]

    def _as_model(self, alias: Alias) -> CatalogModel:
        """Return an alias in the form of a model, with the capabilities of all its targets."""
        targets = self._targets(alias)
        serving = next((target for target in targets if target.live - MANAGEMENT), None)
        return CatalogModel(
            name=alias.name,
            capabilities=frozenset().union(*(target.capabilities for target in targets)),
            live=frozenset().union(*(target.live for target in targets)),
            created=serving.created if serving else 0,
            context_length=serving.context_length if serving else None,
            voices=serving.voices if serving else (),
            embedding_length=serving.embedding_length if serving else None,
            loads=serving.loads if serving else (),
            alias_for=alias.targets,
            resolves_to=serving.name if serving else None,
        )

    def default(self, capability: Capability) -> str:
        """Return the default model of a capability: the alias `default-<capability>`, or the only live model.

        Raises InvalidRequest if there is no such alias, and not exactly one live model.
        """
        alias = f"default-{capability}"
        if alias in self._models or alias in self._aliases:
            return alias
        names = [model.name for model in self.list_live() if capability in model.live]
        if len(names) == 1:
            return names[0]
        advice = f"Set 'model' to one of: {', '.join(names)}" if names else "No live model serves this endpoint now"
        raise InvalidRequest(f"The request names no model, and there is no default. {advice}.", param="model")


def _from_entry(entry: CatalogEntry) -> CatalogModel:
    return CatalogModel(entry.name, frozenset(entry.capabilities), frozenset(), entry.owned_by, entry.created)


def other_form(name: str) -> str:
    """Return the model's name with `:latest` if it lacks it, without it if it has it."""
    return name.removesuffix(LATEST) if name.endswith(LATEST) else name + LATEST


def _with_offer(offer: ModelOffer, worker: WorkerPresence, known: CatalogModel | None) -> CatalogModel:
    """Return the model with what one more worker offers."""
    ready = worker.state is WorkerState.READY
    old = known or CatalogModel(offer.name, frozenset(), frozenset())
    offered = frozenset(offer.capabilities)
    return CatalogModel(
        offer.name,
        old.capabilities | offered,
        old.live | offered if ready else old.live,
        offer.owned_by,
        offer.created or old.created,
        min((length for length in (offer.context_length, old.context_length) if length), default=None),
        tuple(dict.fromkeys((*old.voices, *offer.voices))),
        offer.embedding_length or old.embedding_length,
        (*old.loads, (worker.id, _load_state(offer))) if ready and offer.loaded is not None else old.loads,
    )


def _load_state(offer: ModelOffer) -> str:
    if offer.loaded:
        return LOADED
    return LOADING if offer.loading else COLD


def _unsupported(what: str, capability: Capability) -> InvalidRequest:
    return InvalidRequest(f"The {what} does not serve {capability}.", param="model", code="unsupported_model")


def _quoted(models: tuple[str, ...]) -> str:
    return ", ".join(f"'{_truncated(name)}'" for name in models)


def _truncated(name: str) -> str:
    return name if len(name) <= 100 else name[:100] + "…"
