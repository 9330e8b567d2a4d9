"""Search the newest log lines of all gateways and workers, each of which holds its own in memory (`backbone.log_ring`).

A process answers for the time that its lines reach back to, and the result says how long that is, and which processes did not answer.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from backbone.bus.bus import GatewayBus
from backbone.logging import answer_log_query
from backbone.registry.registry import Registry
from gateway.peers import GatewayPeers
from schemas.control import Control, ControlOp
from schemas.errors import RateLimited
from schemas.logs import MAX_ANSWER_BYTES, LogAnswer, LogQuery, LogRequest, ProcessKind

TOPIC = "logs"
ANSWER_TIMEOUT_S = 2.0
MAX_SEARCHES = 4
"""Searches that a gateway makes at once. One more is refused: each may bring `MAX_RESULT_BYTES`."""
MAX_RESULT_BYTES = 8 * 1024 * 1024
"""Bytes of lines that all processes may send together."""
MAX_JOBS = 8
"""Jobs of one request whose lines are searched too."""
JOB_ID = re.compile(r"job_[0-9a-f]{32}")


@dataclass(slots=True)
class ProcessLog:
    """The answer of one process."""

    id: str
    kind: ProcessKind
    answer: LogAnswer | None = None
    """None: the process did not answer in time."""
    lines: list[dict[str, Any]] = field(default_factory=list)


class LogSearch:
    """Asks processes for their log lines, and answers the other gateways."""

    def __init__(
        self, bus: GatewayBus, registry: Registry, peers: GatewayPeers, *, timeout_s: float = ANSWER_TIMEOUT_S
    ) -> None:
        self._bus = bus
        self._registry = registry
        self._peers = peers
        self._timeout_s = timeout_s
        self._running = 0

    async def start(self) -> None:
        """Answer other gateways from now on. Raises Unavailable."""
        await self._bus.subscribe_gateways(TOPIC, self._on_request)

    async def close(self) -> None:
        """Do nothing: the bus ends the subscription."""

    def _on_request(self, message: bytes) -> None:
        try:
            request = LogRequest.model_validate_json(message)
        except ValueError:
            return
        self._bus.send_reply(request.reply, answer_log_query(request, ProcessKind.GATEWAY, self._peers.name))

    async def search(self, found_id: str, limit: int) -> list[ProcessLog]:
        """Return the lines of all processes with an id of a request or a job; for a request, with the ids of its jobs too.

        Raises RateLimited.
        """
        found = await self.ask(LogQuery(texts=(found_id,), limit=limit))
        jobs = _jobs_in(found) - {found_id}
        if found_id.startswith("req_") and jobs:
            found = await self.ask(LogQuery(texts=(found_id, *sorted(jobs)[:MAX_JOBS]), limit=limit))
        return found

    async def ask(self, query: LogQuery, worker: str | None = None) -> list[ProcessLog]:
        """Return the answers of all processes, or of one worker. Raises RateLimited."""
        if self._running >= MAX_SEARCHES:
            raise RateLimited("Too many searches of logs run at once. Retry in a few seconds.")
        self._running += 1
        try:
            return await self._ask(query, worker)
        finally:
            self._running -= 1

    async def _ask(self, query: LogQuery, worker: str | None) -> list[ProcessLog]:
        snapshot = self._registry.snapshot
        workers = sorted(snapshot.workers) if snapshot is not None else []
        expected = (
            [ProcessLog(worker, ProcessKind.WORKER)]
            if worker is not None
            else [
                *(ProcessLog(name, ProcessKind.GATEWAY) for name in sorted(self._peers.names)),
                *(ProcessLog(name, ProcessKind.WORKER) for name in workers),
            ]
        )
        share = min(query.max_bytes, MAX_ANSWER_BYTES, MAX_RESULT_BYTES // max(1, len(expected)))
        question = _Question(self._bus, query.model_copy(update={"max_bytes": share}), expected)
        try:
            async with asyncio.timeout(self._timeout_s):
                await question.answered.wait()
        except TimeoutError:
            pass
        finally:
            question.close()
        return question.processes


class _Question:
    """One question on its way: each process answers on a subject, which no worker shares with another one."""

    def __init__(self, bus: GatewayBus, query: LogQuery, expected: list[ProcessLog]) -> None:
        self._bus = bus
        self.processes = expected
        self._replies: list[str] = []
        self.answered = asyncio.Event()
        self._missing = len(expected)
        gateways = {process.id: process for process in expected if process.kind is ProcessKind.GATEWAY}
        if gateways:
            request = self._request(query, lambda answer: gateways.get(answer.id))
            bus.send_to_gateways(TOPIC, request.model_dump_json().encode())
        for process in expected:
            if process.kind is ProcessKind.WORKER:
                self._ask_worker(query, process)

    def _ask_worker(self, query: LogQuery, worker: ProcessLog) -> None:
        control = Control(op=ControlOp.LOGS, logs=self._request(query, lambda _: worker))
        self._bus.send_control(worker.id, control.model_dump_json().encode())

    def _request(self, query: LogQuery, find: Callable[[LogAnswer], ProcessLog | None]) -> LogRequest:
        reply = self._bus.new_reply_subject()
        self._replies.append(reply)
        self._bus.listen(reply, lambda message: self._on_answer(message, find))
        return LogRequest(reply=reply, **dict(query))

    def _on_answer(self, message: bytes, find: Callable[[LogAnswer], ProcessLog | None]) -> None:
        try:
            answer, lines = LogAnswer.decode(message)
        except ValueError:
            return
        process = find(answer)
        if process is None or process.answer is not None:
            return
        process.answer, process.lines = answer, lines
        self._missing -= 1
        if not self._missing:
            self.answered.set()

    def close(self) -> None:
        """Listen no longer."""
        for reply in self._replies:
            self._bus.release(reply)


def _jobs_in(processes: Iterable[ProcessLog]) -> set[str]:
    lines = [line for process in processes for line in process.lines]
    return {job for line in lines if isinstance(job := line.get("job"), str) and JOB_ID.fullmatch(job)}
