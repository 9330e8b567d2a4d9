"""Which models there are, and what aliases stand for, from the registry's snapshot.

A model has precedence over an alias of the same name, also while it has no live worker: an alias never takes requests
away from a model. An alias stands for models only, never for another alias.

A name without a tag is `:latest`, as with Ollama: `llama3` finds `llama3:latest` where no model or alias has exactly the name that was
asked for, or none that is live; and the other way round. So both forms share one queue, and one entry in the list.
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
    """One model as callers see it."""

    name: str
    capabilities: frozenset[Capability]
    live: frozenset[Capability]
    """Those that a ready worker serves now."""
    owned_by: str = "nexus"
    created: int = 0
    context_length: int | None = None
    """The smallest of the workers that serve it."""
    voices: tuple[str, ...] = ()
    embedding_length: int | None = None
    loads: tuple[tuple[str, str], ...] = ()
    """Ready workers whose servers say so, each with LOADED, LOADING or COLD."""
    alias_for: tuple[str, ...] = ()
    """Of an alias: its targets."""
    resolves_to: str | None = None
    """Of an alias: the target that serves now; None: none does."""


class ModelCatalog:
    """An index over one snapshot after another."""

    def __init__(self) -> None:
        self._models: dict[str, CatalogModel] = {}
        self._aliases: dict[str, Alias] = {}
        self._unsupported: dict[str, Literal["refuse", "adapt"]] = {}
        self._ready = False
        self._suggestions = ModelSuggestions()

    @property
    def ready(self) -> bool:
        """There has been a snapshot."""
        return self._ready

    def load(self, snapshot: RegistrySnapshot) -> None:
        """Replace everything by what `snapshot` says."""
        known = {entry.name: _remembered(entry) for entry in snapshot.models.values()}
        for worker in snapshot.workers.values():
            for offer in worker.models:
                known[offer.name] = _joined(offer, worker, known.get(offer.name))
        self._models = known
        self._aliases = snapshot.aliases
        said = ((name, alias.unsupported_parameters) for name, alias in self._aliases.items() if name not in known)
        self._unsupported = {name: policy for name, policy in said if policy is not None}
        self._ready = True
        usable = (name for name, model in known.items() if model.live - MANAGEMENT)
        self._suggestions.load((*usable, *(name for name in snapshot.aliases if name not in known)))

    def list_known(self) -> Collection[CatalogModel]:
        """Models that are or were served here."""
        return self._models.values()

    def list_live(self) -> list[CatalogModel]:
        """Models that can be used now, by name."""
        return sorted((m for m in self._models.values() if m.live), key=lambda m: m.name)

    def list_usable(self) -> list[CatalogModel]:
        """What callers may choose from, by name: models that do more than be managed, and aliases that resolve now."""
        aliases = (self._as_model(alias) for name, alias in self._aliases.items() if name not in self._models)
        shown = [*self.list_live(), *(alias for alias in aliases if alias.live)]
        return sorted((model for model in shown if model.live - MANAGEMENT), key=lambda model: model.name)

    def get(self, name: str) -> CatalogModel | None:
        """What callers may ask about: a model that is or was served here, or an alias for one."""
        model = self._find(name)
        if name in self._aliases and name not in self._models:
            model = self._as_model(self._aliases[name])
        return model if model is not None and model.capabilities - MANAGEMENT else None

    def _find(self, name: str) -> CatalogModel | None:
        """Return the model of this name, or of its other form with or without `:latest`; one that is live goes before one that is not."""
        model = self._models.get(name)
        if model is None or not model.live:
            other = self._models.get(other_form(name))
            if other is not None and (model is None or other.live):
                return other
        return model

    def is_model(self, name: str) -> bool:
        """Whether this is the name of a model that is or was served here."""
        return name in self._models

    def is_alias(self, name: str) -> bool:
        """Whether requests for this name go to an alias's targets."""
        return name in self._aliases and name not in self._models

    def resolved_target(self, alias: Alias) -> str | None:
        """The model that serves for an alias now; None: none does, or the alias is hidden by a model of its name."""
        return None if self.is_model(alias.name) else self._as_model(alias).resolves_to

    def aliases_of(self, target: str) -> list[str]:
        """The aliases that have this name among their targets."""
        return sorted(alias.name for alias in self._aliases.values() if target in alias.targets)

    def unsupported(self, name: str) -> Literal["", "refuse", "adapt"]:
        """What becomes of parameters that a server lacks, where `name` is an alias that says so; empty: the worker decides."""
        return self._unsupported.get(name, "")

    def is_live(self, name: str, capability: Capability) -> bool:
        """Whether a ready worker serves this now."""
        model = self._models.get(name)
        return model is not None and capability in model.live

    def resolve(self, name: str, capability: Capability, *, may_wait: bool = False) -> str:
        """The name under which workers offer `name`; with `may_wait` also of what no live worker serves now.

        Raises ModelNotFound, InvalidRequest, Unavailable.
        """
        model = None if name in self._aliases and name not in self._models else self._find(name)
        if model is not None:
            if capability in model.live or (may_wait and capability in model.capabilities):
                return model.name
            if capability in model.capabilities:
                raise Unavailable(f"The model '{_short(name)}' has no live worker right now; try again shortly.")
            raise _unsupported(f"model '{_short(name)}'", capability)
        alias = self._aliases.get(name)
        if alias is not None:
            return self._resolve_alias(alias, capability, may_wait=may_wait)
        if not self._ready:
            raise Unavailable("the gateway does not know yet which models there are; try again shortly")
        raise self.not_found(name)

    def not_found(self, name: str) -> ModelNotFound:
        """Return the error for a model that nobody knows, with the name that may have been meant."""
        return ModelNotFound(
            f"The model '{_short(name)}' does not exist.{self.suggestion(name)} GET /v1/models lists those that do.",
            param="model",
        )

    def suggestion(self, name: str) -> str:
        """Return a sentence with the model or alias that is most like `name`, and a space before it; empty: none is."""
        return did_you_mean(self._suggestions.nearest(name))

    def _resolve_alias(self, alias: Alias, capability: Capability, *, may_wait: bool) -> str:
        targets = self._targets(alias)
        for target in targets:
            if capability in target.live:
                return target.name
        for target in targets:
            if may_wait and capability in target.capabilities:
                return target.name
        said = f"alias '{_short(alias.name)}' (for {_names(alias.targets)})"
        if any(capability in target.capabilities for target in targets):
            raise Unavailable(f"No model of the {said} has a live worker right now; try again shortly.")
        if targets:
            raise _unsupported(said, capability)
        meant = self.suggestion(alias.targets[0])
        raise ModelNotFound(f"No model of the {said} exists.{meant} GET /v1/models lists those that do.", param="model")

    def _targets(self, alias: Alias) -> list[CatalogModel]:
        """The models that it names, as far as they are known; another alias is not followed."""
        return [model for model in map(self._find, alias.targets) if model is not None]

    def _as_model(self, alias: Alias) -> CatalogModel:
        """An alias as callers see it: it can do what any of its targets can."""
        targets = self._targets(alias)
        shown = next((target for target in targets if target.live - MANAGEMENT), None)
        return CatalogModel(
            name=alias.name,
            capabilities=frozenset().union(*(target.capabilities for target in targets)),
            live=frozenset().union(*(target.live for target in targets)),
            created=shown.created if shown else 0,
            context_length=shown.context_length if shown else None,
            voices=shown.voices if shown else (),
            embedding_length=shown.embedding_length if shown else None,
            loads=shown.loads if shown else (),
            alias_for=alias.targets,
            resolves_to=shown.name if shown else None,
        )

    def default(self, capability: Capability) -> str:
        """What a request that names no model gets: the alias `default-<capability>`, or the only live model.

        Raises InvalidRequest when that is not decided.
        """
        alias = f"default-{capability}"
        if alias in self._models or alias in self._aliases:
            return alias
        names = [model.name for model in self.list_live() if capability in model.live]
        if len(names) == 1:
            return names[0]
        which = f"one of: {', '.join(names)}" if names else "none serves this now"
        raise InvalidRequest(f"say which model; {which}", param="model")


def _remembered(entry: CatalogEntry) -> CatalogModel:
    return CatalogModel(entry.name, frozenset(entry.capabilities), frozenset(), entry.owned_by, entry.created)


def other_form(name: str) -> str:
    """Return the other name of the same model: `llama3` for `llama3:latest`, and the other way round."""
    return name.removesuffix(LATEST) if name.endswith(LATEST) else name + LATEST


def _joined(offer: ModelOffer, worker: WorkerPresence, known: CatalogModel | None) -> CatalogModel:
    """What is known of a model after one more worker offers it."""
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


def _names(models: tuple[str, ...]) -> str:
    return ", ".join(f"'{_short(name)}'" for name in models)


def _short(name: str) -> str:
    return name if len(name) <= 100 else name[:100] + "…"
