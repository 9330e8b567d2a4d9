"""Which models there are, from the registry's snapshot."""

from __future__ import annotations

from dataclasses import dataclass

from schemas.errors import InvalidRequest, ModelNotFound, Unavailable
from schemas.jobs import Capability
from schemas.presence import Snapshot, WorkerState


@dataclass(frozen=True, slots=True)
class Model:
    """One model as callers see it."""

    name: str
    capabilities: frozenset[Capability]
    live: frozenset[Capability]
    """Those that a ready worker serves now."""
    owned_by: str
    created: int
    context_length: int | None


class Catalogue:
    """An index over one snapshot after another."""

    def __init__(self) -> None:
        self._models: dict[str, Model] = {}
        self._ready = False

    @property
    def ready(self) -> bool:
        """There has been a snapshot."""
        return self._ready

    def load(self, snapshot: Snapshot) -> None:
        """Replace everything by what `snapshot` says."""
        known: dict[str, Model] = {}
        for entry in snapshot.models.values():
            known[entry.name] = Model(
                entry.name, frozenset(entry.capabilities), frozenset(), entry.owned_by, entry.created, None
            )
        for worker in snapshot.workers.values():
            for offer in worker.models:
                caps = frozenset(offer.capabilities)
                live = caps if worker.state is WorkerState.READY else frozenset()
                old = known.get(offer.name)
                known[offer.name] = Model(
                    offer.name,
                    caps | (old.capabilities if old else frozenset()),
                    live | (old.live if old else frozenset()),
                    offer.owned_by,
                    offer.created or (old.created if old else 0),
                    offer.context_length or (old.context_length if old else None),
                )
        self._models = known
        self._ready = True

    def live(self) -> list[Model]:
        """Models that can be used now, by name."""
        return sorted((m for m in self._models.values() if m.live), key=lambda m: m.name)

    def get(self, name: str) -> Model | None:
        """A model that is or was served here."""
        return self._models.get(name)

    def is_live(self, name: str, capability: Capability) -> bool:
        """Whether a ready worker serves this now."""
        model = self._models.get(name)
        return model is not None and capability in model.live

    def resolve(self, name: str, capability: Capability) -> str:
        """The name under which workers offer `name`. Raises ModelNotFound, InvalidRequest, Unavailable."""
        if self.is_live(name, capability):
            return name
        model = self._models.get(name)
        if not self._ready:
            raise Unavailable("the gateway does not know yet which models there are; try again shortly")
        if model is None:
            raise ModelNotFound(
                f"The model '{_short(name)}' does not exist. GET /v1/models lists those that do.", param="model"
            )
        if capability in model.capabilities:
            raise Unavailable(f"The model '{_short(name)}' has no live worker right now; try again shortly.")
        raise InvalidRequest(
            f"The model '{_short(name)}' does not serve {capability}.", param="model", code="unsupported_model"
        )


def _short(name: str) -> str:
    return name if len(name) <= 100 else name[:100] + "…"
