"""`POST /v1/models/pull`, `/v1/models/load` and `/v1/models/unload`: jobs for a worker, not for a model."""

from __future__ import annotations

from gateway.endpoints import Endpoint
from gateway.model_catalog import ModelCatalog
from schemas.errors import InvalidRequest, NotFound
from schemas.jobs import Capability
from schemas.keys import Scope
from schemas.model_jobs import ModelJobRequest

PREFIX = "worker:"
"""Under this and its id, a worker that manages models offers to do so."""


def choose_worker(request: ModelJobRequest, catalog: ModelCatalog, capability: Capability) -> str:
    """The offer of the worker that the request names, or of the only one there is. Raises InvalidRequest, NotFound."""
    offers = [model.name for model in catalog.list_live() if capability in model.live and model.name.startswith(PREFIX)]
    if request.worker is None and len(offers) == 1:
        return offers[0]
    if request.worker is not None and PREFIX + request.worker in offers:
        return PREFIX + request.worker
    choices = ", ".join(name.removeprefix(PREFIX) for name in offers)
    if not choices:
        raise NotFound(
            "no live worker manages models. One whose backend is `ollama` does: nexus worker --backend ollama --url URL",
            param="worker",
            code="worker_not_found",
        )
    if request.worker is None:
        raise InvalidRequest(f"say which worker is to do it; these can: {choices}", param="worker")
    raise NotFound(
        f"no live worker of that name manages models; these do: {choices}", param="worker", code="worker_not_found"
    )


ENDPOINTS = tuple(
    Endpoint(
        path=f"/v1/models/{verb}",
        capability=Capability.MODELS,
        schema=ModelJobRequest,
        target=choose_worker,
        scope=Scope.ADMIN,
    )
    for verb in ("pull", "load", "unload")
)
