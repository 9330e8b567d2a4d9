"""What a thousand workers cost the parts that they share. See README.md.

python -m bench.fleet [--workers 1,100,300,1000] [--models 10] [--slots 1] [--seconds 10]

Real NATS, etcd, Valkey and one real gateway; the workers are real ones too (echo), a hundred to a process to save memory. Each has its own
three NATS connections, lease and queues. Two rows for each number of workers: at rest, and with 64 callers who send one request after another.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import secrets
import sys
import tempfile
from pathlib import Path
from typing import Any

import httpx

from bench.stack import ROOT, Target, answers, cpu_seconds, measure, memory_mb
from cli.embedded.managed_process import ManagedProcess
from cli.embedded.servers import EtcdServer, NatsServer, RedisServer, free_port

PER_PROCESS = 100
SETTLE_S = 6.0


async def crew(first: int, count: int, models: int, slots: int) -> None:
    """`count` workers in this process, until it is ended."""
    from backbone.bus.nats.auth import read_nats_access
    from backbone.bus.nats.objects.store import NatsBlobStore
    from backbone.bus.nats.worker_bus import NatsWorkerBus
    from backbone.bus.nats.worker_log import NatsWorkerLog
    from backbone.registry.auth import read_etcd_access
    from backbone.registry.etcd import EtcdRegistry
    from backbone.settings import WorkerSettings
    from schemas.jobs import Capability
    from workers.backends.base import BackendConfig, Discovery
    from workers.backends.echo.adapter import EchoBackend
    from workers.metrics import WorkerMetrics
    from workers.worker import Worker

    class Chat(EchoBackend):
        """Offers what a text server does."""

        async def discover(self) -> Discovery:
            found = await super().discover()
            offers = [
                one.model_copy(update={"capabilities": (Capability.CHAT, Capability.COMPLETIONS)})
                for one in found.models
            ]
            return Discovery(tuple(offers), found.slots)

    settings = WorkerSettings(_env_file=None)
    nats = read_nats_access(settings)

    async def one(number: int) -> None:
        name = f"w{number}"
        registry = EtcdRegistry(read_etcd_access(settings), settings.etcd_prefix, lease_s=settings.worker_lease_s)
        blobs, log = NatsBlobStore(nats, f"{name}-blobs", worker=name), NatsWorkerLog(nats, f"{name}-log")
        worker = Worker(
            worker_id=name,
            host="bench",
            backend=Chat(BackendConfig(models=(f"m{number % models}",))),
            blobs=blobs,
            log=log,
            registry=registry,
            metrics=WorkerMetrics(),
            ack_wait_s=settings.ack_wait_s,
            slots=slots,
        )
        bus = NatsWorkerBus(nats, worker=name, ack_wait_s=settings.ack_wait_s, on_job=worker.on_job)
        for part in (blobs, log):
            await part.start()
        await worker.run(bus)

    async with asyncio.TaskGroup() as group:
        for number in range(first, first + count):
            group.create_task(one(number))
            await asyncio.sleep(0.01)


async def row(
    workers: int, models: int, slots: int, seconds: float, loads: list[str], folder: Path
) -> list[dict[str, Any]]:
    """Start everything, and look at it at rest and at work."""
    nats, etcd, redis = NatsServer(folder / "nats"), EtcdServer(folder / "etcd"), RedisServer(folder / "redis")
    parts: list[Any] = []
    port, key = free_port(), secrets.token_hex(16)
    try:
        for server in (nats, etcd, redis):
            parts.append(server)
            await server.start()
        env = os.environ | {
            "PYTHONPATH": str(ROOT),
            "NATS_URL": nats.url,
            "ETCD_URL": etcd.url,
            "REDIS_URL": redis.url,
            "GATEWAY_PORT": str(port),
            "OBSERVABILITY_PORT": "0",
            "GATEWAY_BEARER_TOKEN": key,
            "GATEWAY_LAME_DUCK_S": "0",
        }

        async def process(name: str, arguments: list[str], ready: Any = None) -> ManagedProcess:
            part = ManagedProcess(
                name,
                [sys.executable, "-m", *arguments],
                log_file=folder / f"{name}.log",
                env=env,
                cwd=folder,
                ready=ready,
            )
            parts.append(part)
            await part.start()
            return part

        gateway = await process("gateway", ["gateway"], answers(port, "/readyz"))
        crews = [
            await process(
                f"crew-{first}",
                ["bench.fleet", "crew", str(first), str(min(PER_PROCESS, workers - first)), str(models), str(slots)],
            )
            for first in range(0, workers, PER_PROCESS)
        ]
        async with httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}", headers={"authorization": f"Bearer {key}"}, timeout=30
        ) as http:
            for _ in range(600):
                seen = (await http.get("/v1/workers")).json()["data"]
                if sum(worker["state"] == "ready" for worker in seen) == workers:
                    break
                await asyncio.sleep(0.5)
            else:
                raise RuntimeError(f"only {len(seen)} of {workers} workers came")
        await asyncio.sleep(SETTLE_S)
        running = {
            "nats": [nats.pid],
            "etcd": [etcd.pid],
            "gateway": [gateway.pid],
            "workers": [crew.pid for crew in crews],
        }
        shared = {name: [pid for pid in pids if pid is not None] for name, pids in running.items()}
        rows = []
        for what in ("rest", *loads):
            before = {name: cpu_seconds(pids) for name, pids in shared.items()}
            loop = asyncio.get_running_loop()
            began = loop.time()
            found: dict[str, Any] = {"workers": workers, "load": what}
            if what == "rest":
                await asyncio.sleep(seconds)
            else:
                target = Target(
                    "nexus", port, key, [pid for pids in shared.values() for pid in pids], shared["gateway"]
                )
                run = await measure(
                    target, {"mode": "closed", "conns": int(what[1:]), "seconds": seconds, "delay_us": 0, "model": "m0"}
                )
                found |= {name: run[name] for name in ("per_s", "latency_us", "failed", "first_error")}
            wall = loop.time() - began
            for name, pids in shared.items():
                found[f"{name}_cpu"] = round((cpu_seconds(pids) - before[name]) / wall, 3)
                found[f"{name}_mb"] = round(memory_mb(pids), 1)
            rows.append(found)
        return rows
    finally:
        await asyncio.gather(*(part.stop(3.0) for part in reversed(parts)))


async def main(options: argparse.Namespace) -> None:
    """Print a table."""
    for workers in options.workers:
        with tempfile.TemporaryDirectory() as folder:
            for found in await row(
                workers, options.models, options.slots, options.seconds, options.loads, Path(folder)
            ):
                print(found, flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["crew"]:
        import uvloop

        uvloop.run(crew(*map(int, sys.argv[2:6])))
    else:
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument(
            "--workers", type=lambda text: [int(part) for part in text.split(",")], default=[1, 100, 300, 1000]
        )
        parser.add_argument("--models", type=int, default=10, help="how many models they share")
        parser.add_argument("--slots", type=int, default=1, help="slots of each worker")
        parser.add_argument(
            "--loads",
            type=lambda text: text.split(","),
            default=["c1", "c64"],
            help="connections that send one request after another",
        )
        parser.add_argument("--seconds", type=float, default=10.0)
        asyncio.run(main(parser.parse_args()))
