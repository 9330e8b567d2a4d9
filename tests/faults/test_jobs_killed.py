"""Seven rounds: gateways, workers, NATS and Redis are killed and frozen at every step of jobs on their way, and no promise breaks.

A failure names its seed; `python -m tests.soak rounds --seed SEED` plays that round again.
"""

from __future__ import annotations

import os
import random
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.soak.faults import DEEDS, STEPS, draw_faults
from tests.soak.rounds import Rounds, chaos_cluster

CHOSEN = ("7654", "10710", "11653", "12788", "13698", "19425")
"""As few as can be, two faults in each: among them, everything is done that can be done to each part, and something at each step."""
SEEDS = [*CHOSEN, f"luck-{os.environ['NEXUS_TEST_LUCK']}"]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def rounds(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Rounds]:
    async with chaos_cluster(tmp_path_factory.mktemp("chaos")) as cluster:
        yield Rounds(cluster)


def test_the_rounds_leave_nothing_out() -> None:
    """Every deed to every part, and a fault at every step."""
    faults = [fault for seed in CHOSEN for fault in draw_faults(random.Random(seed))]
    assert {(fault.part, fault.deed) for fault in faults} == {(part, deed) for part in DEEDS for deed in DEEDS[part]}
    assert {fault.step for fault in faults} == set(STEPS)


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("seed", SEEDS)
async def test_round(rounds: Rounds, seed: str) -> None:
    """Every job that was accepted ends once, whole, and as each of its witnesses says; nothing is left in the queue."""
    wrong = await rounds.play(seed)
    assert wrong == [], "\n".join(wrong)


@pytest.mark.asyncio(loop_scope="module")
async def test_afterwards(rounds: Rounds) -> None:
    """All records are in Redis and say what the words say; what was cancelled before it began has never run."""
    assert rounds.answered == len(SEEDS) * 24
    wrong = await rounds.look_back()
    assert wrong == [], "\n".join(wrong)
