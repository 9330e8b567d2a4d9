"""Nodes are lost and come back while everything is asked for, and what was accepted must not be lost."""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import aclosing, suppress
from dataclasses import dataclass

import httpx

from cli.embedded.servers import EmbeddedServer
from tests.cluster import chat
from tests.scale.load import Load
from tests.scale.three import Three
from tests.soak.rounds import stored_records, terminal_words

READY_S = 60.0
"""For everything to be well again on a machine that does other things too."""
RECORDED_S = 60.0
SETTLE_S = 2.0


@dataclass(frozen=True)
class Loss:
    """Nodes that are lost together, and come back after `hold_s`."""

    part: str
    nodes: tuple[int, ...]
    deed: str
    hold_s: float

    def __str__(self) -> str:
        return f"{self.deed} {self.part} {'+'.join(map(str, self.nodes))} for {self.hold_s:g} s"


def draw_losses(rng: random.Random) -> list[Loss]:
    """One to three: mostly one node; now and then two of three, which is no quorum."""
    return [_draw(rng) for _ in range(rng.randint(1, 3))]


def _draw(rng: random.Random) -> Loss:
    part = rng.choice(["nats", "nats", "nats", "etcd", "redis"])
    count = 1 if part == "redis" else rng.choice([1, 1, 1, 2])
    nodes = tuple(sorted(rng.sample(range(1 if part == "redis" else 3), count)))
    return Loss(part, nodes, rng.choice(["kill", "kill", "freeze"]), rng.choice([0.0, 1.0, 4.0, 12.0]))


class Storm:
    """Losses on one cluster under one load."""

    def __init__(self, cluster: Three, load: Load) -> None:
        self._cluster = cluster
        self._load = load
        self.took: list[str] = []
        """What was done, and how long it took until all was well again."""

    async def lose(self, loss: Loss) -> None:
        """Break, hold, mend, and wait until all is well."""
        nodes = self._nodes(loss)
        for node in nodes:
            node.pause() if loss.deed == "freeze" else node.kill()
        await asyncio.sleep(loss.hold_s)
        await asyncio.gather(*(self._mend(node, loss) for node in nodes))
        began = time.monotonic()
        await self._well(str(loss))
        self.took.append(f"{loss}: well after {time.monotonic() - began:.1f} s")
        await asyncio.sleep(SETTLE_S)

    def _nodes(self, loss: Loss) -> list[EmbeddedServer]:
        if loss.part == "redis":
            assert isinstance(self._cluster.redis, EmbeddedServer)
            return [self._cluster.redis]
        members = self._cluster.nats_nodes if loss.part == "nats" else self._cluster.etcd_members
        return [members[number] for number in loss.nodes]

    async def _mend(self, node: EmbeddedServer, loss: Loss) -> None:
        if loss.deed == "freeze":
            node.resume()
        else:
            await node.process.wait()
            await node.restart()

    async def _well(self, after: str) -> None:
        """Every gateway is ready and answers."""
        deadline = time.monotonic() + READY_S
        for url in self._cluster.urls:
            while not await self._answers(url):
                assert time.monotonic() < deadline, f"{url} is not well after {after}\n{self._cluster.logs()}"
                await asyncio.sleep(0.1)

    async def _answers(self, url: str) -> bool:
        http = self._load.http
        with suppress(httpx.HTTPError, KeyError, ValueError):
            ready = await http.get(url + "/readyz", timeout=5)
            if ready.json()["status"] != "ready":
                return False
            answer = await http.post(url + "/v1/chat/completions", json=chat(), timeout=10)
            return answer.status_code == 200
        return False

    async def settle(self) -> list[str]:
        """End the load; what was not as promised."""
        await self._load.stop()
        wrong = list(self._load.failed)
        words = await terminal_words(self._cluster)
        deadline = time.monotonic() + RECORDED_S
        while missing := await self._unrecorded(words.keys()):
            if time.monotonic() > deadline:
                return wrong + missing[:20]
            await asyncio.sleep(0.5)
        return wrong + [f"{job} was accepted and has no end" for job in self._load.accepted if job not in words]

    async def _unrecorded(self, ended: object) -> list[str]:
        records = await stored_records(self._cluster)
        return [
            f"{job}: its record says {records.get(job)}"
            for job in self._load.accepted
            if records.get(job) != "completed"
        ]


async def storm(cluster: Three, losses: list[Loss], url: str = "") -> tuple[list[str], Load, list[str]]:
    """One load, these losses. What was not as promised, the load, and what was done."""
    async with aclosing(Load(url or cluster.url, outages=True)) as load:
        load.start(sync=4, stream=3, large=1, submit=4, resume=2)
        storm = Storm(cluster, load)
        await asyncio.sleep(1)
        for loss in losses:
            await storm.lose(loss)
        wrong = await storm.settle()
    return wrong, load, storm.took
