"""A part of the stack is brought back when it dies, retires when it was asked to, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Self

import pytest

from cli.embedded.managed_process import ManagedProcess, ProcessStartError
from cli.stack.component import Component, describe_exit

SLEEPER = "import time; time.sleep(60)"
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
time.sleep(60)
"""
PARENT = """
import subprocess, sys, time
print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]).pid, flush=True)
time.sleep(60)
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Kept:
    """A part under supervision, and what it said."""

    def __init__(self, tmp_path: Path, code: str, *, retires: bool = False) -> None:
        self.process = ManagedProcess("child", [sys.executable, "-c", code], log_file=tmp_path / "child.log")
        self.part = Component.of(self.process, "the child", grace_s=0.3, retires=retires)
        self.said: list[str] = []
        self.changes = 0

    async def __aenter__(self) -> Self:
        await self.part.start()
        self.part.keep(self.said.append, self._changed)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.part.stop()

    def _changed(self) -> None:
        self.changes += 1

    def printed_pid(self) -> int:
        return int(self.process.log_file.read_text().split()[-1])


async def test_killed_part_comes_back(tmp_path: Path, eventually):
    """Another process, and the user is told twice."""
    async with Kept(tmp_path, SLEEPER) as kept:
        first = kept.part.pid
        os.kill(first, signal.SIGKILL)
        await eventually(lambda: kept.changes == 1)
        assert kept.part.pid not in {None, first}
    assert "the child died (SIGKILL)" in kept.said[0]
    assert "is back" in kept.said[1]
    assert kept.part.pid is None


async def test_part_that_keeps_dying_is_tried_less_and_less_often(tmp_path: Path, eventually):
    """The pause doubles."""
    async with Kept(tmp_path, "raise SystemExit(3)") as kept:
        await eventually(lambda: sum("died" in one for one in kept.said) >= 3)
    pauses = [one.rpartition(" in ")[2] for one in kept.said if "died" in one]
    assert pauses[:3] == ["0.25 s", "0.5 s", "1 s"]
    assert "exit code 3" in kept.said[0]


async def test_retiring_part_is_left_alone_after_exit_code_0(tmp_path: Path, eventually):
    """A drained worker went as it was told."""
    async with Kept(tmp_path, "pass", retires=True) as kept:
        await eventually(lambda: kept.said)
        assert "drained" in kept.said[0]
        assert kept.part.pid is None
    assert kept.changes == 0


async def test_retiring_part_that_fails_comes_back(tmp_path: Path, eventually):
    """A crash is not a drain."""
    async with Kept(tmp_path, "raise SystemExit(1)", retires=True) as kept:
        await eventually(lambda: kept.changes)


async def test_stop_forces_a_stubborn_part_and_its_children(tmp_path: Path, eventually):
    """After the grace everything that it has started is gone too."""
    async with Kept(tmp_path, STUBBORN) as kept:
        child = await eventually(lambda: kept.process.log_file.read_text().strip() and kept.printed_pid())
        leader = kept.part.pid
        before = asyncio.get_running_loop().time()
        await kept.part.stop()
        assert asyncio.get_running_loop().time() - before < 2
        await eventually(lambda: not alive(leader) and not alive(child))


async def test_children_of_a_killed_part_are_gone_before_it_comes_back(tmp_path: Path, eventually):
    """A gateway that supervised others leaves none of them at its port."""
    async with Kept(tmp_path, PARENT) as kept:
        child = await eventually(lambda: kept.process.log_file.read_text().strip() and kept.printed_pid())
        os.kill(kept.part.pid, signal.SIGKILL)
        await eventually(lambda: not alive(child))
        await eventually(lambda: kept.changes == 1)


async def test_stop_while_it_waits_to_come_back(tmp_path: Path, eventually):
    """Nothing starts after the stop."""
    async with Kept(tmp_path, "raise SystemExit(3)") as kept:
        await eventually(lambda: kept.said)
        await kept.part.stop()
        said = len(kept.said)
        await asyncio.sleep(0.6)
        assert len(kept.said) == said
        assert kept.part.pid is None


async def test_stop_of_a_part_that_never_started():
    """Also a start that failed half way is cleaned up."""

    async def fail() -> None:
        raise ProcessStartError("no")

    part = Component("x", "x", process=lambda: None, start=fail, grace_s=0.1)
    with pytest.raises(ProcessStartError):
        await part.start()
    await part.stop()
    part.kill()


def test_endings_in_words():
    """Exit codes, signals, and neither."""
    assert [describe_exit(code) for code in (0, 3, -9, None)] == [
        "exit code 0", "exit code 3", "SIGKILL", "it was not running",
    ]  # fmt: skip
