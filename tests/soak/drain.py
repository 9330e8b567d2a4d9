"""Thousands of jobs are submitted while no worker is there, and drained by three: none is lost. Says rates, memory, the cost of a poll."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

from bench.stack import cpu_seconds, memory_mb
from tests.cluster import KEY, Cluster, chat
from tests.soak.rounds import queued, stored_records, terminal_words

MODEL = "drain"
CALLERS = 32
WORKERS = 3
POLLS = 2000
SETTINGS: dict[str, Any] = {"MAX_QUEUED_PER_MODEL": "1000000", "MAX_QUEUED_JOBS": "1000000", "WORKER_CONCURRENCY": "32"}


class Answer(NamedTuple):
    """What came back."""

    status: int
    body: bytes


class Connection:
    """HTTP/1.1 as cheap as it can be: a client that costs more than the gateway would measure itself."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def ask(self, method: str, path: str, body: bytes = b"") -> Answer:
        """One request, and its answer."""
        head = (
            f"{method} {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\ncontent-type: application/json\r\n"
        )
        self._writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = int(head.partition("content-length: ")[2].partition("\r\n")[0])
        return Answer(int(head.split(" ", 2)[1]), await self._reader.readexactly(length))


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[Connection]:
    """One connection to a gateway."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        yield Connection(reader, writer)
    finally:
        writer.close()


async def by_all(urls: list[str], numbers: Iterator[int], do: Callable[[Connection, int], Awaitable[None]]) -> float:
    """CALLERS do it, one number after the other, on all gateways. The seconds it took."""

    async def caller(url: str) -> None:
        async with connected(url) as connection:
            for number in numbers:
                await do(connection, number)

    began = time.monotonic()
    await asyncio.gather(*(caller(urls[at % len(urls)]) for at in range(CALLERS)))
    return time.monotonic() - began


class Drain:
    """One run."""

    def __init__(self, cluster: Cluster, count: int) -> None:
        self._cluster = cluster
        self._count = count
        self._ids: dict[int, str] = {}

    async def run(self) -> None:
        """Fails by AssertionError."""
        cluster = self._cluster
        await cluster.start_gateway()
        await cluster.start_gateway()
        await cluster.stop_workers(await cluster.start_worker("echo", WORKER_MODELS=MODEL))  # now the model is known
        self._say_memory("at first")
        seconds = await by_all(cluster.urls, iter(range(self._count)), self._submit)
        print(f"submitted: {self._count} in {seconds:.1f} s, {self._count / seconds:.0f} a second")
        assert len(set(self._ids.values())) == self._count
        assert await queued(cluster) == self._count
        self._say_memory("with all of them queued")
        await self._measure_polls("a queued job", self._ids[self._count // 2])
        await self._drain()
        self._say_memory("when all have ended")
        await self._measure_polls("a job that has ended", self._ids[self._count // 2])
        await self._check()

    async def _submit(self, connection: Connection, number: int) -> None:
        body = {"endpoint": "/v1/chat/completions", "body": chat(f"job number {number}", model=MODEL)}
        answer = await connection.ask("POST", "/v1/jobs", json.dumps(body).encode())
        assert answer.status == 202, answer
        self._ids[number] = json.loads(answer.body)["id"]

    async def _drain(self) -> None:
        began = time.monotonic()
        names = [await self._cluster.start_worker("echo", wait=False, WORKER_MODELS=MODEL) for _ in range(WORKERS)]
        while await queued(self._cluster) == self._count:
            await asyncio.sleep(0.05)
        first = time.monotonic()
        while await queued(self._cluster):
            await asyncio.sleep(0.1)
        now = time.monotonic()
        print(
            f"drained by {len(names)} workers: {now - began:.1f} s from their start, "
            f"{self._count / (now - first):.0f} a second from the first job's end"
        )

    async def _measure_polls(self, what: str, job: str) -> None:
        gateway, url = self._cluster.gateways[0], self._cluster.urls[0]
        assert gateway.pid is not None
        took: list[float] = []
        async with connected(url) as connection:
            before = cpu_seconds([gateway.pid])
            for _ in range(POLLS):
                began = time.perf_counter()
                answer = await connection.ask("GET", f"/v1/jobs/{job}")
                took.append(time.perf_counter() - began)
                assert answer.status == 200, answer
            cpu = cpu_seconds([gateway.pid]) - before
        print(
            f"a poll of {what}: {cpu / POLLS * 1e6:.0f} µs of the gateway's CPU, p50 {statistics.median(took) * 1e6:.0f} µs"
        )

    def _say_memory(self, when: str) -> None:
        sizes = [memory_mb([gateway.pid]) for gateway in self._cluster.gateways if gateway.pid is not None]
        print(f"memory (PSS) of each gateway {when}: {', '.join(f'{size:.1f} MiB' for size in sizes)}")

    async def _check(self) -> None:
        """Each job has one word, one record, and its own answer."""
        deadline = time.monotonic() + 60
        while (records := await stored_records(self._cluster)) and set(records.values()) != {"completed"}:
            assert time.monotonic() < deadline, f"{sum(s != 'completed' for s in records.values())} are not recorded"
            await asyncio.sleep(0.5)
        assert set(records) == set(self._ids.values())
        words = await terminal_words(self._cluster)
        assert {job: word.status for job, word in words.items()} == records
        seconds = await by_all(self._cluster.urls, iter(range(self._count)), self._check_result)
        print(f"every answer is its own; fetched at {self._count / seconds:.0f} a second")

    async def _check_result(self, connection: Connection, number: int) -> None:
        answer = await connection.ask("GET", f"/v1/jobs/{self._ids[number]}/result")
        assert answer.status == 200, answer
        assert json.loads(answer.body)["choices"][0]["message"]["content"] == f"job number {number}", answer


async def drain(folder: Path, count: int) -> None:
    """Submit and drain so many."""
    async with Cluster(folder, **SETTINGS) as cluster:
        await Drain(cluster, count).run()
