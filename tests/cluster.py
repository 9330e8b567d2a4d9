"""A whole Nexus of real processes on free ports, for tests that look at it from outside.

async with Cluster(tmp_path) as cluster:
    await cluster.start_gateway()
    worker = await cluster.start_worker("echo")
    answer = await cluster.post("/v1/chat/completions", {"model": "echo", ...})
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import httpx

from tests.ports import free_port
from tests.servers import ROOT, Process, Server, Source, local_environment
from tests.servers import source as chosen

__all__ = ["KEY", "ROOT", "Cluster", "Crew", "Recorded", "chat", "data_lines", "free_port", "texts"]

KEY = "sk-test-key"


def chat(content: str = "hello there", *, model: str = "echo", **fields: Any) -> dict[str, Any]:
    """A chat request's body."""
    return {"model": model, "messages": [{"role": "user", "content": content}], **fields}


def data_lines(body: str) -> list[str]:
    """What follows `data: ` in an SSE body."""
    return [line[6:] for line in body.split("\n") if line.startswith("data: ")]


def texts(lines: list[str]) -> list[str]:
    """The pieces of text in a chat stream's `data:` payloads."""
    return [
        choice["delta"]["content"]
        for line in lines
        if line != "[DONE]"
        for choice in json.loads(line).get("choices", ())
        if choice["delta"].get("content")
    ]


class Recorded:
    """One request as its caller sees it, followed by a task until it ends, breaks or the caller hangs up."""

    def __init__(self, http: httpx.AsyncClient, url: str, body: dict[str, Any], headers: dict[str, str]) -> None:
        self.status: int | None = None
        self.headers: httpx.Headers | None = None
        self.lines: list[str] = []
        """`data:` payloads of a stream."""
        self.comments: list[str] = []
        self.body = ""
        """Everything that came."""
        self.broken: str | None = None
        """What ended it, where the answer did not end in order."""
        self.began = asyncio.get_running_loop().time()
        self.seconds = 0.0
        self._task = asyncio.create_task(self._follow(http, url, body, headers))

    async def _follow(self, http: httpx.AsyncClient, url: str, body: dict[str, Any], headers: dict[str, str]) -> None:
        try:
            async with http.stream("POST", url, json=body, headers=headers) as response:
                self.status, self.headers = response.status_code, response.headers
                async for line in response.aiter_lines():
                    self._line(line)
        except httpx.HTTPError as error:
            self.broken = f"{type(error).__name__}: {error}"
        finally:
            self.seconds = asyncio.get_running_loop().time() - self.began

    def _line(self, line: str) -> None:
        self.body += line + "\n"
        if line.startswith("data: "):
            self.lines.append(line[6:])
        elif line.startswith(":"):
            self.comments.append(line)

    @property
    def ended(self) -> bool:
        """Nothing more comes."""
        return self._task.done()

    async def end(self, timeout_s: float = 60.0) -> Self:
        """Wait for the end."""
        done, _ = await asyncio.wait([self._task], timeout=timeout_s)
        assert done, f"no end within {timeout_s:g} s; so far {self.status} {self.body[-500:]}"
        if not self._task.cancelled():
            self._task.result()
        return self

    async def hang_up(self) -> None:
        """Close the connection now."""
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task

    @property
    def texts(self) -> list[str]:
        """The pieces of text of a chat stream so far."""
        return texts(self.lines)

    @property
    def text(self) -> str:
        """The text of a whole chat answer."""
        return str(json.loads(self.body)["choices"][0]["message"]["content"])

    @property
    def error(self) -> dict[str, Any] | None:
        """OpenAI's error object, from the body or from a stream's last frame."""
        last = self.lines[-1] if self.lines else self.body
        with suppress(ValueError, AttributeError):
            return json.loads(last).get("error")
        return None

    @property
    def complete(self) -> bool:
        """A stream that ended as a success."""
        return self.ended and self.status == 200 and self.lines[-1:] == ["[DONE]"] and self.broken is None


