"""What is done to the parts of a cluster, when, and how they are mended again."""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress
from dataclasses import dataclass

import redis.asyncio

from cli.embedded.managed_process import ProcessStartError
from tests.cluster import Cluster
from tests.servers import Process, Server
from tests.soak.moments import Moments
from tests.soak.wanted import MODEL

MEND_S = 90.0
PARTS = ("worker", "worker", "gateway", "gateway", "nats", "redis")
DEEDS = {
    "worker": ("kill", "kill", "kill", "freeze", "drain"),
    "gateway": ("kill", "kill", "kill", "freeze", "drain"),
    "nats": ("kill", "kill", "freeze"),
    "redis": ("kill", "kill", "freeze", "flush"),
}
STEPS = {"submitting": 20, "accepted": 20, "started": 8, "chunk": 16, "attempt": 10, "ended": 10, "cancel": 2}
"""Steps between submit and result, and how often each is sure to come in a round."""


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong."""

    part: str
    deed: str
    step: str
    count: int
    """It is done when the step is seen for the `count`-th time."""
    hold_s: float
    """And mended this much later: a fault has a length, as it has a place."""

    def __str__(self) -> str:
        return f"{self.deed} {self.part} for {self.hold_s:g} s at {self.step} {self.count}"


def draw_faults(rng: random.Random) -> list[Fault]:
    """One; in every third round two."""
    parts = [rng.choice(PARTS)]
    if rng.random() < 1 / 3:
        parts.append(rng.choice([part for part in PARTS if part not in parts or part == "worker"]))
    return [_draw(rng, part) for part in parts]


def _draw(rng: random.Random, part: str) -> Fault:
    deed = rng.choice(DEEDS[part])
    step = rng.choice(list(STEPS))
    hold_s = rng.choice([0.3, 2.5, 3.5]) if deed == "freeze" else rng.choice([0.0, 0.0, 0.5, 2.0])
    return Fault(part, deed, step, rng.randint(1, STEPS[step]), hold_s)


class Breaker:
    """Does it to the parts of one cluster, which has three workers of MODEL."""

    def __init__(self, cluster: Cluster, rng: random.Random, moments: Moments) -> None:
        self._cluster = cluster
        self._rng = rng
        self._moments = moments
        self._busy: set[Process] = set()
        self.flushed = False

    async def run(self, fault: Fault) -> None:
        """Wait for the moment, break, hold, mend."""
        await self._moments.reach(fault.step, fault.count)
        if fault.deed == "flush":
            await flush(self._cluster)
            self.flushed = True
        elif fault.part == "worker":
            await self._worker(fault)
        elif fault.part == "gateway":
            await self._gateway(fault)
        else:
            await self._server(self._cluster.nats if fault.part == "nats" else self._cluster.redis, fault)

    async def _server(self, server: Server, fault: Fault) -> None:
        if fault.deed == "freeze":
            server.pause()
            await asyncio.sleep(fault.hold_s)
            server.resume()
        else:
            server.kill()
            await server.process.wait()
            await asyncio.sleep(fault.hold_s)
            await server.restart()

    async def _worker(self, fault: Fault) -> None:
        """A dead one is replaced by another one."""
        while not (live := [one for one in self._cluster.workers.values() if one.running and one not in self._busy]):
            await asyncio.sleep(0.05)  # the one that replaces the last is about to start
        worker = self._rng.choice(live)
        if await self._hurt(worker, fault):
            await mended(lambda: self._cluster.start_worker("echo", wait=False, WORKER_MODELS=MODEL))

    async def _gateway(self, fault: Fault) -> None:
        gateway = self._rng.choice([process for process in self._cluster.gateways if process not in self._busy])
        if await self._hurt(gateway, fault):
            await mended(gateway.start)

    async def _hurt(self, process: Process, fault: Fault) -> bool:
        """Whether it is dead now."""
        self._busy.add(process)
        if fault.deed == "freeze":
            process.pause()
            await asyncio.sleep(fault.hold_s)
            process.resume()
            self._busy.discard(process)
            return False
        if fault.deed == "kill":
            process.kill()
            await process.wait()
        else:
            await process.stop(grace_s=10.0)
        await asyncio.sleep(fault.hold_s)
        self._busy.discard(process)
        return True


async def flush(cluster: Cluster) -> None:
    """Redis forgets everything."""
    async with redis.asyncio.from_url(cluster.redis.url) as client:
        await client.flushall()


async def mended(start: object) -> None:
    """Start a process that may have to wait for another part, as anyone who supervises it does."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + MEND_S
    while True:
        try:
            await start()  # type: ignore[operator]
        except ProcessStartError:
            if loop.time() > deadline:
                raise
            await asyncio.sleep(0.2)
        else:
            return


async def tail_attempts(cluster: Cluster, moments: Moments) -> None:
    """Tell of each `attempt` line that a worker writes: it comes after the job's last word. Until cancelled."""
    read: dict[str, int] = {name: _size(process) for name, process in cluster.workers.items()}
    while True:
        await asyncio.sleep(0.02)  # logs are files: there is nothing to wait for
        for name, process in list(cluster.workers.items()):
            size, seen = _size(process), read.get(name, 0)
            if size <= seen:
                continue
            with process.log_file.open("rb") as log:
                log.seek(seen)
                data = log.read(size - seen)
            whole = data.rfind(b"\n") + 1
            read[name] = seen + whole
            for _ in range(data[:whole].count(b'"event":"attempt.finished"')):
                moments.happened("attempt")


def _size(process: Process) -> int:
    with suppress(FileNotFoundError):
        return process.log_file.stat().st_size
    return 0
