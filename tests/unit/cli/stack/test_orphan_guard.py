"""The orphan guard ends the children of a killed parent without the kernel's parent death signal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cli.embedded.managed_process import bind_to_parent
from cli.stack.process_identity import process_identity

PARENT = """
import signal, subprocess, sys, time
from cli.embedded.orphan_guard import ORPHAN_GUARD
quick = "import time; print(1, flush=True); time.sleep(600)"
polite = "import signal, sys, time; signal.signal(15, lambda *_: (open(sys.argv[1], 'w').close(), sys.exit())); print(1, flush=True); time.sleep(600)"
deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); print(1, flush=True); time.sleep(600)"
mother = "import subprocess, sys, time; c = subprocess.Popen(['sleep', '600']); print(c.pid, flush=True); time.sleep(600)"
pids = []
for script, number in ((quick, 9), (polite, 15), (deaf, 15), (mother, 9)):
    child = subprocess.Popen([sys.executable, "-c", script, sys.argv[1]], start_new_session=True, stdout=subprocess.PIPE, text=True)
    greeting = int(child.stdout.readline())
    ORPHAN_GUARD.add(child.pid, number)
    pids += [child.pid, *([greeting] if greeting > 1 else [])]
free = subprocess.Popen(["sleep", "600"], start_new_session=True)
ORPHAN_GUARD.add(free.pid, 9)
ORPHAN_GUARD.remove(free.pid)
print(*pids, free.pid, flush=True)
time.sleep(600)
"""
WITHIN_S = 5.0


@pytest.mark.parametrize("paused", [False, True])
def test_child_groups_end_with_a_killed_parent(tmp_path: Path, paused: bool) -> None:
    """By their death signal, then by SIGKILL; a removed child lives on."""
    polite = tmp_path / "polite"
    command = bind_to_parent([sys.executable, "-c", PARENT, str(polite)])
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        *pids, free = map(int, parent.stdout.readline().split())
        assert len(pids) == 5
        if paused:
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
        parent.kill()
    deadline = time.monotonic() + WITHIN_S
    try:
        while left := [pid for pid in pids if process_identity(pid)]:
            assert time.monotonic() < deadline, left
            time.sleep(0.02)
        assert polite.exists()
        assert process_identity(free)
    finally:
        os.kill(free, signal.SIGKILL)
