"""What is measured, as processes: started on free ports in a temporary directory, charged for CPU and memory, stopped."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import httpx
import orjson

from cli.embedded.managed_process import ManagedProcess, bind_to_parent
from cli.embedded.servers import EmbeddedServer, EtcdServer, NatsServer, RedisServer, free_port

ROOT = Path(__file__).resolve().parent.parent
TICK = os.sysconf("SC_CLK_TCK")
SLOTS = 1024
CHAT = "/v1/chat/completions"
SYNCED = "nexus-synced"
"""Nexus on a NATS that confirms only what is safe from a power cut."""


@dataclass(frozen=True, slots=True)
class Target:
    """One thing to be measured."""

    name: str
    port: int
    key: str = ""
    charged: list[int] = field(default_factory=list)
    """Processes whose CPU time is charged, with their children."""
    gateway: list[int] = field(default_factory=list)
    """Processes whose memory is shown, with their children."""
    parts: dict[str, list[int]] = field(default_factory=dict)
    """What each part of those charged is."""


# Accounts


def tree(pids: list[int]) -> set[int]:
    """These processes and their descendants."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))):
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found: set[int] = set()
    todo = list(pids)
    while todo:
        pid = todo.pop()
        if pid not in found:
            found.add(pid)
            todo += children.get(pid, [])
    return found


