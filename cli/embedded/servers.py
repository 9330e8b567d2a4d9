"""NATS, etcd and Valkey servers as child processes on 127.0.0.1, for `nexus up` and for tests.

    server = NatsServer(Path(".nexus/nats"))
    await server.start()      # ready when this returns
    server.url                # nats://127.0.0.1:<port>
    await server.restart()    # same port, same data
    await server.stop()

A server without a given port takes a free one, and another one if a different process takes it first.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import uuid
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

from cli.embedded import binaries
from cli.embedded.managed_process import ManagedProcess, ProcessStartError
from cli.private_files import write_private

HOST = "127.0.0.1"
MIB = 1024 * 1024
GIB = 1024 * MIB
PORT_RETRY_S = 5.0
"""How long a start retries while its port is in use."""


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that is free now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


class EmbeddedServer(ABC):
    """A server process with its port and data directory. No event loop owns it."""

    name: ClassVar[str]
    binary: ClassVar[binaries.Binary]
    scheme: ClassVar[str]

    def __init__(self, data_dir: Path, *, port: int = 0, ready_timeout_s: float = 20.0) -> None:
        """Describe a server; nothing is started. `port` 0 is a free port, chosen at the first start and kept."""
        self.data_dir = Path(data_dir).absolute()
        self.port = port
        self._port_given = port != 0
        self.preferred_port = 0
        """Port to try first if none is given; 0: any free port."""
        self.pass_fds: tuple[int, ...] = ()
        """File descriptors that the process inherits."""
        self._ready_timeout_s = ready_timeout_s
        self._process: ManagedProcess | None = None
        self._identity = f"nexus-{uuid.uuid4().hex[:8]}"
        """Name of the server, by which `_is_ready` tells it from another server on its port."""

    @property
    def url(self) -> str:
        """URL for clients. Raises RuntimeError before the first start of a server without a given port."""
        if not self.port:
            raise RuntimeError(f"{self.name} has no port yet: start it first")
        return f"{self.scheme}://{HOST}:{self.port}"

    @property
    def process(self) -> ManagedProcess:
        """The child process. Raises RuntimeError before the first start."""
        if self._process is None:
            raise RuntimeError(f"{self.name} has no process yet: start it first")
        return self._process

    @property
    def pid(self) -> int | None:
        """The process id; None before the first start."""
        return self._process.pid if self._process else None

    @property
    def running(self) -> bool:
        """Whether the process is alive."""
        return self._process is not None and self._process.running

    @property
    def log_file(self) -> Path:
        """File with the output of the server."""
        return self.data_dir / f"{self.name}.log"

    async def start(self) -> None:
        """Start the server and wait until it answers. Does nothing when it runs.

        Raises BinaryMissing, or ProcessStartError with the tail of its log; nothing is left running then.
        """
        if self.running:
            return
        await self.stop()  # a killed process may still be dying
        program = self.binary.find()
        self._make_data_dir()
        self._prepare()
        await self._launch(program, keep_port=self._port_given or self._process is not None)

    async def stop(self, grace_s: float = 2.0) -> None:
        """Send SIGTERM, and SIGKILL after `grace_s`. Idempotent; does nothing if the server has died."""
        if self._process is not None:
            await self._process.stop(grace_s)

    async def restart(self) -> None:
        """Stop the server if it runs, and start it again on the same port and data. Raises as `start` does."""
        await self.stop()
        program = self.binary.find()
        self._make_data_dir()
        await self._launch(program, keep_port=self.port != 0)

    async def wait(self) -> int:
        """Wait for the end of the process and return its exit code."""
        return await self.process.wait()

    def kill(self) -> None:
        """Send SIGKILL, as in a crash."""
        if self._process is not None:
            self._process.kill()

    def kill_leftovers(self) -> None:
        """Send SIGKILL to processes that the ended server has left in its group."""
        if self._process is not None:
            self._process.kill_leftovers()

    def pause(self) -> None:
        """Send SIGSTOP: connections stay open, but get no answers."""
        self.process.pause()

    def resume(self) -> None:
        """Send SIGCONT: undo `pause`."""
        self.process.resume()

    def wipe(self) -> None:
        """Delete all data. Only for a server that does not run."""
        shutil.rmtree(self._store, ignore_errors=True)

    @property
    @abstractmethod
    def _store(self) -> Path:
        """Folder of the server's data."""

    async def _launch(self, program: Path, *, keep_port: bool) -> None:
        """Start the process. If its port is in use, try other ports for a while, or wait for one that must be kept."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + PORT_RETRY_S
        while True:
            if not keep_port:
                self.port, self.preferred_port = self.preferred_port or free_port(), 0
            try:
                await self._new_process(program).start()
            except ProcessStartError as error:
                if clock() > deadline or not _is_port_in_use(error):
                    raise
            else:
                return

    def _new_process(self, program: Path) -> ManagedProcess:
        self._process = ManagedProcess(
            self.name,
            [program, *self._arguments()],
            log_file=self.log_file,
            env=self._environment(),
            cwd=self.data_dir,
            ready=self._is_ready,
            ready_timeout_s=self._ready_timeout_s,
            death_signal=signal.SIGTERM,  # lets servers flush their data when the parent is killed
            pass_fds=self.pass_fds,
        )
        return self._process

    def _make_data_dir(self) -> None:
        self.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)

    def _prepare(self) -> None:
        """Prepare the data directory for a fresh start."""

    def _environment(self) -> dict[str, str] | None:
        return None

    @abstractmethod
    def _arguments(self) -> list[str]:
        """Return the command line after the program. The port is set. May write config files."""

    @abstractmethod
    async def _is_ready(self) -> bool:
        """Return whether this server serves, and not another one on its port. May raise OSError."""


class NatsServer(EmbeddedServer):
    """nats-server with JetStream, its streams under `data_dir`."""

    name = "nats"
    binary = binaries.NATS
    scheme = "nats"

    def __init__(
        self,
        data_dir: Path,
        *,
        port: int = 0,
        max_file_store: int = 0,
        monitor_port: int = 0,
        sync_always: bool = False,
        extra_config: str = "",
        user: str = "",
        password: str = "",
        ready_timeout_s: float = 20.0,
    ) -> None:
        """Describe the server.

        `max_file_store` is in bytes; 0 derives it from the disk's size. `monitor_port` 0 starts no HTTP server. With
        `sync_always`, confirmed messages survive a power cut. `extra_config` is appended to the config file. `user` and
        `password` are the only valid login; empty: no login is required.
        """
        super().__init__(data_dir, port=port, ready_timeout_s=ready_timeout_s)
        self.max_file_store = max_file_store
        self.monitor_port = monitor_port
        self.sync_always = sync_always
        self.extra_config = extra_config
        self._user = user
        self._password = password

    @property
    def _store(self) -> Path:
        return self.data_dir / "jetstream"

    def _arguments(self) -> list[str]:
        config = self.data_dir / "nats.conf"
        write_private(config, self._config(), durable=False)
        return ["--config", str(config)]

    def _config(self) -> str:
        sync = "  sync_interval: always\n" if self.sync_always else ""
        monitor = f'http: "{HOST}:{self.monitor_port}"\n' if self.monitor_port else ""
        login = f"{{ user: {json.dumps(self._user)}, password: {json.dumps(self._password)} }}"
        # in the global account, which owns streams made before logins were required
        users = f"authorization {{ users: [{login}] }}\n" if self._user else ""
        return (
            f"server_name: {json.dumps(self._identity)}\n"
            f'host: "{HOST}"\n'
            f"port: {self.port}\n"
            f"{monitor}"
            "jetstream {\n"
            f"  store_dir: {json.dumps(str(self.data_dir))}\n"
            f"  max_memory_store: {256 * MIB}\n"
            f"  max_file_store: {self.max_file_store or _file_store_limit(self.data_dir)}\n"
            f"{sync}"
            "}\n"
            f"{users}"
            f"{self.extra_config}\n"
        )

    async def _is_ready(self) -> bool:
        line = await _ask(self.port, b"")
        if not line.startswith(b"INFO "):
            return False
        info = json.loads(line[5:])
        return info.get("server_name") == self._identity and bool(info.get("jetstream"))


class EtcdServer(EmbeddedServer):
    """A single etcd on loopback. `start` begins with an empty registry; `restart` keeps the data."""

    name = "etcd"
    binary = binaries.ETCD
    scheme = "http"

    @property
    def _store(self) -> Path:
        return self.data_dir / "data"

    def _prepare(self) -> None:
        self.wipe()

    def _arguments(self) -> list[str]:
        peer = f"{self.scheme}://{HOST}:{free_port()}"
        return [
            *("--name", self._identity, "--data-dir", str(self._store)),
            *("--listen-client-urls", self.url, "--advertise-client-urls", self.url),
            *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
            *("--initial-cluster", f"{self._identity}={peer}", "--initial-cluster-state", "new"),
            # etcd before 3.5.30 does not enforce roles within transactions, and Nexus uses none.
            *("--max-txn-ops", "0"),
            # Web pages: only its own origin may read answers (an empty list would allow all), under no other host name.
            *("--cors", self.url, "--host-whitelist", f"{HOST},localhost"),
        ]

    def _environment(self) -> dict[str, str]:
        """Return options as variables: etcd only warns of one that it does not know. The caller's ETCD_* are left out."""
        ours = {name: value for name, value in os.environ.items() if not name.startswith("ETCD_")}
        return ours | {
            "ETCD_LOG_LEVEL": "error",
            "ETCD_UNSAFE_NO_FSYNC": "true",  # a power cut may lose the data: workers register again
            "ETCD_HEARTBEAT_INTERVAL": "50",  # in ms: a single member waits only for its own election
            "ETCD_ELECTION_TIMEOUT": "250",
            "ETCD_AUTO_COMPACTION_MODE": "periodic",
            "ETCD_AUTO_COMPACTION_RETENTION": "10m",
        }

    async def _is_ready(self) -> bool:
        question = b"POST /v3/cluster/member/list HTTP/1.0\r\nhost: localhost\r\ncontent-length: 2\r\n\r\n{}"
        if f'"name":"{self._identity}"'.encode() not in await _ask(self.port, question, whole=True):
            return False
        return b'"health":"true"' in await _ask(
            self.port, b"GET /health HTTP/1.0\r\nhost: localhost\r\n\r\n", whole=True
        )


