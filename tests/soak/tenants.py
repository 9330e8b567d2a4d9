"""Two tenants for as long as is asked for: one does all at once that a tenant may do, the other measures what it notices.

The loud one floods a model with requests and jobs, uploads a byte a second, makes batches, follows events and polls, stores responses
and results by URL, and ignores every refusal. The quiet one asks one thing after the other: a model of its own, the model that the loud one
floods, a body of 1.5 MB, a job with its result. It is alone for the first tenth, and again when the loud one has stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx

from tests.cluster import Cluster, chat

OWN, SHARED = "own", "shared"
SERVICE_MS = 50
SLOTS = 4
PARTS = 4
"""Rows of the table while both are there."""
CALLERS, UPLOADS, WATCHERS = 16, 8, 8
QUIET_PAUSE_S = 0.05
PAUSE_S = 0.05
"""Pause of each of the loud one's callers: both tenants share this process."""
DRAIN_S = 120.0
CHAT = "/v1/chat/completions"
COLUMNS = (
    "own model p50",
    "p95 ms",
    "shared model p50",
    "p95 ms",
    "1.5 MB ms",
    "job ms",
    "failures",
    "loud: answered",
    "refused",
)


class Tenant:
    """A team with a key."""

    def __init__(self, cluster: Cluster, key: str) -> None:
        self._cluster = cluster
        self._headers = {"authorization": f"Bearer {key}"}
        self.statuses: Counter[int] = Counter()

    @classmethod
    async def make(cls, cluster: Cluster, name: str) -> Tenant:
        made = await cluster.post("/v1/keys", {"name": name})
        made.raise_for_status()
        return cls(cluster, made.json()["key"])

    async def ask(self, method: str, path: str, *, gateway: int = 0, **options: Any) -> httpx.Response:
        answer = await self._cluster.http.request(
            method, self._cluster.urls[gateway] + path, headers=self._headers, timeout=120, **options
        )
        self.statuses[answer.status_code] += 1
        return answer

    async def follow(self, path: str) -> None:
        """Read a stream of events to its end."""
        url = self._cluster.urls[1] + path
        async with self._cluster.http.stream("GET", url, headers=self._headers, timeout=120) as answer:
            self.statuses[answer.status_code] += 1
            async for _ in answer.aiter_raw():
                pass


