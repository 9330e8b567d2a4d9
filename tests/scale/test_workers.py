"""More workers of one model."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.cluster import Cluster, chat
from tests.conftest import Eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")

WORKERS, SLOTS, REQUESTS = 4, 2, 64


async def test_all_workers_share_the_work(cluster: Cluster, eventually: Eventually) -> None:
    """Requests to two gateways go to all four workers of the model, whose slots are what is scarce."""
    names = [f"crew-{n}" for n in range(WORKERS)]
    settings: dict[str, Any] = {"WORKER_MODELS": "shared", "WORKER_CONCURRENCY": str(SLOTS)}
    await asyncio.gather(*(cluster.start_worker("echo", name=name, **settings) for name in names))
    body = chat(model="shared", echo={"first_delay_ms": 300})
    answers = await asyncio.gather(
        *(cluster.http.post(cluster.urls[n % 2] + "/v1/chat/completions", json=body) for n in range(REQUESTS))
    )
    assert {answer.status_code for answer in answers} == {200}
    await eventually(lambda: sum(len(cluster.attempts(name)) for name in names) == REQUESTS)
    shares = {name: len(cluster.attempts(name)) for name in names}
    assert min(shares.values()) >= REQUESTS // WORKERS // 2, shares
