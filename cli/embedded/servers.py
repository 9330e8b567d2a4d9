"""Real NATS, etcd and Valkey servers as plain subprocesses on 127.0.0.1: the embedded stack's, and the tests'.

    server = NatsServer(Path(".nexus/nats"))
    await server.start()      # ready when this returns
    server.url                # nats://127.0.0.1:<port>
    await server.restart()    # same port, same data
    await server.stop()

Ports are free ones unless given; a port that somebody else takes first is replaced by another.
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
PORT_PATIENCE_S = 5.0
"""Seconds for which a start that met a taken port is tried again."""


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


class EmbeddedServer(ABC):
    """One server process with its port and data directory. Not bound to an event loop."""

    name: ClassVar[str]
    binary: ClassVar[binaries.Binary]
    scheme: ClassVar[str]

    def __init__(self, data_dir: Path, *, port: int = 0, ready_timeout_s: float = 20.0) -> None:
        """Describe a server; nothing runs yet. `port` 0: a free one, chosen at the first start and kept."""
        self.data_dir = Path(data_dir).absolute()
        self.port = port
        self._port_given = port != 0
        self.preferred_port = 0
        """Tried first where no port is given; 0: none."""
        self.pass_fds: tuple[int, ...] = ()
        """Inherited by the process."""
        self._ready_timeout_s = ready_timeout_s
        self._process: ManagedProcess | None = None
        self._identity = f"nexus-{uuid.uuid4().hex[:8]}"
        """The name that the server gives itself, by which `_answers` knows it."""

    @property
    def url(self) -> str:
        """Where clients connect. Raises RuntimeError before the first start of a server without a given port."""
        if not self.port:
            raise RuntimeError(f"{self.name} has no port before its start")
        return f"{self.scheme}://{HOST}:{self.port}"

    @property
    def process(self) -> ManagedProcess:
        """The child process. Raises RuntimeError before the first start."""
        if self._process is None:
            raise RuntimeError(f"{self.name} was never started")
        return self._process

    @property
    def pid(self) -> int | None:
        """The process id; None before the first start."""
        return self._process.pid if self._process else None

    @property
    def running(self) -> bool:
        """Whether the process lives."""
        return self._process is not None and self._process.running

    @property
    def log_file(self) -> Path:
        """What the server printed."""
        return self.data_dir / f"{self.name}.log"

    async def start(self) -> None:
        """Start the server and wait until it answers. Does nothing when it runs.

        Raises BinaryMissing, or ProcessStartError with the tail of its log; nothing is left running then.
        """
        if self.running:
            return
        await self.stop()  # one that was killed may still be dying
        program = self.binary.find()
        self._make_data_dir()
        self._prepare()
        await self._launch(program, keep_port=self._port_given or self._process is not None)

    async def stop(self, grace_s: float = 2.0) -> None:
        """SIGTERM, and SIGKILL after `grace_s`. Idempotent; fine when it has already died."""
        if self._process is not None:
            await self._process.stop(grace_s)

    async def restart(self) -> None:
        """Stop it, if it runs, and start it again on the same port and data."""
        await self.stop()
        program = self.binary.find()
        self._make_data_dir()
        await self._launch(program, keep_port=self.port != 0)

    def kill(self) -> None:
        """SIGKILL, as a crash would be."""
        if self._process is not None:
            self._process.kill()

    def pause(self) -> None:
        """SIGSTOP: connections stay open, nothing is answered."""
        self.process.pause()

    def resume(self) -> None:
        """SIGCONT: undo `pause`."""
        self.process.resume()

    def wipe(self) -> None:
        """Forget all data. Only while it does not run."""
        shutil.rmtree(self._store, ignore_errors=True)

    @property
    @abstractmethod
    def _store(self) -> Path:
        """Where its data lies."""

    async def _launch(self, program: Path, *, keep_port: bool) -> None:
        """Start it; where a port is taken, try others for a while, or wait for the one that must be kept."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + PORT_PATIENCE_S
        while True:
            if not keep_port:
                self.port, self.preferred_port = self.preferred_port or free_port(), 0
            try:
                await self._new_process(program).start()
            except ProcessStartError as error:
                if clock() > deadline or not _port_was_taken(error):
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
            ready=self._answers,
            ready_timeout_s=self._ready_timeout_s,
            death_signal=signal.SIGTERM,  # a killed parent costs no data: each writes what it has confirmed
            pass_fds=self.pass_fds,
        )
        return self._process

    def _make_data_dir(self) -> None:
        self.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)

    def _prepare(self) -> None:
        """Bring the data directory into the state that a fresh stack wants."""

    def _environment(self) -> dict[str, str] | None:
        return None

    @abstractmethod
    def _arguments(self) -> list[str]:
        """The command line after the program; the port is known. May write config files."""

    @abstractmethod
    async def _answers(self) -> bool:
        """Whether this very server serves, not another one on its port. May raise OSError."""


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
        """Describe the server. Sizes in bytes; `max_file_store` 0: by the disk's size; `monitor_port` 0: no HTTP.

        `sync_always`: what is confirmed survives a power cut too. `extra_config` is appended to the server's config file.
        `user` and `password`: the only ones who are let in; empty: everybody is.
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
        # A user of the global account, whose streams an open server has made before.
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

    async def _answers(self) -> bool:
        line = await _ask(self.port, b"")
        if not line.startswith(b"INFO "):
            return False
        info = json.loads(line[5:])
        return info.get("server_name") == self._identity and bool(info.get("jetstream"))


class EtcdServer(EmbeddedServer):
    """A single etcd for loopback use. `start` begins with an empty registry; `restart` keeps what is there."""

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
            # Pages of a browser: no origin but its own may read answers (an empty list would allow all), no other name leads here.
            *(
                "--max-txn-ops",
                "0",
            ),  # no transaction: roles do not hold within them before 3.5.30, and nothing here needs one
            *("--cors", self.url, "--host-whitelist", f"{HOST},localhost"),
        ]

    def _environment(self) -> dict[str, str]:
        """Options by environment: an etcd that does not know one only warns, and the caller's own ETCD_* stay out."""
        ours = {name: value for name, value in os.environ.items() if not name.startswith("ETCD_")}
        return ours | {
            "ETCD_LOG_LEVEL": "error",
            "ETCD_UNSAFE_NO_FSYNC": "true",  # a power cut may take it: workers announce themselves again
            "ETCD_HEARTBEAT_INTERVAL": "50",  # ms; alone, it only waits for itself when it elects itself
            "ETCD_ELECTION_TIMEOUT": "250",
            "ETCD_AUTO_COMPACTION_MODE": "periodic",
            "ETCD_AUTO_COMPACTION_RETENTION": "10m",
        }

    async def _answers(self) -> bool:
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
        """Describe the server. `password`: what every connection must say first; empty: nothing."""
        super().__init__(data_dir, port=port, ready_timeout_s=ready_timeout_s)
        self._password = password

    @property
    def url(self) -> str:
        """Where clients connect: database 0."""
        return f"{super().url}/0"

    @property
    def _store(self) -> Path:
        return self.data_dir / "appendonlydir"

    def _arguments(self) -> list[str]:
        """All by a file: command lines can be read by every user of the machine."""
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

    async def _answers(self) -> bool:
        login = f"AUTH {self._password}\r\n" if self._password else ""
        reply = await _ask(self.port, f"{login}INFO server\r\nQUIT\r\n".encode(), whole=True)
        return f"process_id:{self.pid}\r\n".encode() in reply


async def _ask(port: int, question: bytes, *, whole: bool = False) -> bytes:
    """Connect, send `question`, and return the first line of the answer, or with `whole` all of it."""
    reader, writer = await asyncio.open_connection(HOST, port, limit=MIB)
    try:
        writer.write(question)
        await writer.drain()
        return await reader.read() if whole else await reader.readline()
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def _port_was_taken(error: ProcessStartError) -> bool:
    return "already in use" in str(error).lower()


def _file_store_limit(folder: Path) -> int:
    """Bytes for JetStream: most of what the disk has free, but enough to reserve the streams' limits against."""
    return max(24 * GIB, shutil.disk_usage(folder).free * 3 // 4)