class RedisServer(EmbeddedServer):
    """Valkey (or Redis) with an append-only file, synced every second, under `data_dir`."""

    name = "redis"
    binary = binaries.REDIS
    scheme = "redis"

    def __init__(self, data_dir: Path, *, port: int = 0, password: str = "", ready_timeout_s: float = 20.0) -> None:
        """Describe the server. Connections must log in with `password`; empty: no login is required."""
        super().__init__(data_dir, port=port, ready_timeout_s=ready_timeout_s)
        self._password = password

    @property
    def url(self) -> str:
        """URL for clients: database 0."""
        return f"{super().url}/0"

    @property
    def _store(self) -> Path:
        return self.data_dir / "appendonlydir"

    def _arguments(self) -> list[str]:
        """Write the config file: every user of the machine can read command lines."""
        config = self.data_dir / "redis.conf"
        write_private(config, self._config(), durable=False)
        return [str(config)]

    def _config(self) -> str:
        password = f"requirepass {self._password}\n" if self._password else ""
        return (
            f"bind {HOST}\n"
            f"port {self.port}\n"
            f"dir {json.dumps(str(self.data_dir), ensure_ascii=False)}\n"
            "daemonize no\n"
            "appendonly yes\n"
            "appendfsync everysec\n"
            'save ""\n'
            "maxmemory-policy noeviction\n"
            f"{password}"
        )

    async def _is_ready(self) -> bool:
        login = f"AUTH {self._password}\r\n" if self._password else ""
        reply = await _ask(self.port, f"{login}INFO server\r\nQUIT\r\n".encode(), whole=True)
        return f"process_id:{self.pid}\r\n".encode() in reply


async def _ask(port: int, question: bytes, *, whole: bool = False) -> bytes:
    """Connect, send `question`, and return the first line of the answer; with `whole`, the whole answer."""
    reader, writer = await asyncio.open_connection(HOST, port, limit=MIB)
    try:
        writer.write(question)
        await writer.drain()
        return await reader.read() if whole else await reader.readline()
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def _is_port_in_use(error: ProcessStartError) -> bool:
    return "already in use" in str(error).lower()


def _file_store_limit(folder: Path) -> int:
    """Return the bytes for JetStream: most of the free disk space, but enough for the limits that streams reserve."""
    return max(24 * GIB, shutil.disk_usage(folder).free * 3 // 4)
