"""`nexus up` on a terminal: a live list, and Ctrl-C at any moment, once or twice."""

from __future__ import annotations

import asyncio
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cli.embedded.managed_process import bind_to_parent
from tests.cluster import free_port
from tests.stack.test_killed import none_left
from tests.stack.test_up import NEXUS, UP_S, clean_environment

pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="scans /proc"),
]

CTRL_C = b"\x03"
LOOK_S = 0.05


class Terminal:
    """A pseudoterminal with a command that it controls: Ctrl-C is typed."""

    def __init__(self, folder: Path, *command: str) -> None:
        self.said = ""
        self._master, slave = pty.openpty()
        # The session's first terminal becomes the one that controls it; a signal may not be ignored from the start.
        script = "import os, signal, sys; os.close(os.open(os.ttyname(0), os.O_RDWR)); signal.signal(2, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
        self.process = subprocess.Popen(
            bind_to_parent([sys.executable, "-I", "-S", "-c", script, *command]),
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=folder,
            env=clean_environment(TERM="xterm-256color"),
            start_new_session=True,
        )
        os.close(slave)

    def press_ctrl_c(self) -> None:
        os.write(self._master, CTRL_C)

    def read(self) -> bool:
        """Take what has been printed; False at the end."""
        if not select.select([self._master], [], [], LOOK_S)[0]:
            return True
        try:
            new = os.read(self._master, 65536)
        except OSError:  # how Linux says that nobody is at the other end
            return False
        self.said += new.decode(errors="replace")
        return bool(new)

    async def shows(self, text: str) -> None:
        deadline = time.monotonic() + UP_S
        while text not in self.said:
            assert await asyncio.to_thread(self.read), self.said
            assert time.monotonic() < deadline, self.said

    async def ended(self) -> int:
        deadline = time.monotonic() + UP_S
        while await asyncio.to_thread(self.read):
            assert time.monotonic() < deadline, self.said
        os.close(self._master)
        return self.process.wait(10)


def up(folder: Path, *flags: str) -> Terminal:
    command = [*NEXUS, "up", "--data-dir", str(folder / "nexus"), "--no-local-models", "--no-discover", *flags]
    return Terminal(folder, *command, "--port", str(free_port()), "--observability-port", str(free_port()))


@pytest.mark.parametrize("times", [1, 2, 3])
@pytest.mark.parametrize("moment", ["NATS", "\u2713", "gateway", "Ctrl-C stops everything."])
async def test_ctrl_c(tmp_path: Path, moment: str, times: int) -> None:
    """As soon as there is something to see, while parts come up, and when all is: no traceback, nothing left."""
    terminal = up(tmp_path)
    await terminal.shows(moment)
    for _ in range(times):
        terminal.press_ctrl_c()
    code = await terminal.ended()
    assert "Traceback" not in terminal.said, terminal.said
    assert code in ((0,) if times == 1 else (0, 130, -2)), terminal.said
    if times == 1:
        assert terminal.said.endswith("Stopping\u2026\r\nStopped.\r\n")
    await none_left(tmp_path)


@pytest.mark.parametrize("after_s", [0.2, 0.4, 0.6, 0.8, 1.0, 1.2])
async def test_ctrl_c_before_anything_is_shown(tmp_path: Path, after_s: float) -> None:
    """Python itself and its libraries are on their way then: whenever it comes, it is quiet."""
    terminal = up(tmp_path)
    deadline = time.monotonic() + after_s
    while time.monotonic() < deadline:
        await asyncio.to_thread(terminal.read)
    terminal.press_ctrl_c()
    assert await terminal.ended() in (0, 130, -2), terminal.said
    await none_left(tmp_path)


async def test_ctrl_c_of_a_detached_start(tmp_path: Path) -> None:
    """Before it is up: what has begun is stopped."""
    terminal = up(tmp_path, "-d")
    await terminal.shows("up after")
    terminal.press_ctrl_c()
    assert await terminal.ended() == 130
    assert "Traceback" not in terminal.said
    assert terminal.said.endswith("Stopped.\r\n")
    await none_left(tmp_path)
