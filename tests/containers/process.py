"""A container that is treated as a child process is: what `ManagedProcess` promises, a container keeps."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from docker.errors import APIError, NotFound

from cli.embedded.managed_process import LOG_TAIL_BYTES, PROBE_TIMEOUT_S, ProcessStartError
from tests.containers.engine import Engine

POLL_S = 0.03
LOGS_END_S = 5.0
READY_S = 40.0
SIGNALLED = 128
"""Exit codes above this are signals."""


class ContainerProcess:
    """One container, made at its first start and kept until `remove`: a later start is a `docker start` of the same one."""

    def __init__(
        self,
        engine: Engine,
        name: str,
        image: str,
        *,
        log_file: Path,
        alias: str,
        ports: Mapping[int, int],
        command: Sequence[str] | None = None,
        env: Mapping[str, str] | None = None,
        files: Mapping[str, str] | None = None,
        tmpfs: Mapping[str, str] | None = None,
        ready: Callable[[], Awaitable[bool]] | None = None,
        **options: Any,
    ) -> None:
        """`ports`: which of 127.0.0.1 leads to which inside. `files`: text by path, put in before the start. `options`: docker's own."""
        self.name = name
        self.log_file = log_file
        self.alias = alias
        self._engine = engine
        self._image = image
        self._command = list(command) if command else None
        self._env = dict(env or {})
        self._ports = dict(ports)
        self._files = dict(files or {})
        self._ready = ready
        self._tmpfs = dict(tmpfs or {})
        self._options = options
        self._made: Any = None
        self._log_start = 0
        self._logs: threading.Thread | None = None

    @property
    def container(self) -> Any:
        """docker's own object. Raises RuntimeError before the first start."""
        if self._made is None:
            raise RuntimeError(f"{self.name} was never started")
        return self._made.get_wrapped_container()

    @property
    def pid(self) -> int | None:
        """The process below the container's init, as this machine numbers it; another one after each start."""
        init = self._state().get("Pid")
        if not init:
            return None
        children = Path(f"/proc/{init}/task/{init}/children").read_text().split()
        return int(children[0]) if children else int(init)

    @property
    def running(self) -> bool:
        return bool(self._state().get("Running"))

    @property
    def exit_code(self) -> int | None:
        state = self._state()
        if not state or state["Running"]:
            return None
        code = int(state["ExitCode"])
        return SIGNALLED - code if code > SIGNALLED else code

    def poll(self) -> int | None:
        return self.exit_code

    async def start(self) -> None:
        if self.running:
            return
        starting = asyncio.create_task(asyncio.to_thread(self._start))
        try:
            await asyncio.shield(starting)
            await self._wait_ready()
        except BaseException:
            await asyncio.wait([starting])  # a thread goes on when its caller is cancelled
            self.kill()
            raise

    async def restart(self, grace_s: int = 10) -> None:
        """`docker restart`."""
        await asyncio.to_thread(self.container.restart, timeout=grace_s)
        self._join_logs()
        self._follow_logs()
        await self._wait_ready()

    async def stop(self, grace_s: float = 2.0) -> int | None:
        if self._made is None:
            return None
        if self.running:
            with suppress(NotFound):
                await asyncio.to_thread(self.container.stop, timeout=max(1, round(grace_s)))
        return await self.wait()

    async def wait(self) -> int:
        while (code := await asyncio.to_thread(lambda: self.exit_code)) is None:
            await asyncio.sleep(POLL_S)
        await asyncio.to_thread(self._join_logs)
        return code

    def terminate(self) -> None:
        self._signal("SIGTERM")

    def kill(self) -> None:
        self._signal("SIGKILL")

    def pause(self) -> None:
        if self.running:
            self.container.pause()

    def resume(self) -> None:
        if self._state().get("Paused"):
            self.container.unpause()

    def unplug(self) -> None:
        """Cut it off from the network; what runs in it runs on."""
        self._engine.disconnect(self.container)

    def plug_in(self) -> None:
        """Undo `unplug`."""
        self._engine.connect(self.container, self.alias)

    def remove(self) -> None:
        """Let go of it and of all that it holds. It can be started again."""
        if self._made is not None:
            with suppress(NotFound):
                self.container.remove(force=True, v=True)
            self._join_logs()
            self._made = None

    def tail(self, lines: int = 20) -> str:
        try:
            with self.log_file.open("rb") as log:
                log.seek(max(self._log_start, log.seek(0, 2) - LOG_TAIL_BYTES))
                return "\n".join(log.read().decode(errors="replace").splitlines()[-lines:])
        except FileNotFoundError:
            return ""

    def _start(self) -> None:
        if self._made is None:
            self._made = self._make().start()
        else:
            self.container.start()
        self._follow_logs()

    def _make(self) -> Any:
        from testcontainers.core.container import DockerContainer

        made = DockerContainer(self._image, name=f"nx-tests-{self.alias}", env=self._env)
        made.with_network(self._engine.network).with_network_aliases(self.alias)
        made.tmpfs = self._tmpfs
        ports: dict[str, Any] = {f"{inner}/tcp": ("127.0.0.1", outer) for inner, outer in self._ports.items()}
        made.ports = ports  # testcontainers says int where docker takes an address too
        if self._command:
            made.with_command(self._command)
        for path, text in self._files.items():
            made.with_copy_into_container(text.encode(), path)
        labels = self._engine.labels
        return made.with_kwargs(labels=labels, init=True, healthcheck={"test": ["NONE"]}, **self._options)

    def _state(self) -> dict[str, Any]:
        if self._made is None:
            return {}
        try:
            self.container.reload()
        except NotFound:
            return {}
        return dict(self.container.attrs["State"])

    def _signal(self, name: str) -> None:
        if self._made is not None:
            with suppress(NotFound, APIError):  # it has ended
                self.container.kill(name)

    async def _wait_ready(self) -> None:
        if self._ready is None:
            return
        loop = asyncio.get_running_loop()
        deadline = loop.time() + READY_S
        while not await self._says_ready(self._ready):
            if not await asyncio.to_thread(lambda: self.running):
                raise ProcessStartError(f"{self.name} ended with {self.exit_code} while starting:\n{self.tail()}")
            if loop.time() > deadline:
                raise ProcessStartError(f"{self.name} was not ready within {READY_S:g} s:\n{self.tail()}")
            await asyncio.sleep(POLL_S)

    async def _says_ready(self, ready: Callable[[], Awaitable[bool]]) -> bool:
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                return await ready()
        except OSError:
            return False

    def _follow_logs(self) -> None:
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        self.log_file.touch()
        self._log_start = self.log_file.stat().st_size
        since = _seconds(self._state()["StartedAt"])
        self._logs = threading.Thread(target=self._copy_logs, args=(self.container, since), daemon=True)
        self._logs.start()

    def _copy_logs(self, container: Any, since: float) -> None:
        with self.log_file.open("ab", buffering=0) as log, suppress(Exception):  # it ends with the container
            for piece in container.logs(stream=True, follow=True, since=since):
                log.write(piece)

    def _join_logs(self) -> None:
        if self._logs is not None:
            self._logs.join(LOGS_END_S)


def _seconds(moment: str) -> float:
    """Docker's moment in Unix seconds, a little early rather than late."""
    return datetime.fromisoformat(moment[:26].rstrip("Z")).replace(tzinfo=UTC).timestamp()
