"""`nexus up` on a terminal: the live list, and Ctrl-C at any moment, once or twice."""

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
from tests.fork_server import ForkedProcess, fork_up
from tests.stack.test_killed import none_left
from tests.stack.test_up import NEXUS, UP_S, clean_environment

pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="scans /proc"),
]

CTRL_C = b"\x03"
LOOK_S = 0.05


class Terminal:
    """A pseudoterminal with a `nexus up` that it controls: Ctrl-C is typed. With `start`, Python starts for it; else it is forked."""

    def __init__(self, folder: Path, *flags: str, start: bool) -> None:
        self.output = ""
        self._master, slave = pty.openpty()
        arguments = ["--data-dir", str(folder / "nexus"), "--no-local-models", "--no-discover", *flags]
        arguments += ["--port", str(free_port()), "--observability-port", str(free_port())]
        environment = clean_environment(TERM="xterm-256color")
        self.process: subprocess.Popen[bytes] | ForkedProcess
        if start:
            self.process = self._start([*NEXUS, "up", *arguments], environment, folder, slave)
        else:
            self.process = fork_up(arguments, environment, folder, {0: slave, 1: slave, 2: slave})
        os.close(slave)

    def _start(
        self, command: list[str], environment: dict[str, str], folder: Path, slave: int
    ) -> subprocess.Popen[bytes]:
        # The session's first terminal becomes the one that controls it; a signal may not be ignored from the start.
        script = "import os, signal, sys; os.close(os.open(os.ttyname(0), os.O_RDWR)); signal.signal(2, signal.SIG_DFL); os.write(1, b'$'); os.execv(sys.argv[1], sys.argv[1:])"
        return subprocess.Popen(
            bind_to_parent([sys.executable, "-I", "-S", "-c", script, *command]),
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=folder,
            env=environment,
            start_new_session=True,
        )

    def press_ctrl_c(self) -> None:
        os.write(self._master, CTRL_C)

    def read(self) -> bool:
        """Take what has been printed; False at the end."""
        if not select.select([self._master], [], [], LOOK_S)[0]:
            return True
        try:
            new = os.read(self._master, 65536)
        except OSError:  # how Linux prints that nobody is at the other end
            return False
        self.output += new.decode(errors="replace")
        return bool(new)

    async def shows(self, text: str) -> None:
        deadline = time.monotonic() + UP_S
        while text not in self.output:
            assert await asyncio.to_thread(self.read), self.output
            assert time.monotonic() < deadline, self.output

    async def ended(self) -> int:
        deadline = time.monotonic() + UP_S
        while await asyncio.to_thread(self.read):
            assert time.monotonic() < deadline, self.output
        os.close(self._master)
        return self.process.wait(10)


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("moment", ["NATS", "\u2713", "gateway", "Ctrl-C stops everything."])
async def test_ctrl_c(tmp_path: Path, moment: str, times: int) -> None:
    """At the first output, while components start, and once all are up: no traceback, no process left."""
    terminal = Terminal(tmp_path, start=False)
    await terminal.shows(moment)
    for _ in range(times):
        terminal.press_ctrl_c()
    code = await terminal.ended()
    assert "Traceback" not in terminal.output, terminal.output
    assert code in ((0,) if times == 1 else (0, 130, -2)), terminal.output
    if times == 1:
        assert terminal.output.endswith("Stopping\u2026\r\nStopped.\r\n")
    await none_left(tmp_path)


@pytest.mark.parametrize("after_s", [0.2, 0.4, 0.6, 0.8, 1.0, 1.2])
async def test_ctrl_c_before_any_output(tmp_path: Path, after_s: float) -> None:
    """Python may still be importing: no traceback at any moment."""
    terminal = Terminal(tmp_path, start=True)
    await terminal.shows("$")  # before that, the terminal has nobody to send a signal to
    deadline = time.monotonic() + after_s
    while time.monotonic() < deadline:
        await asyncio.to_thread(terminal.read)
    terminal.press_ctrl_c()
    code = await terminal.ended()
    # On a busy machine, Python itself may still be starting.
    assert code in (0, 130, -2) or "cli/main.py" not in terminal.output, terminal.output
    await none_left(tmp_path)


async def test_ctrl_c_of_a_detached_start(tmp_path: Path) -> None:
    """Before it is up: started components are stopped."""
    terminal = Terminal(tmp_path, "-d", start=True)
    await terminal.shows("up after")
    terminal.press_ctrl_c()
    assert await terminal.ended() == 130
    assert "Traceback" not in terminal.output
    assert terminal.output.endswith("Stopped.\r\n")
    await none_left(tmp_path)
