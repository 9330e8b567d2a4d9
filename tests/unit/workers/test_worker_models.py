"""A worker of a server whose models change: what it offers, and how soon."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from backbone.testing.blobs import MemoryBlobStore
from backbone.testing.bus import MemoryBroker, MemoryWorkerBus
from backbone.testing.job_log import MemoryWorkerLog
from backbone.testing.registry import MemoryHub, MemoryRegistry
from schemas.jobs import Capability
from schemas.presence import ModelOffer
from tests.conftest import Eventually
from workers.backends.base import Backend, BackendConfig, Discovery, Finish, Output, Task
from workers.metrics import WorkerMetrics
from workers.worker import Worker

MANAGES = ModelOffer(name="worker:w", capabilities=(Capability.MODELS,))


class Shelf(Backend):
    """A server with the models that the test sets."""

    manages_models = True

    def __init__(self) -> None:
        super().__init__(BackendConfig())
        self.models = ["old"]

    async def discover(self) -> Discovery:
        return Discovery(tuple(ModelOffer(name=name, capabilities=(Capability.CHAT,)) for name in self.models))

    async def health(self) -> None:
        pass

    async def run(self, _: Task) -> AsyncIterator[Output]:
        yield Finish()


@pytest.fixture
def hub() -> MemoryHub:
    return MemoryHub()


@pytest.fixture
async def shelf(hub: MemoryHub) -> AsyncIterator[Shelf]:
    """On a worker that discovers once an hour unless it is notified."""
    shelf, broker = Shelf(), MemoryBroker()
    worker = Worker(
        worker_id="w", host="h", backend=shelf, blobs=MemoryBlobStore(), log=MemoryWorkerLog(broker), registry=MemoryRegistry(hub),
        metrics=WorkerMetrics(), ack_wait_s=15.0, health_interval_s=3600.0, drain_s=0.2,
    )  # fmt: skip
    life = asyncio.create_task(worker.run(MemoryWorkerBus(broker, worker.on_job)))
    yield shelf
    worker.drain()
    await life


def offered(hub: MemoryHub) -> list[str]:
    return [model.name for worker in hub.workers.values() for model in worker.models]


async def test_a_worker_that_manages_models_is_offered_as_such(
    hub: MemoryHub, shelf: Shelf, eventually: Eventually
) -> None:
    """The worker offers it even while its server has no models."""
    await eventually(lambda: offered(hub) == ["old", MANAGES.name])
    shelf.models = []
    shelf.notify_changed()
    await eventually(lambda: offered(hub) == [MANAGES.name])
    assert hub.workers["w"].models == (MANAGES,)


async def test_a_change_that_the_backend_knows_of_is_offered_at_once(
    hub: MemoryHub, shelf: Shelf, eventually: Eventually
) -> None:
    """The worker does not wait for the next discovery."""
    await eventually(lambda: "old" in offered(hub))
    shelf.models = ["old", "new"]
    shelf.notify_changed()
    await eventually(lambda: "new" in offered(hub))