def _stat(pid: int) -> list[str]:
    """The fields behind the name: state, parent, …; none for a process that is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return []


def cpu_seconds(pids: list[int]) -> float:
    """User and system time so far."""
    return sum(sum(map(int, fields[11:13])) for pid in tree(pids) if (fields := _stat(pid))) / TICK


def write_calls(pids: list[int]) -> int:
    """Calls of write(2) and its kin so far, to sockets too."""
    calls = 0
    for pid in tree(pids):
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{pid}/io").read_text().splitlines()
            calls += sum(int(line.split()[1]) for line in lines if line.startswith("syscw:"))
    return calls


def foreign_seconds() -> float:
    """CPU time so far of everything on this machine that is not the benchmark, give or take a constant."""
    busy = [int(ticks) for ticks in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    idle = busy[3] + busy[4]
    ended = os.times()
    return (sum(busy) - idle) / TICK - cpu_seconds([os.getpid()]) - ended.children_user - ended.children_system


def memory_mb(pids: list[int]) -> float:
    """Proportional set size: what processes share counts once."""
    kib = 0
    for pid in tree(pids):
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            kib += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return kib / 1024


# Processes


class Stack:
    """The mock, the naive baseline and Nexus, as far as they are asked for. An async context manager."""

    def __init__(self, folder: Path, wanted: set[str], gateways: int = 1, workers: int = 1) -> None:
        """`gateways` and `workers`: processes of each in Nexus; the gateways share one port."""
        self.folder = folder
        self.wanted = wanted
        self.gateways = gateways
        self.workers = workers
        self.targets: list[Target] = []
        self.starts: dict[str, float] = {}
        """CPU seconds of gateway and worker until each was ready."""
        self._parts: list[EmbeddedServer | ManagedProcess] = []

    async def __aenter__(self) -> Self:
        try:
            port = free_port()
            mock = await self._process("mock", ["bench.mock", "--port", str(port)], {}, answers(port, "/health"))
            self.targets.append(Target("direct", port, charged=mock))
            url = f"http://127.0.0.1:{port}"
            if "naive" in self.wanted:
                self.targets.append(await self._naive(url))
            if "nexus" in self.wanted:
                self.targets.append(await self._nexus(url))
            if SYNCED in self.wanted:
                self.targets.append(await self._nexus(url, SYNCED))
            self.targets = [target for target in self.targets if target.name in self.wanted]
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        for part in reversed(self._parts):
            await part.stop(5.0)
        self._parts.clear()

    async def _naive(self, backend: str) -> Target:
        nats = NatsServer(self.folder / "naive-nats")
        await self._server(nats)
        port = free_port()
        env = {"NATS_URL": nats.url, "PORT": str(port), "BACKEND_URL": backend}
        gateway = await self._process("naive-gateway", ["bench.naive", "gateway"], env, answers(port, "/health"))
        worker = await self._process("naive-worker", ["bench.naive", "worker"], env, answers(port, CHAT))
        return Target("naive", port, charged=[*gateway, *worker, *_pids(nats)], gateway=gateway)

    async def _nexus(self, backend: str, name: str = "nexus") -> Target:
        nats = NatsServer(self.folder / f"{name}-nats", sync_always=name == SYNCED)
        etcd, redis = EtcdServer(self.folder / f"{name}-etcd"), RedisServer(self.folder / f"{name}-redis")
        for server in (nats, etcd, redis):
            await self._server(server)
        port, key = free_port(), secrets.token_hex(16)
        env = {
            "NATS_URL": nats.url,
            "ETCD_URL": etcd.url,
            "REDIS_URL": redis.url,
            "LOG_LEVEL": "info",
            "GATEWAY_PORT": str(port),
            "OBSERVABILITY_PORT": "0",
            "GATEWAY_BEARER_TOKEN": key,
            "GATEWAY_LAME_DUCK_S": "0",
            "GATEWAY_WORKERS": str(self.gateways),
            "WORKER_BACKEND": "openai",
            "WORKER_BACKEND_URL": backend,
            "WORKER_CONCURRENCY": str(SLOTS),
            # The load generator fills queues faster than anybody should.
            "MAX_QUEUED_PER_MODEL": "1000000",
            "MAX_QUEUED_JOBS": "1000000",
        }
        gateway = await self._process("gateway", ["gateway"], env, answers(port, "/readyz"))
        self.starts["gateway_cpu_s"] = cpu_seconds(gateway)
        await self._parked(env, port, key)
        worker: list[int] = []
        for number in range(self.workers):
            unit = f"bench-{number}"
            named = env | {"WORKER_NAME": unit}
            worker += await self._process(unit, ["workers"], named, answers(port, CHAT, key, worker=unit))
        self.starts["worker_cpu_s"] = cpu_seconds(worker)
        parts = {"gateway": gateway, "worker": worker, "nats": _pids(nats), "redis": _pids(redis)}
        return Target(name, port, key, [pid for pids in parts.values() for pid in pids], gateway, parts)

    async def _parked(self, env: dict[str, str], port: int, key: str) -> None:
        """A model that was served once: jobs for it are accepted, and wait."""
        echo = {"WORKER_BACKEND": "echo", "WORKER_MODELS": "parked", "WORKER_BACKEND_URL": ""}
        await self._process("parked", ["workers"], env | echo, answers(port, CHAT, key, "parked"))
        await self._parts.pop().stop(5.0)

    async def long_job(self, tokens: int) -> str:
        """The id of a finished job with so many chunks."""
        target = next(target for target in self.targets if target.name == "nexus")
        body = {"model": "mock", "messages": [{"role": "user", "content": "Go on."}], "max_tokens": tokens}
        job = {"endpoint": CHAT, "body": body | {"stream": True, "mock_delay_us": 0}}
        headers = {"authorization": f"Bearer {target.key}"}
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{target.port}", headers=headers, timeout=90) as client:
            found = (await client.post("/v1/jobs", json=job)).json()
            ended = (await client.get(f"/v1/jobs/{found['id']}", params={"wait": 60})).json()
        if ended["status"] != "completed":
            raise ValueError(f"the job to be followed has not completed: {ended}")
        return str(found["id"])

    async def _server(self, server: EmbeddedServer) -> None:
        self._parts.append(server)
        await server.start()

    async def _process(
        self, name: str, module: list[str], env: dict[str, str], ready: Callable[[], Awaitable[bool]]
    ) -> list[int]:
        """Start `python -m <module>`; return its pid once it is ready. Only `env` configures it, no .env file."""
        process = ManagedProcess(
            name,
            [sys.executable, "-m", *module],
            log_file=self.folder / f"{name}.log",
            env=os.environ | {"PYTHONPATH": str(ROOT)} | env,
            cwd=self.folder,
            ready=ready,
            ready_timeout_s=60.0,  # the machine may be busy
        )
        self._parts.append(process)
        await process.start()
        return _pids(process)


def _pids(part: EmbeddedServer | ManagedProcess) -> list[int]:
    assert part.pid is not None
    return [part.pid]


def answers(
    port: int, path: str, key: str = "", model: str = "mock", worker: str = ""
) -> Callable[[], Awaitable[bool]]:
    """Whether `GET path`, or a chat completion where that is the path, is 200, and `worker` is listed."""
    chat = {"model": model, "messages": [{"role": "user", "content": "Ready?"}], "max_tokens": 1}

    async def ready() -> bool:
        call = {"method": "POST", "json": chat} if path == CHAT else {"method": "GET"}
        headers = {"authorization": f"Bearer {key}"} if key else {}
        try:
            async with httpx.AsyncClient(headers=headers, timeout=5, base_url=f"http://127.0.0.1:{port}") as client:
                if worker and f'"{worker}"' not in (await client.get("/v1/workers")).text:
                    return False
                return (await client.request(url=path, **call)).status_code == 200
        except httpx.HTTPError:
            return False

    return ready


# One measurement


async def measure(target: Target, load: dict[str, object]) -> dict[str, object]:
    """Run the load generator against `target`, and add what that cost: `cpu_us` per unit, `cpu_cores`, `gateway_mb`.

    `parts_us` is the same by part, `writes` each part's write calls per unit; `others_cores` says how much of the machine
    went elsewhere meanwhile.
    """
    spec = load | {"port": target.port, "key": target.key}
    loop = asyncio.get_running_loop()
    peak = memory_mb(target.gateway)
    foreign, cpu, began = foreign_seconds(), cpu_seconds(target.charged), loop.time()
    parts = {name: cpu_seconds(pids) for name, pids in target.parts.items()}
    writes = {name: write_calls(pids) for name, pids in target.parts.items()}
    process = await asyncio.create_subprocess_exec(
        *bind_to_parent([sys.executable, "-m", "bench.load"]),
        orjson.dumps(spec),
        stdout=asyncio.subprocess.PIPE,
        cwd=ROOT,
    )
    output = asyncio.create_task(process.communicate())
    try:
        while not output.done():
            await asyncio.wait([output], timeout=0.5)
            peak = max(peak, memory_mb(target.gateway))
        run = orjson.loads(output.result()[0])
    finally:
        if process.returncode is None:
            process.kill()
    cpu, wall = cpu_seconds(target.charged) - cpu, loop.time() - began
    run["others_cores"] = round((foreign_seconds() - foreign) / wall, 2)
    run["cpu_us"] = round(cpu / run["units"] * 1e6, 1) if run["units"] else None
    run["parts_us"] = {
        name: round((cpu_seconds(pids) - parts[name]) / run["units"] * 1e6, 1) if run["units"] else None
        for name, pids in target.parts.items()
    }
    run["writes"] = {
        name: round((write_calls(pids) - writes[name]) / run["units"], 2) if run["units"] else None
        for name, pids in target.parts.items()
    }
    run["cpu_cores"] = round(cpu / wall, 2)
    run["gateway_mb"] = round(peak, 1) if target.gateway else None
    return run
