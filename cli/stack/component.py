"""One part of the stack: a child process that is started, brought back when it dies, and stopped.

made -> (start) -> up -> died -> (pause) -> up …
                             `-> retired: it ended as it was asked to
any -> (stop) -> ended
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Awaitable, Callable

from cli.embedded.binaries import BinaryMissing
from cli.embedded.managed_process import ManagedProcess, ProcessStartError

FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 10.0
STEADY_S = 30.0
"""A part that lived this long begins anew with the shortest pause."""

START_ERRORS = (ProcessStartError, BinaryMissing, OSError)
"""What a start may raise: each message is for the user."""

Notify = Callable[[str], None]


class Component:
    """A child of the stack. `again` brings it back on the same port and data; `grace_s` is its time to end by itself."""

    def __init__(
        self,
        name: str,
        title: str,
        *,
        process: Callable[[], ManagedProcess | None],
        start: Callable[[], Awaitable[None]],
        again: Callable[[], Awaitable[None]] | None = None,
        grace_s: float,
        retires: bool = False,
    ) -> None:
        """Describe a part. `retires`: an end with exit code 0 is its own will, and it is not brought back."""
        self.name = name
        self.title = title
        self.grace_s = grace_s
        self.detail = ""
        """What the terminal shows beside it."""
        self._process = process
        self._start = start
        self._again = again or start
        self._retires = retires
        self._keeper: asyncio.Task[None] | None = None
        self._groups: set[int] = set()

    @classmethod
    def of(cls, process: ManagedProcess, title: str, *, grace_s: float, retires: bool = False) -> Component:
        """A part that is just a process."""
        return cls(process.name, title, process=lambda: process, start=process.start, grace_s=grace_s, retires=retires)

    @property
    def pid(self) -> int | None:
        """Of the process that lives now."""
        process = self._process()
        return process.pid if process is not None and process.running else None

    async def start(self) -> None:
        """Start it and return when it is ready. Raises one of `START_ERRORS`; nothing is left running then."""
        try:
            await self._start()
        finally:
            self._note_group()

    def keep(self, notify: Notify, changed: Callable[[], None]) -> None:
        """From now on bring it back when it dies, saying so. `changed` is called when its process is another one."""
        self._keeper = asyncio.create_task(self._keep(notify, changed), name=f"keep {self.name}")

    async def _keep(self, notify: Notify, changed: Callable[[], None]) -> None:
        pause = FIRST_PAUSE_S
        clock = asyncio.get_running_loop().time
        while True:
            began = clock()
            code = await self._ended()
            self._sweep()
            if code == 0 and self._retires:
                notify(f"{self.title} has been drained and has left; the next `nexus up` starts it again")
                return
            if clock() - began > STEADY_S:
                pause = FIRST_PAUSE_S
            notify(f"{self.title} died ({describe_exit(code)}); starting it again in {pause:g} s")
            while not await self._came_back(pause, notify):
                pause = min(2 * pause, LONGEST_PAUSE_S)
            pause = min(2 * pause, LONGEST_PAUSE_S)
            changed()
            notify(f"{self.title} is back (pid {self.pid})")

    async def _ended(self) -> int | None:
        process = self._process()
        return await process.wait() if process is not None and process.pid is not None else None

    async def _came_back(self, pause: float, notify: Notify) -> bool:
        await asyncio.sleep(pause)
        try:
            await self._again()
        except START_ERRORS as error:
            notify(f"{self.title} did not come back: {error}")
            return False
        finally:
            self._note_group()
        return True

    async def stop(self) -> None:
        """End it: politely, and by force after `grace_s`. Fine when it never started or has already died."""
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
        process = self._process()
        self._note_group()
        if process is not None:
            await process.stop(self.grace_s)
        self._sweep()

    def kill(self) -> None:
        """End it at once, with whatever it has started itself."""
        process = self._process()
        self._note_group()
        if process is not None:
            process.kill()
        self._sweep()

    def _note_group(self) -> None:
        process = self._process()
        if process is not None and process.pid is not None:
            self._groups.add(process.pid)

    def _sweep(self) -> None:
        """Kill what dead processes of this part have left behind: each was the leader of its own group."""
        process = self._process()
        for group in [one for one in self._groups if process is None or one != process.pid or not process.running]:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(group, signal.SIGKILL)
            self._groups.discard(group)


def describe_exit(code: int | None) -> str:
    """An exit code in words."""
    if code is None:
        return "it was not running"
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return signal.Signals(-code).name
    return f"signal {-code}"
