"""Durable jobs as the fault tests see them: submitted, followed in the background, looked up in Redis and in NATS."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Self

import httpx
import nats

from tests.cluster import Cluster, chat
from tests.soak.rounds import stored_records
from tests.soak.view import TERMINAL, Frames, View

CHAT = "/v1/chat/completions"


class Watched:
    """A job whose events are followed on one gateway or another, over all of their deaths."""

    def __init__(self, cluster: Cluster, record: dict[str, Any], urls: list[str]) -> None:
        self.id: str = record["id"]
        self.view = View()
        self.kinds: list[str] = []
        """Without `job.`, in the order in which they came; without `queued`, which a quick worker's events may overtake."""
        self._cluster = cluster
        self._urls = urls
        self._task = asyncio.create_task(self._follow())

    async def _follow(self) -> None:
        turn = 0
        while not self.view.end:
            turn += 1
            try:
                await self._connection(self._urls[turn % len(self._urls)])
            except httpx.HTTPError:
                await asyncio.sleep(0.1)  # a client's pause between tries

    async def _connection(self, url: str) -> None:
        headers = {"last-event-id": self.view.last} if self.view.last else {}
        frames = Frames()
        request = self._cluster.http.stream("GET", f"{url}/v1/jobs/{self.id}/events", headers=headers, timeout=15)
        async with request as response:
            if response.status_code == 503:
                raise httpx.ReadError("away")
            assert response.status_code == 200, await response.aread()
            async for line in response.aiter_lines():
                told = frames.line(line)
                if told is None:
                    continue
                if told[0] == "error":
                    assert json.loads(told[2])["error"]["code"] == "unavailable", told
                    raise httpx.ReadError("away")
                self.view.take(*told)
                if told[0] != "job.queued":
                    self.kinds.append(told[0].removeprefix("job."))
                if told[0] in TERMINAL:
                    return

    async def end(self, timeout_s: float = 30.0) -> Self:
        """Until the terminal event. Fails where anything in the events was not as promised."""
        done, _ = await asyncio.wait([self._task], timeout=timeout_s)
        assert done, f"{self.id}: no end within {timeout_s:g} s; so far {self.kinds}\n{self._cluster.logs()}"
        self._task.result()
        assert self.view.faults == [], f"{self.id}: {self.view.faults}"
        return self

    async def leave(self) -> None:
        """Stop following."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    @property
    def text(self) -> str:
        """What the chunks of a chat stream say."""
        chunks = (json.loads(chunk) for chunk in self.view.chunks)
        return "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks)

    async def result(self, gateway: int = 0) -> httpx.Response:
        """`GET …/result`."""
        return await self._cluster.http.get(f"{self._cluster.urls[gateway]}/v1/jobs/{self.id}/result")

    async def record(self, gateway: int = 0, wait: int = 0) -> dict[str, Any]:
        """`GET /v1/jobs/{id}`."""
        url = f"{self._cluster.urls[gateway]}/v1/jobs/{self.id}" + (f"?wait={wait}" if wait else "")
        response = await self._cluster.http.get(url)
        assert response.status_code == 200, response.text
        return response.json()

    async def in_redis(self) -> str | None:
        """The status that Redis holds."""
        return (await stored_records(self._cluster)).get(self.id)


class Desk:
    """Submits chat jobs for one test's model, and lets go of them at its end."""

    def __init__(self, cluster: Cluster, model: str) -> None:
        self.cluster = cluster
        self.model = model
        self._jobs: list[Watched] = []

    async def submit(
        self,
        content: str = "one two three four five six",
        *,
        gateway: int = 0,
        on: list[str] | None = None,
        **fields: Any,
    ) -> Watched:
        """Accepted by that gateway, and followed on all of them, or on those at `on`."""
        body = {"endpoint": CHAT, "body": chat(content, model=self.model, **fields)}
        response = await self.cluster.http.post(self.cluster.urls[gateway] + "/v1/jobs", json=body)
        assert response.status_code == 202, response.text
        job = Watched(self.cluster, response.json(), on or self.cluster.urls)
        self._jobs.append(job)
        return job

    async def stream(self, content: str = "one two three four five six", **options: Any) -> Watched:
        """The same, streamed."""
        return await self.submit(content, stream=True, **options)

    async def close(self) -> None:
        """Stop following."""
        await asyncio.gather(*(job.leave() for job in self._jobs))


@asynccontextmanager
async def undecidable(cluster: Cluster) -> AsyncIterator[None]:
    """NATS takes no terminal words: jobs get as far as their last event, and not to their end."""
    await _limit_words(cluster, 1)
    try:
        yield
    finally:
        await _limit_words(cluster, -1)


async def _limit_words(cluster: Cluster, max_bytes: int) -> None:
    connection = await nats.connect(cluster.nats.url)
    try:
        stream = connection.jetstream()
        config = (await stream.stream_info("NEXUS_DONE")).config
        config.max_msg_size = max_bytes
        await stream.update_stream(config)
    finally:
        await connection.close()
