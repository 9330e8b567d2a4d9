"""Rounds: jobs are submitted while parts are killed, and each one is followed to its end. One seed is one round's plan."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import nats
import redis.asyncio
from nats.js.errors import NotFoundError

from backbone.bus.subjects import BACKLOG_STREAM, JOBS_STREAM
from schemas.outcome import Outcome
from tests.cluster import Cluster, chat
from tests.servers import source as chosen
from tests.soak.caller import OVER, Caller
from tests.soak.faults import Breaker, Fault, draw_faults, mended, tail_attempts
from tests.soak.moments import Moments
from tests.soak.wanted import MODEL, PARKED, draw

JOBS = 24
WORKERS = 3
ROUND_S = 110.0
"""A round takes five seconds or ten; after this it hangs."""
QUIET_S = 20.0
"""For the queue to be empty once every job has ended."""
RECORDED_S = 60.0
"""For every record to be in Redis: a word that a killed gateway held comes to another one after 15 s."""
LEAVE_S = 2.5
"""An attempt that was allowed to begin may do so a moment after the job was cancelled: as long as it holds the job, and some."""
SETTINGS: dict[str, Any] = {
    "ACK_WAIT_S": "2",
    "WORKER_LEASE_S": "2",
    "WORKER_CONCURRENCY": "3",
    "WORKER_HEALTH_INTERVAL_S": "1",
    "GATEWAY_DRAIN_S": "2",
    "WORKER_DRAIN_S": "1",
}


@asynccontextmanager
async def chaos_cluster(folder: Path) -> AsyncIterator[Cluster]:
    """Two gateways and three workers, and a model that is known and served by nobody."""
    async with Cluster(folder, **SETTINGS | ledger_settings(folder)) as cluster:
        await cluster.start_gateway()
        await cluster.start_gateway()
        parked = await cluster.start_worker("echo", WORKER_MODELS=PARKED)
        await asyncio.gather(*(cluster.start_worker("echo", WORKER_MODELS=MODEL) for _ in range(WORKERS)))
        await cluster.stop_workers(parked)
        yield cluster


def ledger_settings(folder: Path) -> dict[str, str]:
    """Settings of a ledger that all gateways share, where they are processes."""
    if not chosen().processes:
        return {}
    return {"LEDGER_URL": f"sqlite:///{ledger_file(folder)}", "USAGE_JOURNAL_DIR": str(folder / "usage")}


def ledger_file(folder: Path) -> Path:
    """Return the file of that ledger."""
    return folder / "ledger.db"


class Rounds:
    """Rounds on one cluster, and what is looked at when all of them are over."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._ended: dict[str, tuple[str, bool]] = {}
        """Of each job its status, and whether Redis was told to forget everything meanwhile."""
        self.answered = 0

    async def play(self, seed: str) -> list[str]:
        """One round. Returns what was not as promised, with the seed and what was done."""
        rng, moments = random.Random(seed), Moments()
        faults = draw_faults(rng)
        callers = [
            Caller(self._cluster.http, self._cluster.urls, draw(rng, f"{seed}.{number}", number), seed, moments)
            for number in range(JOBS)
        ]
        breaker = Breaker(self._cluster, rng, moments)
        wrong = await self._play(callers, breaker, faults, moments, rng)
        for caller in callers:
            wrong += caller.faults
            if caller.record:
                self._ended[caller.job] = (caller.record["status"], breaker.flushed)
        if breaker.flushed:
            self._ended = {job: (status, True) for job, (status, _) in self._ended.items()}
        self.answered += len(callers)
        plan = ", ".join(map(str, faults))
        return [f"seed {seed} ({plan}): {text}" for text in wrong]

    async def _play(
        self, callers: list[Caller], breaker: Breaker, faults: list[Fault], moments: Moments, rng: random.Random
    ) -> list[str]:
        breaking = [asyncio.create_task(breaker.run(fault)) for fault in faults]
        tail = asyncio.create_task(tail_attempts(self._cluster, moments))
        asking = [asyncio.create_task(_begin(caller, rng.uniform(0, 1.5))) for caller in callers]
        try:
            async with asyncio.timeout(ROUND_S):
                await _all_done(asking)
                await _all_done(breaking)
                await self._quiet()
        except TimeoutError:
            hanging = [
                f"no end: {caller.wanted.label} {caller.job} {caller.doing}" for caller in callers if not caller.record
            ]
            hanging += [
                f"never done, or never mended: {fault}"
                for fault, task in zip(faults, breaking, strict=True)
                if not task.done()
            ]
            left = await left_in_queue(self._cluster)
            return hanging or [f"not over after {ROUND_S:g} s, left in the queue: {left}; {self._cluster.logs()}"]
        finally:
            for task in [tail, *asking, *breaking]:
                task.cancel()
            await asyncio.gather(tail, *asking, *breaking, return_exceptions=True)
        return []

    async def _quiet(self) -> None:
        """Until nothing is left in the queue. Raises TimeoutError with the round's."""
        while await queued(self._cluster):
            await asyncio.sleep(0.1)

    async def look_back(self) -> list[str]:
        """What must hold when all rounds are over: records in Redis, one word on each job, nothing run that was cancelled."""
        wrong = await self._parked()
        deadline = asyncio.get_running_loop().time() + RECORDED_S
        while missing := await self._unrecorded():
            if asyncio.get_running_loop().time() > deadline:
                wrong += missing[:20]
                break
            await asyncio.sleep(0.5)
        while missing := await self._uncounted():
            if asyncio.get_running_loop().time() > deadline:
                wrong += missing[:20]
                break
            await asyncio.sleep(0.5)
        return wrong + await self._words()

    async def _uncounted(self) -> list[str]:
        """What the ledger says otherwise than the words: each run of each job is one row, with its status and tokens."""
        if not ledger_file(self._cluster.folder).exists():
            return []
        rows, words = ledger_rows(ledger_file(self._cluster.folder)), await terminal_words(self._cluster)
        wrong = [
            f"{job} run {word.run}: {word.status} {word.tokens}, but the ledger says {rows.get((job, word.run))}"
            for job, word in words.items()
            if rows.get((job, word.run)) != (word.status, *word.tokens)
        ]
        wrong += [
            f"{job} run {run}: not in the ledger, although run {word.run} followed"
            for job, word in words.items()
            for run in range(1, word.run)
            if (job, run) not in rows
        ]
        return wrong + [f"{job} run {run}: in the ledger, but never ended" for job, run in rows if job not in words]

    async def _unrecorded(self) -> list[str]:
        """Jobs whose records in Redis are not as their callers saw them end. Also of jobs that nobody knows of, because the 202 was lost."""
        records = await stored_records(self._cluster)
        wrong = [
            f"{job}: {status}, but its record says {records.get(job)}"
            for job, (status, flushed) in self._ended.items()
            if records.get(job) != status and not (flushed and job not in records)
        ]
        open_ = {job: status for job, status in records.items() if status not in OVER}
        stored = await stored_jobs(self._cluster) if open_ else set()
        # A record whose gateway died before its message was stored: there was no 202, and it ends as expired in its time.
        return wrong + [f"{job}: never ended: {status}" for job, status in open_.items() if job in stored]

    async def _words(self) -> list[str]:
        """The stream of terminal words says the same."""
        words = await terminal_words(self._cluster)
        return [
            f"{job}: {status}, but its word says {words.get(job)}"
            for job, (status, _) in self._ended.items()
            if job not in words or words[job].status != status
        ]

    async def _parked(self) -> list[str]:
        """A worker for the parked model comes at last: it runs what is asked for now, and nothing of what was cancelled."""
        name = await self._cluster.start_worker("echo", name=f"late-{len(self._cluster.workers)}", WORKER_MODELS=PARKED)
        answer = await self._cluster.post("/v1/chat/completions", chat("at last", model=PARKED))
        wrong = [] if answer.status_code == 200 else [f"the parked model is not served: {answer.text}"]
        while await queued(self._cluster):
            await asyncio.sleep(0.1)
        await self._cluster.stop_workers(name)
        words = await terminal_words(self._cluster)
        return wrong + [
            f"ran although it was cancelled: {line}"
            for worker in self._cluster.workers
            for line in self._cluster.attempts(worker)
            if line["tokens"] and _began_too_late(line, words.get(line["job"]))
        ]