class Quiet:
    """Measures; each failure counts."""

    def __init__(self, tenant: Tenant) -> None:
        self._tenant = tenant
        self.took: dict[str, list[float]] = defaultdict(list)
        """Milliseconds, by what was asked."""
        self.failures: list[str] = []

    async def measure(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        for number in itertools.count():
            if time.monotonic() >= until:
                return
            await self._time("own", lambda: self._chat(OWN))
            await self._time("shared", lambda: self._chat(SHARED))
            if number % 10 == 0:
                await self._time("large", lambda: self._chat(OWN, "x" * 1_500_000))
                await self._time("job", self._job)
            await asyncio.sleep(QUIET_PAUSE_S)

    async def _time(self, what: str, ask: Callable[[], Awaitable[httpx.Response]]) -> None:
        began = time.monotonic()
        try:
            answer = await ask()
        except httpx.HTTPError as error:
            self.failures.append(f"{what}: {error!r}")
            return
        self.took[what].append(1000 * (time.monotonic() - began))
        if answer.status_code != 200:
            self.failures.append(f"{what}: {answer.status_code} {answer.text[:200]}")

    async def _chat(self, model: str, text: str = "hi") -> httpx.Response:
        return await self._tenant.ask("POST", CHAT, json=chat(text, model=model))

    async def _job(self) -> httpx.Response:
        made = await self._tenant.ask("POST", "/v1/jobs", json={"endpoint": CHAT, "body": chat(model=OWN)})
        if made.status_code != 202:
            return made
        path = f"/v1/jobs/{made.json()['id']}"
        ended = await self._tenant.ask("GET", f"{path}?wait=60", gateway=1)
        return await self._tenant.ask("GET", f"{path}/result") if ended.json().get("status") == "completed" else ended


class Loud:
    """Does everything at once, until it is told to stop."""

    def __init__(self, tenant: Tenant) -> None:
        self._tenant = tenant
        self._jobs: list[str] = []
        """The newest jobs."""

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        kinds = [(self._flood, CALLERS), (self._submit, CALLERS), (self._upload, UPLOADS), (self._watch, WATCHERS)]
        kinds += [(self._batch, 2), (self._respond, 4), (self._draw, 2)]
        tasks = [asyncio.create_task(self._forever(act)) for act, count in kinds for _ in range(count)]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _forever(self, act: Callable[[], Awaitable[httpx.Response | None]]) -> None:
        while True:
            with contextlib.suppress(httpx.HTTPError):
                await act()
            await asyncio.sleep(PAUSE_S)

    async def _flood(self) -> httpx.Response:
        return await self._tenant.ask("POST", CHAT, json=chat(model=SHARED))

    async def _submit(self) -> httpx.Response:
        made = await self._tenant.ask("POST", "/v1/jobs", json={"endpoint": CHAT, "body": chat(model=SHARED)})
        if made.status_code == 202:
            self._jobs = [*self._jobs[-WATCHERS:], made.json()["id"]]
        return made

    async def _upload(self) -> httpx.Response:
        async def body() -> AsyncIterator[bytes]:
            while True:
                yield b" "
                await asyncio.sleep(1)

        return await self._tenant.ask("POST", "/v1/embeddings", content=body())

    async def _watch(self) -> httpx.Response | None:
        if not self._jobs:
            return None
        job = self._jobs[-1]
        await self._tenant.follow(f"/v1/jobs/{job}/events")
        return await self._tenant.ask("GET", f"/v1/jobs/{job}?wait=30", gateway=1)

    async def _batch(self) -> httpx.Response:
        lines = (
            json.dumps({"custom_id": str(number), "method": "POST", "url": CHAT, "body": chat(model=SHARED)})
            for number in range(100)
        )
        file = {"file": ("lines.jsonl", "\n".join(lines).encode())}
        made = await self._tenant.ask("POST", "/v1/files", data={"purpose": "batch"}, files=file)
        if not made.is_success:
            return made
        body = {"input_file_id": made.json()["id"], "endpoint": CHAT, "completion_window": "24h"}
        return await self._tenant.ask("POST", "/v1/batches", json=body)

    async def _respond(self) -> httpx.Response:
        body = {"model": SHARED, "input": "x" * 200_000, "background": True}
        return await self._tenant.ask("POST", "/v1/responses", json=body)

    async def _draw(self) -> httpx.Response:
        body = {"model": SHARED, "prompt": "noise", "response_format": "url", "echo": {"size": 2_000_000}}
        return await self._tenant.ask("POST", "/v1/images/generations", json=body)


class Table:
    """Rows of Markdown, printed as they come."""

    def __init__(self, quiet: Quiet, loud: Tenant) -> None:
        self._quiet, self._loud = quiet, loud
        print("| |", *(f"{column} |" for column in COLUMNS))
        print("|---|" + "---|" * len(COLUMNS), flush=True)

    async def row(self, name: str, seconds: float) -> None:
        """Measure for so long, and print what was found."""
        quiet, before = self._quiet, Counter(self._loud.statuses)
        quiet.took.clear()
        failed = len(quiet.failures)
        await quiet.measure(seconds)
        statuses = self._loud.statuses - before
        answered = sum(count for status, count in statuses.items() if status < 300)
        cells = [*quantiles(quiet.took["own"]), *quantiles(quiet.took["shared"])]
        cells += [quantiles(quiet.took[what])[0] for what in ("large", "job")]
        cells += [str(len(quiet.failures) - failed), str(answered), str(sum(statuses.values()) - answered)]
        print(f"| {name} |", *(f"{cell} |" for cell in cells), flush=True)


def quantiles(took: list[float]) -> tuple[str, str]:
    """Return the median and the 95th percentile."""
    if len(took) < 2:
        return ("-", "-")
    return f"{statistics.median(took):.0f}", f"{statistics.quantiles(took, n=20)[-1]:.0f}"


async def run(folder: Path, minutes: float) -> bool:
    """Measure for so long. Whether the quiet tenant had no failure."""
    options = f"first_delay_ms={SERVICE_MS},tokens=1"
    seconds = 60 * minutes
    async with Cluster(folder, TEAM_MAX_RESULT_BYTES=str(64 * 1024**2)) as cluster:
        for _ in range(2):
            await cluster.start_gateway()
        for model in (OWN, SHARED):
            await cluster.start_worker(
                "echo", WORKER_MODELS=model, WORKER_CONCURRENCY=str(SLOTS), WORKER_BACKEND_OPTIONS=options
            )
        loud, quiet = await Tenant.make(cluster, "loud"), Quiet(await Tenant.make(cluster, "quiet"))
        print(f"two tenants, {minutes:g} minutes, two gateways, {SLOTS} slots of {SERVICE_MS} ms for each model")
        table = Table(quiet, loud)
        await table.row("alone", seconds / 10)
        async with Loud(loud).running():
            for part in range(PARTS):
                await table.row(f"beside, {part + 1} of {PARTS}", 0.8 * seconds / PARTS)
        await _cancel_all(cluster)
        await table.row("alone again", seconds / 10)
        for failure, count in Counter(quiet.failures).most_common(10):
            print(f"failure of the quiet tenant: {failure} (x{count})")
    return not quiet.failures


async def _cancel_all(cluster: Cluster) -> None:
    """End the loud tenant's work."""
    keys = (await cluster.get("/v1/keys")).json()["data"]
    [loud] = [key["id"] for key in keys if key["name"] == "loud"]
    answer = await cluster.http.delete(f"{cluster.url}/v1/keys/{loud}?jobs=cancel", timeout=DRAIN_S)
    answer.raise_for_status()
