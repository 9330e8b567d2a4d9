"""Make the entries of `GET /v1/catalog`: models and aliases with their state, their workers and their parameters."""

from __future__ import annotations

from gateway.descriptors.reader import DescribedModel, DescriptorReader, describe
from gateway.model_catalog import COLD, LOADED, LOADING, CatalogModel, ModelCatalog
from gateway.paused_models import PausedModels
from schemas.descriptors import JSON, EndpointDescriptor
from schemas.endpoints import BY_PATH
from schemas.parameters.standard import standard_descriptor
from schemas.presence import ModelOffer, WorkerPresence, WorkerState

READY, ON_HOLD, PAUSED, OFFLINE = "ready", "held", "paused", "offline"
LOAD_STATES = (LOADED, LOADING, COLD)
"""From best to worst. A model is loaded if any worker has loaded it."""
FORM = "multipart/form-data"


class CatalogEntries:
    """Reads the models of the newest snapshot as entries of the catalog."""

    def __init__(self, catalog: ModelCatalog, paused: PausedModels, descriptors: DescriptorReader) -> None:
        self._catalog = catalog
        self._paused = paused
        self._descriptors = descriptors

    def entry(self, model: CatalogModel, *, problems: bool) -> JSON:
        """Return a model or alias with its parameters. `problems`: tell which workers' descriptors are invalid."""
        described = self._describe(model)
        entry = self._summary(model, described, problems=problems)
        endpoints = described.descriptor.endpoints if described is not None else {}
        return entry | {"endpoints": {path: _endpoint(path, one, model.name) for path, one in endpoints.items()}}

    def listing(self, models: list[CatalogModel], *, problems: bool) -> JSON:
        """Return entries that refer to their parameters by digest, and the parameters of each digest once."""
        descriptors: dict[str, JSON] = {}
        entries: list[JSON] = []
        for model in models:
            described = self._describe(model)
            entry = self._summary(model, described, problems=problems)
            if described is not None:
                entry["descriptor"] = described.digest
                if described.digest not in descriptors:
                    endpoints = described.descriptor.endpoints.items()
                    descriptors[described.digest] = {path: _endpoint(path, one, None) for path, one in endpoints}
            entries.append(entry)
        return {"object": "list", "data": entries, "descriptors": descriptors}

    def _describe(self, model: CatalogModel) -> DescribedModel | None:
        """Return the descriptor of a model, or of the one that an alias resolves to. Without a worker it has the usual parameters."""
        name = model.resolves_to or (model.alias_for[0] if model.alias_for else model.name)
        described = self._descriptors.of_model(name)
        if described is not None or not model.capabilities:
            return described
        usual = standard_descriptor(tuple(sorted(model.capabilities)))
        return None if usual is None else describe((usual,))

    def _summary(self, model: CatalogModel, described: DescribedModel | None, *, problems: bool) -> JSON:
        serving = model.resolves_to or model.name
        offers = [] if model.alias_for and model.resolves_to is None else self._descriptors.offers(serving)
        entry: JSON = {
            "id": model.name,
            "object": "catalog.model",
            "created": model.created,
            "owned_by": model.owned_by,
            "capabilities": sorted(model.capabilities),
            "state": self._state(model, serving),
            "workers": [_worker(worker, offer) for worker, offer in offers],
            "slots": sum(worker.slots for worker, _ in offers if worker.state is WorkerState.READY),
            "limitations": sorted(
                {one.feature for worker, _ in offers for one in worker.limitations if one.model == serving}
            ),
        }
        if described is not None:
            entry["modalities"] = described.modalities
            entry |= {"differing": list(described.differing)} if described.differing else {}
            entry |= {"problems": list(described.problems)} if problems and described.problems else {}
        for name in ("context_length", "embedding_length", "voices"):
            entry |= {name: value} if (value := getattr(model, name)) else {}
        return entry | (
            {"alias_for": list(model.alias_for), "resolves_to": model.resolves_to} if model.alias_for else {}
        )

    def _state(self, model: CatalogModel, serving: str) -> str:
        if self._descriptors.is_held(serving):
            return ON_HOLD
        if not model.live:
            return OFFLINE
        if self._paused.resumes_at(serving) is not None:
            return PAUSED
        states = {state for _, state in model.loads}
        return next((state for state in LOAD_STATES if state in states), READY)


def _worker(worker: WorkerPresence, offer: ModelOffer) -> JSON:
    entry: JSON = {"id": worker.id, "backend": worker.backend, "state": worker.state.value, "slots": worker.slots}
    if offer.loaded is not None:
        entry["load"] = LOADED if offer.loaded else LOADING if offer.loading else COLD
    return entry


def _endpoint(path: str, endpoint: EndpointDescriptor, model: str | None) -> JSON:
    form = bool(BY_PATH[path].files)
    example = endpoint.example if model is None else {"model": model} | endpoint.example
    return {"content_type": FORM if form else "application/json", "parameters": endpoint.parameters, "example": example}