def _began_too_late(line: dict[str, Any], word: Ended | None) -> bool:
    """Whether an attempt began when the job was cancelled already, and its start grant was not on its way."""
    if word is None or word.status != "cancelled":
        return False
    began = datetime.fromisoformat(line["timestamp"]).timestamp() - line["seconds"]
    return bool(began > word.at + LEAVE_S)


async def _all_done(tasks: list[asyncio.Task[None]]) -> None:
    """Wait for all; cancelled, this leaves them as they are. Raises what any of them raised."""
    await asyncio.wait(tasks)
    for task in tasks:
        task.result()


async def _begin(caller: Caller, after_s: float) -> None:
    await asyncio.sleep(after_s)  # callers do not come all at once
    await caller.run()


WAITING = (JOBS_STREAM, BACKLOG_STREAM)


async def queued(cluster: Cluster) -> int:
    """Messages in the queues and the backlogs of jobs."""
    connection = await nats.connect(cluster.nats.url.split(","))
    try:
        stream = connection.jetstream(timeout=30)
        return sum([(await stream.stream_info(name)).state.messages for name in WAITING])
    finally:
        await connection.close()


async def left_in_queue(cluster: Cluster) -> list[str]:
    """Subject and id of the messages in the queues and the backlogs of jobs."""
    connection = await nats.connect(cluster.nats.url.split(","))
    try:
        stream = connection.jetstream(timeout=30)
        left = []
        for name in WAITING:
            state = (await stream.stream_info(name)).state
            for seq in range(state.first_seq, state.last_seq + 1):
                with contextlib.suppress(NotFoundError):
                    message = await stream.get_msg(name, seq)
                    left.append(f"{message.subject} {(message.headers or {}).get('Nats-Msg-Id')}")
        return left
    finally:
        await connection.close()


