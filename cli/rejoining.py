"""Let a worker or gateway that was started by hand follow its stack through restarts: new passwords, certificates, perhaps ports.

When another start of the stack runs on the data directory, the process runs its own command line once more in its own place:
same pid, terminal and arguments. Whoever started it notices nothing.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

from cli.datadir import DataDir, StackState

POLL_INTERVAL_S = 0.5
REJOIN_VARIABLE = "NEXUS_REJOIN"
"""Set for a process that takes its own place: it waits for its stack, whatever happens meanwhile."""


@dataclass(frozen=True, slots=True)
class Joined:
    """The start of a stack that this process has joined, and the environment that it was started with."""

    data: DataDir
    start_id: str
    environment: Mapping[str, str]

    def follow(self) -> None:
        """From now on rejoin the stack when it has been started again. Returns at once."""
        threading.Thread(target=self._watch, name="rejoin", daemon=True).start()

    def rejoin_if_restarted(self) -> None:
        """Does not return where another start of the stack runs."""
        state = self.data.running()
        if state is not None and state.start_id != self.start_id:
            self._rejoin()

    def _watch(self) -> None:
        seen = self._stamp()
        while True:
            time.sleep(POLL_INTERVAL_S)
            stamp = self._stamp()
            if stamp != seen:
                self.rejoin_if_restarted()
                seen = stamp

    def _stamp(self) -> tuple[int, int]:
        with suppress(OSError):
            stat = self.data.state_file.stat()
            return stat.st_ino, stat.st_mtime_ns
        return 0, 0

    def _rejoin(self) -> NoReturn:
        print(f"nexus: the stack on {self.data.root} has been started again; joining it", file=sys.stderr, flush=True)
        os.execve(sys.executable, sys.orig_argv, {**self.environment, REJOIN_VARIABLE: "1"})  # noqa: S606 - its own program


def joined(data: DataDir, state: StackState, variables: Mapping[str, str]) -> Joined:
    """Describe what this process joins with `variables`, before they are set.

    A shell may have set the same ones from `worker.env`: they are the start's, and not the next one's.
    """
    environment = {name: value for name, value in os.environ.items() if variables.get(name) != value}
    return Joined(data, state.start_id, environment)


def wait_for_stack(data: DataDir) -> StackState | None:
    """Return the stack that runs on the data directory, None where none does. A process that rejoins waits for one."""
    rejoins = os.environ.pop(REJOIN_VARIABLE, "")
    while (state := data.running()) is None and rejoins:
        time.sleep(POLL_INTERVAL_S)
    return state
