"""Callers of every kind, who ask again and again, and count as a failure whatever is not as promised.

Each caller is a loop over one kind of request. A stream that ends before its end is a failure only where it cannot be
resumed; a job is asked for until it has ended, by anybody's gateway.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import httpx

from tests.cluster import KEY, chat, data_lines, texts

PATIENCE_S = 60.0
OUTAGES = frozenset({"unavailable", "events_lost", "worker_lost"})
"""Codes of errors with which a request may end while something is away."""
LONG = 80
"""Tokens, of 100 ms each, of a stream that can be resumed."""
LARGE = 700_000
"""Bytes of a body that goes by way of the object store."""


class Wrong(Exception):
    """Not as promised."""


class Load:
    """See the module's docstring. `url` leads to all the gateways.

    With `outages`, what is there is lost now and then: a request may fail as outages do, and is not counted as done; what was
    accepted must not be lost.
    """

    def __init__(self, url: str, model: str = "echo", *, outages: bool = False) -> None:
        self.url = url
        self.model = model
        self.outages = outages
        self.done: Counter[str] = Counter()
        self.failed: list[str] = []
        self.refused: Counter[str] = Counter()
        """What outages were answered with."""
        self.accepted: dict[str, str] = {}
        """Of each job that was accepted what must come out of it."""
        self.begun = self.resumed = 0
        """Streams that can be resumed, and those among them that had to be."""
        self._ending = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._numbers = itertools.count(1)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=100)
        self.http = httpx.AsyncClient(
            base_url=url, timeout=PATIENCE_S, limits=limits, headers={"authorization": f"Bearer {KEY}"}
        )

    def start(self, **callers: int) -> None:
        """So many of each kind: `sync`, `stream`, `large`, `upload`, `submit`, `resume`."""
        kinds: dict[str, Callable[[str], Awaitable[None]]] = {
            "sync": self._sync,
            "stream": self._stream,
            "large": self._large,
            "upload": self._upload,
            "submit": self._submit,
            "resume": self._resume,
        }
        for kind, count in callers.items():
            self._tasks += [asyncio.create_task(self._again(kind, kinds[kind])) for _ in range(count)]

    async def begin_streams(self, count: int) -> None:
        """So many streams that can be resumed, once; returns when all of them have begun."""
        before = self.begun
        self._tasks += [asyncio.create_task(self._once("resume", self._resume)) for _ in range(count)]
        async with asyncio.timeout(PATIENCE_S):
            while self.begun < before + count:
                await asyncio.sleep(0.02)

    async def stop(self) -> None:
        """What is under way comes to its end."""
        self._ending.set()
        await asyncio.gather(*self._tasks)

    async def aclose(self) -> None:
        """Leave everything as it is."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.http.aclose()

    async def _again(self, kind: str, ask: Callable[[str], Awaitable[None]]) -> None:
        while not self._ending.is_set():
            await self._once(kind, ask)

    async def _once(self, kind: str, ask: Callable[[str], Awaitable[None]]) -> None:
        text = f"{kind} number {next(self._numbers)} of many words"
        try:
            await ask(text)
        except Wrong as error:
            self.failed.append(f"{kind}: {error}")
        except httpx.HTTPError as error:
            self._outage(kind, repr(error))
        else:
            self.done[kind] += 1

    def _outage(self, kind: str, what: str) -> None:
        if self.outages:
            self.refused[f"{kind} {what}"[:80]] += 1
        else:
            self.failed.append(f"{kind}: {what}")

    def _require(self, response: httpx.Response, status: int) -> None:
        """Raises Wrong, or where outages may be, an HTTPError for one."""
        if response.status_code == status:
            return
        what = f"{response.status_code} {response.text[:300]}"
        if self.outages and response.status_code >= 500:
            code = json.loads(response.text)["error"]["code"]
            if code in OUTAGES:
                raise httpx.HTTPError(f"{response.status_code} {code}")
        raise Wrong(what)

    # Kinds

    async def _sync(self, text: str) -> None:
        response = await self.http.post("/v1/chat/completions", json=self._chat(text))
        self._require(response, 200)
        said = response.json()["choices"][0]["message"]["content"]
        if said != text:
            raise Wrong(f"asked {text!r}, answered {said!r}")

    def _chat(self, text: str, **fields: Any) -> dict[str, Any]:
        return chat(text, model=self.model, **fields)

    async def _stream(self, text: str) -> None:
        body = self._chat(text, stream=True, echo={"delay_ms": 30})
        async with self.http.stream("POST", "/v1/chat/completions", json=body) as response:
            said = (await response.aread()).decode()
        self._require(response, 200)
        lines = data_lines(said)
        if lines[-1:] == ["[DONE]"] and "".join(texts(lines)) == text:
            return
        if self.outages and lines and "error" in json.loads(lines[-1]):
            code = json.loads(lines[-1])["error"]["code"]
            if code in OUTAGES:
                raise httpx.HTTPError(f"error frame {code}")
        raise Wrong(f"a stream that was not whole: {said[-300:]!r}")

    async def _large(self, text: str) -> None:
        """Question and answer by way of the object store."""
        response = await self.http.post("/v1/chat/completions", json=self._chat(text + " x" * (LARGE // 2)))
        self._require(response, 200)
        said = response.json()["choices"][0]["message"]["content"]
        if not said.startswith(text) or len(said) != len(text) + LARGE:
            raise Wrong(f"asked {text!r} and more, answered {said[:100]!r}, {len(said)} characters")

    async def _upload(self, text: str) -> None:
        content = text.encode() * 20_000
        response = await self.http.post(
            "/v1/files", files={"file": ("numbers.txt", content)}, data={"purpose": "user_data"}
        )
        self._require(response, 200)
        name = response.json()["id"]
        await asyncio.sleep(0.05)
        back = await self.http.get(f"/v1/files/{name}/content")
        self._require(back, 200)
        if back.content != content:
            raise Wrong(f"a file of {len(content)} bytes came back with {len(back.content)}")
        self._require(await self.http.delete(f"/v1/files/{name}"), 200)

    async def _submit(self, text: str) -> None:
        body = {"endpoint": "/v1/chat/completions", "body": self._chat(text, echo={"delay_ms": 20})}
        response = await self.http.post("/v1/jobs", json=body)
        self._require(response, 202)
        job = response.json()["id"]
        self.accepted[job] = text
        await self._whole(job, text)

    async def _whole(self, job: str, text: str) -> None:
        """A job that was accepted is polled until it has ended: what an outage answers is asked again."""
        record = await self._ask_until(f"/v1/jobs/{job}?wait=5", lambda found: found["status"] not in OPEN)
        if record["status"] != "completed":
            raise Wrong(f"{job} is {record['status']}: {record.get('error')}")
        result = await self._ask_until(f"/v1/jobs/{job}/result", lambda _: True)
        said = result["choices"][0]["message"]["content"]
        if said != text:
            raise Wrong(f"{job}: asked {text!r}, answered {said!r}")

    async def _ask_until(self, path: str, enough: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        async with asyncio.timeout(PATIENCE_S):
            while True:
                try:
                    response = await self.http.get(path)
                    self._require(response, 200)
                except httpx.HTTPError as error:
                    if not self.outages:
                        raise
                    self.refused[f"poll {error!r}"[:80]] += 1
                    await asyncio.sleep(0.2)
                    continue
                found: dict[str, Any] = response.json()
                if enough(found):
                    return found

    async def _resume(self, text: str) -> None:
        """A stream that can be resumed, longer than a gateway's drain: what breaks off is followed from its last event on."""
        body = self._chat(text, stream=True, echo={"delay_ms": 100, "tokens": LONG})
        said, last, job = "", "", ""
        headers = {"x-nexus-resume": "true"}
        try:
            async with self.http.stream("POST", "/v1/chat/completions", json=body, headers=headers) as response:
                if response.status_code != 200:
                    await response.aread()
                    self._require(response, 200)
                job = response.headers["x-nexus-job-id"]
                self.accepted[job] = ""
                self.begun += 1
                async for line in response.aiter_lines():
                    if line.startswith("id: "):
                        last = line[4:]
                    elif line == "data: [DONE]":
                        self._compare(job, said, text)
                        return
                    elif line.startswith("data: ") and '"error"' not in line:
                        said += "".join(texts([line[6:]]))
        except httpx.HTTPError:
            if not job:
                raise
        self.resumed += 1
        rest, again = await self._rest(job, last)
        self._compare(job, rest if again else said + rest, text)

    def _compare(self, job: str, said: str, text: str) -> None:
        words = text.split()
        wanted = [words[n % len(words)] for n in range(LONG)]
        if said.split() != wanted:
            raise Wrong(f"{job}: a resumed stream of {text!r} said {said!r}")

    async def _rest(self, job: str, last: str) -> tuple[str, bool]:
        """What comes behind the event `last`, over any number of lost connections, and whether an attempt began again."""
        said, name, again = "", "", False
        async with asyncio.timeout(PATIENCE_S):
            while True:
                try:
                    headers = {"last-event-id": last} if last else {}
                    async with self.http.stream("GET", f"/v1/jobs/{job}/events", headers=headers) as response:
                        if response.status_code != 200:
                            await response.aread()
                            self._require(response, 200)
                        async for line in response.aiter_lines():
                            key, _, value = line.partition(": ")
                            if key == "event":
                                name = value
                            elif key == "id":
                                last = value
                            elif key == "data" and name == "job.chunk" and value != "[DONE]":
                                said += "".join(texts([value]))
                            elif key == "data" and name == "job.completed":
                                return said, again
                            elif key == "data" and name in {"job.started", "job.restarted"}:
                                said, again = "", True
                            elif key == "data" and name in {"job.failed", "job.expired", "job.cancelled"}:
                                raise Wrong(f"{job}: {name} {value[:300]}")
                except httpx.HTTPError:
                    await asyncio.sleep(0.2)


OPEN = frozenset({"queued", "in_progress"})