async def stored_jobs(cluster: Cluster) -> set[str]:
    """Jobs of which any event is kept: those that were in the queue."""
    connection = await nats.connect(cluster.nats.url.split(","))
    try:
        info = await connection.jetstream(timeout=30).stream_info("NEXUS_EVENTS", subjects_filter="nexus.events.*")
        return {subject.rpartition(".")[2] for subject in info.state.subjects or ()}
    finally:
        await connection.close()


class Ended(NamedTuple):
    """A terminal word."""

    status: str
    at: float
    """When NATS stored it, in Unix seconds."""
    run: int
    tokens: tuple[int, int]
    """Of the prompt and of the answer."""


async def terminal_words(cluster: Cluster) -> dict[str, Ended]:
    """Every word that NATS keeps, by job. A subject holds one word: a second one is an AssertionError."""
    connection = await nats.connect(cluster.nats.url.split(","))
    words: dict[str, Ended] = {}
    try:
        reader = await connection.jetstream(timeout=30).subscribe("nexus.done.*", ordered_consumer=True)
        count = (await connection.jetstream(timeout=30).stream_info("NEXUS_DONE")).state.messages
        for _ in range(count):
            message = await reader.next_msg(timeout=10)
            word, _payload = Outcome.decode(message.data)
            assert word.job not in words, f"two words on {word.job}"
            usage = word.usage
            tokens = (0, 0) if usage is None else (usage.prompt_tokens, usage.completion_tokens)
            words[word.job] = Ended(word.status.value, message.metadata.timestamp.timestamp(), word.run, tokens)
    finally:
        await connection.close()
    return words


def ledger_rows(file: Path) -> dict[tuple[str, int], tuple[str, int, int]]:
    """Status and tokens of every run of a durable job in the ledger. Its hourly sums must agree with its rows."""
    with contextlib.closing(sqlite3.connect(file)) as ledger:
        count = "SELECT count(*), sum(input_tokens), sum(output_tokens) FROM usage_runs"
        hours = "SELECT sum(requests), sum(input_tokens), sum(output_tokens) FROM usage_hours"
        counted, summed = ledger.execute(f"SELECT * FROM ({count}) UNION ALL SELECT * FROM ({hours})").fetchall()
        assert counted == summed
        rows = ledger.execute("SELECT job, run, status, input_tokens, output_tokens FROM usage_runs WHERE durable")
        return {(job, run): (status, *tokens) for job, run, status, *tokens in rows}


async def stored_records(cluster: Cluster) -> dict[str, str]:
    """The status of every record in Redis, by job, read there and not by way of a gateway."""
    records: dict[str, str] = {}
    async with redis.asyncio.from_url(cluster.redis.url) as client:
        async for key in client.scan_iter(match="*job_*", count=1000):
            if await client.type(key) == b"string":
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    record: dict[str, Any] = json.loads(await client.get(key) or b"")
                    records[record["id"]] = record["status"]
    return records


__all__ = ["Rounds", "chaos_cluster", "mended"]
