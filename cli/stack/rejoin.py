"""Let a worker or gateway that was started by hand follow its stack through restarts: new passwords, certificates, perhaps ports.

When another start of the stack runs on the data directory, the process runs its own command line once more in its own place:
same pid, terminal and arguments. Whoever started it notices nothing.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

from cli.stack.data_dir import DataDir, StackState

POLL_INTERVAL_S = 0.5
REJOIN_VARIABLE = "NEXUS_REJOIN"
"""Set for a process that takes its own place: it waits for its stack, whatever happens meanwhile."""


@dataclass(frozen=True, slots=True)
class StackMembership:
    """The start of a stack that this process has joined, and the environment that it was started with."""

    data: DataDir
    start_id: str
    environment: Mapping[str, str]

    def follow(self, *, has_children: bool) -> None:
        """From now on rejoin the stack when it has been started again. Returns at once.

        `has_children`: a SIGTERM ends this process's own work and children, and then it calls `rejoin_if_restarted`.
        """
        watch = partial(self._watch, self._end_children if has_children else self._rejoin)
        threading.Thread(target=watch, name="rejoin", daemon=True).start()

    def rejoin_if_restarted(self) -> None:
        """Rejoin, and do not return, where another start of the stack runs."""
        if self._is_restarted():
            self._rejoin()

    def rejoin_if_ended(self) -> None:
        """Rejoin, and do not return, where the joined start has ended: the next one is waited for."""
        state = self.data.running()
        if state is None:
            self._run_again("has ended; waiting for its next start")
        if state.start_id != self.start_id:
            self._rejoin()

    def _watch(self, leave: Callable[[], object]) -> None:
        seen = self._stamp()
        while True:
            time.sleep(POLL_INTERVAL_S)
            stamp = self._stamp()
            if stamp != seen and self._is_restarted():
                leave()
                return
            seen = stamp

    def _is_restarted(self) -> bool:
        state = self.data.running()
        return state is not None and state.start_id != self.start_id

    def _end_children(self) -> None:
        """Children would keep the port that the next ones want."""
        os.kill(os.getpid(), signal.SIGTERM)

    def _stamp(self) -> tuple[int, int]:
        with suppress(OSError):
            stat = self.data.state_file.stat()
            return stat.st_ino, stat.st_mtime_ns
        return 0, 0

    def _rejoin(self) -> NoReturn:
        self._run_again("has been started again; joining it")

    def _run_again(self, why: str) -> NoReturn:
        print(f"nexus: the stack on {self.data.root} {why}", file=sys.stderr, flush=True)
        os.execve(sys.executable, sys.orig_argv, {**self.environment, REJOIN_VARIABLE: "1"})  # noqa: S606 - its own program


def wait_for_stack(data: DataDir) -> StackState | None:
    """Return the stack that runs on the data directory, None where none does. A process that rejoins waits for one."""
    rejoins = os.environ.pop(REJOIN_VARIABLE, "")
    while (state := data.running()) is None and rejoins:
        time.sleep(POLL_INTERVAL_S)
    return state