class Cluster:
    """NATS, etcd and Redis of its own, and any number of gateways and workers, from wherever `--servers` says."""

    def __init__(self, folder: Path, *, source: Source | None = None, **settings: str) -> None:
        self.folder = folder
        self.settings = settings
        """Environment variables for every gateway and worker."""
        self.source = source or chosen()
        self.nats = self.source.nats(folder / "nats")
        self.etcd = self.source.etcd(folder / "etcd")
        self.redis = self.source.redis(folder / "redis")
        self.gateways: list[Process] = []
        self.workers: dict[str, Process] = {}
        self.urls: list[str] = []
        self.observability_url = ""
        self._recorded: list[Recorded] = []
        self.http = httpx.AsyncClient(
            timeout=60, limits=httpx.Limits(max_connections=500), headers={"authorization": f"Bearer {KEY}"}
        )

    async def __aenter__(self) -> Self:
        await asyncio.gather(self.nats.start(), self.etcd.start(), self.redis.start())
        return self

    async def __aexit__(self, *_: object) -> None:
        for recorded in self._recorded:
            await recorded.hang_up()
        await self.http.aclose()
        parts = [*self.workers.values(), *self.gateways]
        for process in parts:
            process.resume()
        await asyncio.gather(*(process.stop() for process in parts))
        await self.source.release(*parts, self.nats, self.etcd, self.redis)

    def environment(self, **settings: str) -> dict[str, str]:
        """What a process of this machine that belongs to this cluster is configured by."""
        return local_environment({name: server.url for name, server in self._servers().items()} | self._with(settings))

    def _servers(self) -> dict[str, Server]:
        return {"NATS_URL": self.nats, "ETCD_URL": self.etcd, "REDIS_URL": self.redis}

    def _with(self, settings: dict[str, str]) -> dict[str, str]:
        # No load balancer has to turn away from a gateway that stops.
        common = {"GATEWAY_BEARER_TOKEN": KEY, "GATEWAY_LAME_DUCK_S": "0", "PUBLIC_ROUTES": "metrics,docs,status"}
        return common | self.settings | settings

    @property
    def url(self) -> str:
        """The first gateway's."""
        return self.urls[0]

    async def start_gateway(self, **settings: str) -> Process:
        """One more gateway, ready."""
        port, side = free_port(), free_port()
        settings = {"GATEWAY_PORT": str(port), "OBSERVABILITY_PORT": str(side)} | settings
        url = f"http://127.0.0.1:{settings['GATEWAY_PORT']}"

        async def ready() -> bool:
            try:
                return (await self.http.get(url + "/readyz")).status_code == 200
            except httpx.HTTPError:
                return False

        name = f"gateway-{len(self.gateways)}"
        process = self.source.part("gateway", name, self.folder, self._servers(), self._with(settings), ready)
        await process.start()
        self.gateways.append(process)
        self.urls.append(url)
        self.observability_url = self.observability_url or f"http://127.0.0.1:{side}"
        return process

    async def start_worker(
        self, backend: str = "echo", *, name: str | None = None, wait: bool = True, **settings: str
    ) -> str:
        """One more worker; with `wait`, seen `ready` by the first gateway. Returns its id."""
        name = name or f"w{len(self.workers) + 1}"
        settings = {"WORKER_BACKEND": backend, "WORKER_NAME": name} | settings
        process = self.source.part("worker", name, self.folder, self._servers(), self._with(settings))
        # Before it starts: another may be started meanwhile, and this one is ended whatever happens.
        self.workers[name] = process
        await process.start()
        if wait:
            await self.wait_for_worker(name)
        return name

    async def wait_for_worker(self, name: str, state: str | None = "ready", timeout_s: float = 60.0) -> None:
        """Until the first gateway sees the worker in this state (None: not at all)."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        while True:
            seen = (await self.http.get(self.url + "/v1/workers")).json()["data"]
            if {worker["id"]: worker["state"] for worker in seen}.get(name) == state:
                return
            assert asyncio.get_running_loop().time() < deadline, f"worker {name} not {state}: {seen}\n{self.logs()}"
            await asyncio.sleep(0.05)

    async def get(self, path: str, **options: Any) -> httpx.Response:
        """GET from the first gateway."""
        return await self.http.get(self.url + path, **options)

    async def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        """POST JSON to the first gateway."""
        return await self.http.post(self.url + path, json=body, **options)

    async def stream(
        self, body: dict[str, Any], *, path: str = "/v1/chat/completions", url: str = ""
    ) -> AsyncIterator[str]:
        """The `data:` payloads of a streamed answer, as they come, `[DONE]` included."""
        request = self.http.stream("POST", (url or self.url) + path, json=body | {"stream": True})
        async with request as response:
            assert response.status_code == 200, (await response.aread()).decode()
            async for line in response.aiter_lines():
                if line.startswith("data: "):
                    yield line[6:]

    def record(
        self, body: dict[str, Any], *, url: str = "", path: str = "/v1/chat/completions", **headers: str
    ) -> Recorded:
        """Send a request, and follow its answer in the background."""
        recorded = Recorded(self.http, (url or self.url) + path, body, headers)
        self._recorded.append(recorded)
        return recorded

    async def send(
        self, body: dict[str, Any] | bytes, *, version: str = "1.1", key: str = KEY, lines: str = ""
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Send a chat request on a connection of its own, in one write, as clients do whose requests the gateway serves without a task."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        url = httpx.URL(self.url)
        reader, writer = await asyncio.open_connection(url.host, url.port)
        head = f"POST /v1/chat/completions HTTP/{version}\r\nhost: nexus\r\nauthorization: Bearer {key}\r\n{lines}"
        writer.write(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
        return reader, writer

    async def _queues(self) -> list[dict[str, Any]] | None:
        """The queues as the first gateway lists them; None while it has no NATS, which counts as -1 jobs."""
        answer = await self.get("/v1/queues")
        return None if answer.status_code == 503 else answer.json()["data"]

    async def in_progress(self, model: str) -> int:
        """Jobs of `model` that are with a worker."""
        queues = await self._queues()
        return -1 if queues is None else sum(queue["in_progress"] for queue in queues if queue["model"] == model)

    async def waiting(self, model: str) -> int:
        """Jobs of `model` that wait for a worker."""
        queues = await self._queues()
        return -1 if queues is None else sum(queue["depth"] for queue in queues if queue["model"] == model)

    async def stored(self, model: str) -> int:
        """Jobs of `model` that the queue holds, waiting or not."""
        queues = await self._queues()
        return (
            -1
            if queues is None
            else sum(queue["depth"] + queue["in_progress"] for queue in queues if queue["model"] == model)
        )

    async def listed(self) -> dict[str, str]:
        """The workers that the first gateway knows, and their states."""
        return {worker["id"]: worker["state"] for worker in (await self.get("/v1/workers")).json()["data"]}

    async def stop_workers(self, *names: str) -> None:
        """End these at once, whatever they do."""
        for name in names:
            self.workers[name].kill()
        await asyncio.gather(*(self.workers[name].wait() for name in names))

    def attempts(self, worker: str) -> list[dict[str, Any]]:
        """What a worker's log says about the attempts that have ended there."""
        return [event for event in self.log_events(self.workers[worker]) if event.get("event") == "attempt.finished"]

    def requests(self, gateway: int = 0) -> list[dict[str, Any]]:
        """What a gateway's log says about the requests that it has answered."""
        return [event for event in self.log_events(self.gateways[gateway]) if event.get("event") == "request.finished"]

    def logs(self) -> str:
        """The last lines of every process, for a failing test's message."""
        return "\n".join(f"--- {p.name}\n{p.tail(15)}" for p in [*self.gateways, *self.workers.values()])

    def log_events(self, process: Process) -> list[dict[str, Any]]:
        """A process's JSON log lines."""
        lines = Path(process.log_file).read_text().splitlines() if process.log_file else []
        return [json.loads(line) for line in lines if line.startswith("{")]


