"""A component of the stack: a child process that is restarted when it dies, with growing delays between restarts.

made -> (start) -> up -> died -> (delay) -> up …
                             `-> retired: it ended by its own decision
any -> (stop) -> ended
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Protocol

from cli.embedded.binaries import BinaryMissing
from cli.embedded.managed_process import ProcessStartError, describe_exit

MIN_RESTART_DELAY_S = 0.25
MAX_RESTART_DELAY_S = 10.0
STABLE_AFTER_S = 30.0
"""A component that has run this long restarts with the shortest delay again."""

START_ERRORS = (ProcessStartError, BinaryMissing, OSError)
"""Exceptions of a start; each message is for the user."""

Notify = Callable[[str], None]


class Child(Protocol):
    """What a component supervises: a `ManagedProcess` or an `EmbeddedServer`."""

    @property
    def name(self) -> str:
        """The name of its log file."""

    @property
    def pid(self) -> int | None:
        """The process id, also after its end; None before the first start."""

    @property
    def running(self) -> bool:
        """Whether the process is alive."""

    def start(self) -> Awaitable[None]:
        """Start it and wait until it is ready. Raises one of `START_ERRORS`; nothing is left running then."""

    def restart(self) -> Awaitable[None]:
        """Start it again on the same port and data. Raises as `start` does."""

    def wait(self) -> Awaitable[int]:
        """Wait for its end and return the exit code."""

    def stop(self, grace_s: float) -> Awaitable[object]:
        """Send SIGTERM, and SIGKILL after `grace_s`."""

    def kill(self) -> None:
        """Send SIGKILL to its whole process group."""

    def kill_leftovers(self) -> None:
        """Send SIGKILL to processes that it has left in its group after its end."""


class Component:
    """Supervises one child process of the stack. `grace_s` is its time to end after SIGTERM."""

    def __init__(self, child: Child, title: str, *, grace_s: float, retires: bool = False) -> None:
        """Describe a component. With `retires`, exit code 0 is the child's own decision, and it is not restarted."""
        self.name = child.name
        self.title = title
        self._child = child
        self._grace_s = grace_s
        self._retires = retires
        self._supervisor: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """The process id; None while the child does not run."""
        return self._child.pid if self._child.running else None

    async def start(self) -> None:
        """Start the child and wait until it is ready. Raises one of `START_ERRORS`; nothing is left running then."""
        await self._child.start()

    def supervise(self, notify: Notify, on_restart: Callable[[], None]) -> None:
        """Restart the child whenever it dies, from now on. `notify` gets a line on each death and restart."""
        self._supervisor = asyncio.create_task(self._supervise(notify, on_restart), name=f"supervise {self.name}")

    async def _supervise(self, notify: Notify, on_restart: Callable[[], None]) -> None:
        delay = MIN_RESTART_DELAY_S
        clock = asyncio.get_running_loop().time
        while True:
            began = clock()
            code = await self._child.wait() if self._child.pid is not None else None
            self._child.kill_leftovers()
            if code == 0 and self._retires:
                notify(f"{self.title} was drained and has ended; the next `nexus up` starts it again")
                return
            if clock() - began > STABLE_AFTER_S:
                delay = MIN_RESTART_DELAY_S
            notify(f"{self.title} died ({describe_exit(code)}); restarting it in {delay:g} s")
            while not await self._try_restart(delay, notify):
                delay = min(2 * delay, MAX_RESTART_DELAY_S)
            delay = min(2 * delay, MAX_RESTART_DELAY_S)
            on_restart()
            notify(f"{self.title} is back (pid {self.pid})")

    async def _try_restart(self, delay: float, notify: Notify) -> bool:
        await asyncio.sleep(delay)
        try:
            await self._child.restart()
        except START_ERRORS as error:
            notify(f"{self.title} did not restart: {error}")
            return False
        return True

    async def stop(self) -> None:
        """End the child: SIGTERM, then SIGKILL after `grace_s`. Does nothing if it never started or has died."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor
        await self._child.stop(self._grace_s)
        self._child.kill_leftovers()

    def kill(self) -> None:
        """Send SIGKILL to the child and to every process that it has started in its group."""
        self._child.kill()
        self._child.kill_leftovers()
