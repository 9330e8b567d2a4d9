"""Jobs that are cancelled while they begin, with heartbeats as far apart as in production."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.backends.doubles.openai import OpenAIDouble
from tests.cluster import Cluster, Crew, chat
from tests.conftest import Eventually
from tests.faults.test_callers import STOP_S, behave, on_double

pytestmark = pytest.mark.asyncio(loop_scope="module")

RETURN_TRIP_S = 1.0
"""For the double to be asked, and to notice that it is left."""


@pytest.fixture(scope="module")
def cluster_settings() -> dict[str, str]:
    return {"ACK_WAIT_S": "15"}


@pytest_asyncio.fixture(loop_scope="module")
async def double() -> AsyncIterator[OpenAIDouble]:
    async with OpenAIDouble() as server:
        yield server


async def test_cancelled_as_it_begins(
    crew: Crew, cluster: Cluster, double: OpenAIDouble, eventually: Eventually
) -> None:
    """Ten jobs, each cancelled at the moment in which its backend is asked: each backend call is stopped within two seconds."""
    await on_double(crew, double)
    behave(double, crew, first_delay_s=60.0)
    body = {"endpoint": "/v1/chat/completions", "body": chat(model=crew.model)}
    for _ in range(10):
        double.disconnected.clear()
        job = json.loads((await cluster.post("/v1/jobs", body)).text)["id"]
        await eventually(lambda: double.streaming == 1)
        answer = await cluster.post(f"/v1/jobs/{job}/cancel", None)
        assert json.loads(answer.text)["status"] == "cancelled"
        await asyncio.wait_for(double.disconnected.wait(), STOP_S + RETURN_TRIP_S)
        await eventually(lambda: double.streaming == 0)
