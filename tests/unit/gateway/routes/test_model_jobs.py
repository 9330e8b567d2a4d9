"""Which worker a job about models goes to."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.http.request_body import validate_body
from gateway.model_catalog import ModelCatalog
from gateway.target_model import choose_worker
from schemas.endpoints import ENDPOINTS
from schemas.errors import InvalidRequest, NexusError, NotFound
from schemas.jobs import Capability
from schemas.model_jobs import ModelJobRequest
from schemas.presence import ModelOffer, RegistrySnapshot, WorkerPresence, WorkerState


def managing(*ids: str, state: WorkerState = WorkerState.READY) -> ModelCatalog:
    """A catalog with workers that manage models, and one that does not."""
    workers = {
        name: WorkerPresence(
            id=name,
            backend="ollama",
            host="h",
            models=(ModelOffer(name=f"worker:{name}", capabilities=(Capability.MODELS,)),),
            state=state,
        )
        for name in ids
    }
    chats = ModelOffer(name="m", capabilities=(Capability.CHAT,))
    workers["plain"] = WorkerPresence(id="plain", backend="openai", host="h", models=(chats,))
    made = ModelCatalog()
    made.load(RegistrySnapshot(workers=workers))
    return made


def choose(catalog: ModelCatalog, **fields: Any) -> str:
    request = validate_body({"model": "llama3.2:1b", **fields}, ModelJobRequest)
    return choose_worker(request, catalog)


def test_the_only_one_need_not_be_named() -> None:
    assert choose(managing("gpu1")) == "worker:gpu1"


def test_of_several_the_named_one_is_chosen() -> None:
    assert choose(managing("gpu1", "gpu2"), worker="gpu2") == "worker:gpu2"


@pytest.mark.parametrize(("worker", "status"), [(None, 400), ("gpu3", 404), ("plain", 404)])
def test_otherwise_the_choices_are_named(worker: str | None, status: int) -> None:
    with pytest.raises(NexusError, match="gpu1, gpu2") as caught:
        choose(managing("gpu1", "gpu2"), worker=worker)
    assert (caught.value.info.param, caught.value.info.status) == ("worker", status)


def test_a_worker_that_is_not_ready_is_no_choice() -> None:
    with pytest.raises(NotFound, match="No live worker manages models"):
        choose(managing("gpu1", state=WorkerState.UNHEALTHY))


def test_a_misspelt_field_is_named() -> None:
    with pytest.raises(InvalidRequest) as caught:
        choose(managing("gpu1"), keepalive="5m")
    assert caught.value.info.param == "keepalive"


def test_the_gateway_serves_them() -> None:
    paths = {endpoint.path for endpoint in ENDPOINTS if endpoint.capability is Capability.MODELS}
    assert paths == {"/v1/models/pull", "/v1/models/load", "/v1/models/unload"}
