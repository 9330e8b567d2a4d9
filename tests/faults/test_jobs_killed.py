"""Twenty rounds: gateways, workers, NATS and Redis are killed and frozen at every step of jobs on their way, and no promise breaks.

A failure names its seed; `python -m tests.soak rounds --seed SEED` plays that round again.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.soak.rounds import Rounds, chaos_cluster

pytestmark = pytest.mark.asyncio(loop_scope="module")

SEEDS = [*map(str, range(1, 20)), f"luck-{os.environ['NEXUS_TEST_LUCK']}"]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def rounds(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Rounds]:
    async with chaos_cluster(tmp_path_factory.mktemp("chaos")) as cluster:
        yield Rounds(cluster)


@pytest.mark.parametrize("seed", SEEDS)
async def test_round(rounds: Rounds, seed: str) -> None:
    """Every job that was accepted ends once, whole, and as each of its witnesses says; nothing is left in the queue."""
    wrong = await rounds.play(seed)
    assert wrong == [], "\n".join(wrong)


async def test_afterwards(rounds: Rounds) -> None:
    """All records are in Redis and say what the words say; what was cancelled before it began has never run."""
    assert rounds.answered == len(SEEDS) * 24
    wrong = await rounds.look_back()
    assert wrong == [], "\n".join(wrong)
