"""A component of the stack is restarted when it dies, retires by its own decision, and leaves no process behind."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Self

import pytest

from cli.embedded.managed_process import ManagedProcess, ProcessStartError, describe_exit
from cli.stack.component import Component

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


class Supervised:
    """A component under supervision, and its messages."""

    def __init__(self, tmp_path: Path, code: str, *, retires: bool = False) -> None:
        self.process = ManagedProcess("child", [sys.executable, "-c", code], log_file=tmp_path / "child.log")
        self.component = Component(self.process, "the child", grace_s=0.3, retires=retires)
        self.messages: list[str] = []
        self.restarts = 0

    async def __aenter__(self) -> Self:
        await self.component.start()
        self.component.supervise(self.messages.append, self._count_restart)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.component.stop()

    def _count_restart(self) -> None:
        self.restarts += 1

    def printed_pid(self) -> int:
        return int(self.process.log_file.read_text().split()[-1])


async def test_killed_component_is_restarted(tmp_path: Path, eventually):
    """With another process, and two messages."""
    async with Supervised(tmp_path, SLEEPER) as supervised:
        first = supervised.component.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        await eventually(lambda: supervised.restarts == 1)
        assert supervised.component.pid not in {None, first}
    assert "the child died (SIGKILL)" in supervised.messages[0]
    assert "is back" in supervised.messages[1]
    assert supervised.component.pid is None


async def test_component_that_keeps_dying_is_restarted_less_and_less_often(tmp_path: Path, eventually):
    """The delay doubles."""
    async with Supervised(tmp_path, "raise SystemExit(3)") as supervised:
        await eventually(lambda: sum("died" in one for one in supervised.messages) >= 3)
    delays = [one.rpartition(" in ")[2] for one in supervised.messages if "died" in one]
    assert delays[:3] == ["0.25 s", "0.5 s", "1 s"]
    assert "exit code 3" in supervised.messages[0]


async def test_retiring_component_is_not_restarted_after_exit_code_0(tmp_path: Path, eventually):
    """A drained worker has ended by its own decision."""
    async with Supervised(tmp_path, "pass", retires=True) as supervised:
        await eventually(lambda: supervised.messages)
        assert "drained" in supervised.messages[0]
        assert supervised.component.pid is None
    assert supervised.restarts == 0


async def test_retiring_component_that_fails_is_restarted(tmp_path: Path, eventually):
    """A crash is not a drain."""
    async with Supervised(tmp_path, "raise SystemExit(1)", retires=True) as supervised:
        await eventually(lambda: supervised.restarts)


async def test_stop_kills_a_stubborn_component_and_its_children(tmp_path: Path, eventually):
    """After the grace time every process that it has started has ended too."""
    async with Supervised(tmp_path, STUBBORN) as supervised:
        child = await eventually(lambda: supervised.process.log_file.read_text().strip() and supervised.printed_pid())
        leader = supervised.component.pid
        assert leader is not None
        before = asyncio.get_running_loop().time()
        await supervised.component.stop()
        assert asyncio.get_running_loop().time() - before < 2
        await eventually(lambda: not alive(leader) and not alive(child))


async def test_children_of_a_killed_component_end_before_it_is_restarted(tmp_path: Path, eventually):
    """A gateway that supervised others leaves none of them at its port."""
    async with Supervised(tmp_path, PARENT) as supervised:
        child = await eventually(lambda: supervised.process.log_file.read_text().strip() and supervised.printed_pid())
        assert supervised.component.pid is not None
        os.kill(supervised.component.pid, signal.SIGKILL)
        await eventually(lambda: not alive(child))
        await eventually(lambda: supervised.restarts == 1)


async def test_stop_during_the_delay_before_a_restart(tmp_path: Path, eventually):
    """Nothing starts after the stop."""
    async with Supervised(tmp_path, "raise SystemExit(3)") as supervised:
        await eventually(lambda: supervised.messages)
        await supervised.component.stop()
        count = len(supervised.messages)
        await asyncio.sleep(0.6)
        assert len(supervised.messages) == count
        assert supervised.component.pid is None


async def test_stop_of_a_component_that_never_started(tmp_path: Path):
    """Also a start that failed half way is cleaned up."""

    async def never() -> bool:
        return False

    child = ManagedProcess("x", [sys.executable, "-c", "raise SystemExit(1)"], log_file=tmp_path / "x.log", ready=never)
    component = Component(child, "x", grace_s=0.1)
    await component.stop()
    component.kill()
    with pytest.raises(ProcessStartError):
        await component.start()
    await component.stop()
    component.kill()
    assert component.pid is None


async def test_failed_start_leaves_no_child_of_its_own(tmp_path: Path, eventually):
    """A process that ends before it is ready may have started others."""

    async def never() -> bool:
        return False

    code = PARENT.replace("time.sleep(60)\n", "raise SystemExit(1)\n")
    child = ManagedProcess("x", [sys.executable, "-c", code], log_file=tmp_path / "x.log", ready=never)
    with pytest.raises(ProcessStartError):
        await child.start()
    pid = int(child.log_file.read_text().split()[-1])
    await eventually(lambda: not alive(pid))


def test_exit_codes_in_words():
    """Exit codes, signals, and neither."""
    assert [describe_exit(code) for code in (0, 3, -9, None)] == [
        "exit code 0", "exit code 3", "SIGKILL", "it was not running",
    ]  # fmt: skip