class Crew:
    """The workers of one test in a shared cluster, serving a model of their own."""

    def __init__(self, cluster: Cluster, model: str) -> None:
        self.cluster = cluster
        self.model = model
        self.names: list[str] = []

    async def start(self, *, options: str = "", wait: bool = True, backend: str = "echo", **settings: str) -> str:
        """One more worker; `options` are its backend's."""
        settings = {"WORKER_MODELS": self.model, "WORKER_BACKEND_OPTIONS": options} | settings
        name = await self.cluster.start_worker(backend, wait=wait, **settings)
        self.names.append(name)
        return name

    async def start_all(self, *options: str, **settings: str) -> list[str]:
        """Several at once."""
        names = [await self.start(options=text, wait=False, **settings) for text in options]
        await asyncio.gather(*(self.cluster.wait_for_worker(name) for name in names))
        return names

    def kill(self, name: str) -> None:
        """As `kill -9`."""
        self.cluster.workers[name].kill()

    def freeze(self, name: str) -> None:
        """As `kill -STOP`."""
        self.cluster.workers[name].pause()

    def thaw(self, name: str) -> None:
        """As `kill -CONT`."""
        self.cluster.workers[name].resume()

    def ask(self, content: str = "hello there", *, url: str = "", **fields: Any) -> Recorded:
        """Send a chat request for the model, and follow its answer."""
        return self.cluster.record(chat(content, **({"model": self.model} | fields)), url=url)

    def stream(self, content: str = "hello there", *, url: str = "", **fields: Any) -> Recorded:
        """The same, streamed."""
        return self.ask(content, url=url, stream=True, **fields)

    async def runs(self, count: int) -> bool:
        """Whether so many of its jobs are with a worker."""
        return await self.cluster.in_progress(self.model) == count

    async def waits(self, count: int) -> bool:
        """Whether so many of its jobs wait for a worker."""
        return await self.cluster.waiting(self.model) == count

    async def idle(self) -> bool:
        """Whether the queue holds no job of it any more."""
        return await self.cluster.stored(self.model) == 0

    async def busy(self, name: str) -> bool:
        """Whether the registry says that this worker runs something."""
        workers = (await self.cluster.get("/v1/workers")).json()["data"]
        return any(worker["id"] == name and worker["busy"] for worker in workers)

    async def stop(self) -> None:
        """End them all, whatever they do."""
        await self.cluster.stop_workers(*self.names)
