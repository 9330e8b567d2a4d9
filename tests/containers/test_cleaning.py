"""What a run leaves behind in the engine: nothing, however it ends."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import docker
import pytest

from cli.embedded.managed_process import bind_to_parent
from tests.conftest import Eventually
from tests.containers.engine import RUN_LABEL, Engine, require_engine
from tests.servers import ROOT

HANGS = """
import asyncio


async def test_that_hangs(own_redis):
    await asyncio.sleep(600)
"""


class Run:
    """A test run of its own, that hangs with a server started."""

    def __init__(self, folder: Path) -> None:
        self.id = uuid.uuid4().hex[:12]
        self._docker = docker.from_env()
        self._file = folder / "test_hanging.py"
        self._file.write_text(HANGS)

    async def start(self) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *bind_to_parent([sys.executable, "-m", "pytest", "-q", "--servers", "containers", "-p", "tests.conftest"]),
            *("-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"), str(self._file)),
            cwd=ROOT,
            env=os.environ | {"NEXUS_TEST_RUN": self.id, "PYTHONPATH": str(ROOT)},
            stdout=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )

    def left(self) -> tuple[int, int]:
        """Its containers and networks."""
        mine = {"label": f"{RUN_LABEL}={self.id}"}
        containers = self._docker.containers.list(all=True, filters=mine, ignore_removed=True)
        return len(containers), len(self._docker.networks.list(filters=mine))


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    require_engine()
    yield Run(tmp_path)
    Engine().sweep()


async def test_ctrl_c(run: Run, eventually: Eventually) -> None:
    """Interrupted in the middle of a test, it takes its servers and its network with it."""
    process = await run.start()
    await eventually(lambda: run.left() == (1, 1), timeout_s=60)
    process.send_signal(signal.SIGINT)
    await asyncio.wait_for(process.wait(), 60)
    assert run.left() == (0, 0)


async def test_killed(run: Run, eventually: Eventually) -> None:
    """Killed, it cannot; whichever run is next does, and lets those be that live."""
    killed, lives = run, Run(run._file.parent)
    first, second = await killed.start(), await lives.start()
    try:
        await eventually(lambda: (killed.left(), lives.left()) == ((1, 1), (1, 1)), timeout_s=60)
        first.kill()
        await first.wait()
        assert killed.left() == (1, 1)
        Engine().sweep()
        assert killed.left() == (0, 0)
        assert lives.left() == (1, 1)
    finally:
        second.send_signal(signal.SIGINT)
        await asyncio.wait_for(second.wait(), 60)
    assert lives.left() == (0, 0)
