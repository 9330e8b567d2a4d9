"""Several gateway processes behind one port: forked when everything is imported, so that they share that memory."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable

import structlog

log = structlog.get_logger(__name__)

RESTART_DELAY_S = 5.0
"""Delay before a process that exited with an error is started again."""
POLL_INTERVAL_S = 0.1
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Supervisor:
    """Runs processes that accept from one socket, and restarts those that die."""

    def __init__(self, count: int, listener: socket.socket, serve: Callable[[int], int]) -> None:
        """`serve` runs in a process of its own, gets the process's index from 0, and returns its exit status."""
        self._count = count
        self._listener = listener
        self._serve = serve
        self._stopping = False
        self._children: dict[int, int] = {}
        """Index of each running process, by its process id."""
        self._restart_at: dict[int, float] = {}
        """Processes that exited with an error, with the time at which they are started again."""

    def run(self) -> int:
        """Run until SIGTERM or SIGINT, which are passed on. Returns the exit status."""
        for number in SIGNALS:
            signal.signal(number, self._stop)
        for index in range(self._count):
            self._start(index)
        status = 0
        while self._children or (self._restart_at and not self._stopping):
            time.sleep(POLL_INTERVAL_S)
            if self._stopping:
                # Otherwise connections would wait here when the children no longer accept.
                self._listener.close()
            for index in [one for one, at in self._restart_at.items() if time.monotonic() > at and not self._stopping]:
                del self._restart_at[index]
                self._start(index)
            for pid, index in list(self._children.items()):
                ended, wait_status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    del self._children[pid]
                    status = max(status, self._handle_end(index, os.waitstatus_to_exitcode(wait_status)))
        return status

    def _start(self, index: int) -> None:
        # A signal waits until its handler knows the child.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        pid = os.fork()
        if not pid:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            sys.exit(self._serve(index))
        self._children[pid] = index
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _stop(self, number: int, _frame: object) -> None:
        self._stopping = True
        for pid in self._children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _handle_end(self, index: int, code: int) -> int:
        """Start the process again, unless the gateway stops. Returns its share of the exit status."""
        if self._stopping:
            return abs(code)
        if code > 0:
            log.error("gateway.process_failed", index=index, code=code)
            self._restart_at[index] = time.monotonic() + RESTART_DELAY_S
        else:
            log.error("gateway.process_died", index=index, code=code)
            self._start(index)
        return 0
