"""Choose the model whose queue a request joins."""

from __future__ import annotations

from typing import Any

from gateway.model_catalog import ModelCatalog
from schemas.endpoints import EndpointSpec
from schemas.errors import InvalidRequest, NotFound
from schemas.jobs import Capability
from schemas.model_jobs import ModelJobRequest

WORKER_PREFIX = "worker:"
"""A worker that manages models offers the model `worker:<id>` for these jobs."""


def target_model(endpoint: EndpointSpec, request: Any, catalog: ModelCatalog) -> str:
    """Return the model whose queue the request joins: the one it names, else the default for the capability.

    A job about models joins the queue of a worker. Raises InvalidRequest, NotFound.
    """
    if endpoint.capability is Capability.MODELS:
        return choose_worker(request, catalog)
    name: str | None = request.model
    return name or catalog.default(endpoint.capability)


def choose_worker(request: ModelJobRequest, catalog: ModelCatalog) -> str:
    """Return the offer of the worker that the request names, or of the only one there is. Raises InvalidRequest, NotFound."""
    offers = [
        model.name
        for model in catalog.list_live()
        if Capability.MODELS in model.live and model.name.startswith(WORKER_PREFIX)
    ]
    if request.worker is None and len(offers) == 1:
        return offers[0]
    if request.worker is not None and WORKER_PREFIX + request.worker in offers:
        return WORKER_PREFIX + request.worker
    choices = ", ".join(name.removeprefix(WORKER_PREFIX) for name in offers)
    if not choices:
        raise NotFound(
            "No live worker manages models. Start one that does: nexus worker --backend ollama --url URL",
            param="worker",
            code="worker_not_found",
        )
    if request.worker is None:
        raise InvalidRequest(f"Several workers manage models. Set 'worker' to one of: {choices}.", param="worker")
    raise NotFound(
        f"No live worker of this name manages models. Set 'worker' to one of: {choices}.",
        param="worker",
        code="worker_not_found",
    )
