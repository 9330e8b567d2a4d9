"""A caller: submits one job until it is accepted, follows it, polls it, and then holds everything against everything.

What an outage answers (a lost connection, 502, 503) is no 202 and is tried again, as any client does. Anything else that
is not as promised becomes one of `faults`.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpx

from tests.soak.moments import Moments
from tests.soak.view import TERMINAL, Frames, View
from tests.soak.wanted import MODEL, Cancel, Trouble, Wanted, Way

SUBMIT_S = 6.0
"""A client's patience with one try to submit."""
ANSWER_S = 45.0
"""With one that waits for the answer itself."""
POLL_S = 5
AGAIN_S = 0.1
NEVER = 1_000_000
OVER = {"completed", "failed", "cancelled", "expired"}


class Outage(Exception):
    """Try again."""


class Broken(Exception):
    """A promise is broken for good: there is nothing to wait for any more."""


class Caller:
    """See the module's docstring."""

    def __init__(self, http: httpx.AsyncClient, urls: list[str], wanted: Wanted, seed: str, moments: Moments) -> None:
        self._http = http
        self._urls = urls
        self._rng = random.Random(f"{seed}/{wanted.label}")
        self._key = f"{seed}/{wanted.label}"
        self._moments = moments
        self.wanted = wanted
        self.job = ""
        self.view = View()
        self.history = View()
        """The events as they are told from the first one when all is over."""
        self.record: dict[str, Any] = {}
        self.faults: list[str] = []
        self.doing = "nothing"
        """For the report of a round that does not end."""
        self._answers: list[bytes] = []
        """What the submissions themselves were answered with."""

    async def run(self) -> None:
        """From the first try to submit to the last check."""
        await self._submit()
        work = [self._follow(self.view, hang_up=True), self._poll()]
        if self.wanted.cancel is not Cancel.NEVER:
            work.append(self._cancel())
        with suppress(Broken):
            for result in await asyncio.gather(*work, return_exceptions=True):
                if isinstance(result, BaseException):
                    raise result
            await self._follow(self.history, hang_up=False)
            await self._check()

    def fault(self, text: str) -> None:
        """Something that must not be."""
        self.faults.append(f"{self.wanted.label} {self.job} ({self.wanted.way}): {text}")

    # Requests

    def _url(self) -> str:
        return self._rng.choice(self._urls)

    @asynccontextmanager
    async def _asked(
        self,
        method: str,
        path: str,
        *,
        body: Any = None,
        headers: dict[str, str] | None = None,
        read_s: float = SUBMIT_S,
    ) -> AsyncIterator[httpx.Response]:
        """One request to any gateway. Raises Outage."""
        self.doing = f"{method} {path}"
        timeout = httpx.Timeout(SUBMIT_S, read=read_s)
        request = self._http.stream(method, self._url() + path, json=body, headers=headers, timeout=timeout)
        try:
            async with request as response:
                if response.status_code in {502, 503}:
                    self._outage(response.status_code, await response.aread())
                yield response
        except httpx.HTTPError as error:
            raise Outage(repr(error)) from error

    def _outage(self, status: int, body: bytes) -> None:
        """Of a job that failed for good that is the answer, and not an outage."""
        code = json.loads(body)["error"]["code"]
        if status == 502 and code in {"backend_error", "worker_lost"}:
            return
        if status == 502 or code != "unavailable":
            self.fault(f"{status} {body!r} where a part is away")
        raise Outage(f"{status} {code}")

    async def _again(self, attempt: Any) -> Any:
        """`attempt()` until there is no outage."""
        while True:
            try:
                return await attempt()
            except Outage:
                await asyncio.sleep(AGAIN_S)

    # Submitting

    async def _submit(self) -> None:
        self._moments.happened("submitting")
        way = self.wanted.way
        if way is Way.RESUME:
            await self._stream()
        elif way in {Way.KEY, Way.KEY_SYNC}:
            count = 3 if way is Way.KEY else 2
            jobs = await asyncio.gather(*(self._again(self._submit_once) for _ in range(count)))
            if len(set(jobs)) != 1:
                self.fault(f"one Idempotency-Key, but the jobs {jobs}")
            if len(set(self._answers)) > 1:
                self.fault("one Idempotency-Key, but different answers")
        else:
            await self._again(self._submit_once)
        self._moments.happened("accepted")

    async def _submit_once(self) -> str:
        wanted, headers = self.wanted, {}
        path: str
        body: dict[str, Any]
        if wanted.way in {Way.JOBS, Way.KEY}:
            path, body = (
                "/v1/jobs",
                {"endpoint": wanted.endpoint, "body": wanted.body, "metadata": {"label": wanted.label}},
            )
            body |= {"service_tier": wanted.tier} if wanted.tier else {}
        else:
            path, body = wanted.endpoint, wanted.body | ({"service_tier": wanted.tier} if wanted.tier else {})
        if wanted.way in {Way.KEY, Way.KEY_SYNC}:
            headers["idempotency-key"] = self._key
        elif wanted.way in {Way.PREFER, Way.PREFER_WAIT}:
            headers["prefer"] = "respond-async" + (", wait=1" if wanted.way is Way.PREFER_WAIT else "")
        read_s = ANSWER_S if wanted.way is Way.KEY_SYNC else SUBMIT_S
        async with self._asked("POST", path, body=body, headers=headers, read_s=read_s) as response:
            data = await response.aread()
        return self._accepted(response, data)

    def _accepted(self, response: httpx.Response, data: bytes) -> str:
        """The job's id, from a 202 or an answer."""
        status, job = response.status_code, response.headers.get("x-nexus-job-id", "")
        if status == 202:
            record = json.loads(data)
            if (record["id"], response.headers["location"]) != (job, f"/v1/jobs/{job}"):
                self.fault(f"a 202 that names several jobs: {data!r} {response.headers}")
        elif status == 200 and self.wanted.way in {Way.KEY_SYNC, Way.PREFER_WAIT}:
            self._answers.append(data)
            if not self.wanted.whole(job, data):
                self.fault(f"the answer at once is not whole: {data[:200]!r}")
        elif status != 502 or self.wanted.way not in {Way.KEY_SYNC, Way.PREFER_WAIT}:
            self.fault(f"submitting was answered {status} {data[:300]!r}")
        if not job:
            self.fault(f"no job id in {status} {data[:300]!r}")
        self.job = self.job or job
        return job

    async def _stream(self) -> None:
        """A synchronous stream that can be resumed: once it has begun, the job is accepted."""
        headers = {"x-nexus-resume": "true"}
        body = self.wanted.body | ({"service_tier": self.wanted.tier} if self.wanted.tier else {})
        while not self.job:
            try:
                async with self._asked(
                    "POST", self.wanted.endpoint, body=body, headers=headers, read_s=ANSWER_S
                ) as response:
                    self.job = response.headers.get("x-nexus-job-id", "")
                    if response.status_code == 200:
                        await self._relayed(response)
                    elif not self.job or response.status_code != 502:
                        self.fault(f"a stream was answered {response.status_code} {await response.aread()!r}")
            except Outage:
                await asyncio.sleep(AGAIN_S)

    async def _relayed(self, response: httpx.Response) -> None:
        frames, ended = Frames(), False
        async for line in response.aiter_lines():
            told = frames.line(line)
            if told is None:
                continue
            _, event_id, data = told
            if ended:
                self.fault(f"{data!r} behind the end of a stream")
            if data == "[DONE]":
                ended = True
            elif "error" in json.loads(data):
                code = json.loads(data)["error"]["code"]
                ended = True
                if code not in {"worker_lost", "unavailable", "backend_error"}:
                    self.fault(f"a stream ended in {data}")
            else:
                self.view.adopt(event_id, data)
                self._moments.happened("chunk")

    # Watching

    async def _follow(self, view: View, *, hang_up: bool) -> None:
        while not view.end:
            try:
                await self._connection(view, self._rng.choice([1, 3, 8, NEVER, NEVER]) if hang_up else NEVER)
            except Outage:
                await asyncio.sleep(AGAIN_S)
        if hang_up:
            self._moments.happened("ended")

    async def _connection(self, view: View, most: int) -> None:
        """Follow on one connection, of which the caller has enough after `most` events."""
        headers = {"last-event-id": view.last} if view.last else {}
        frames, count = Frames(), 0
        async with self._asked("GET", f"/v1/jobs/{self.job}/events", headers=headers, read_s=20) as response:
            if response.status_code != 200:
                self.fault(f"events after {view.last!r}: {response.status_code} {await response.aread()!r}")
                raise Broken
            async for line in response.aiter_lines():
                told = frames.line(line)
                if told is None:
                    continue
                if told[0] == "error":
                    if json.loads(told[2])["error"]["code"] != "unavailable":
                        self.fault(f"events after {view.last!r} ended in {told[2]}")
                        raise Broken
                    raise Outage
                view.take(*told)
                count += 1
                if view is self.view:
                    self._moments.happened(told[0].removeprefix("job."))
                if told[0] in TERMINAL or count == most:
                    return

    async def _poll(self) -> None:
        while self.record.get("status") not in OVER:
            self.record = await self._again(lambda: self._look(POLL_S))

    async def _look(self, wait: int = 0) -> dict[str, Any]:
        path = f"/v1/jobs/{self.job}" + (f"?wait={wait}" if wait else "")
        async with self._asked("GET", path, read_s=wait + SUBMIT_S) as response:
            data = await response.aread()
        if response.status_code != 200:
            self.fault(f"a poll was answered {response.status_code} {data[:300]!r}")
            raise Broken
        record: dict[str, Any] = json.loads(data)
        return record

    async def _cancel(self) -> None:
        async def attempt() -> None:
            async with self._asked("POST", f"/v1/jobs/{self.job}/cancel") as response:
                data = await response.aread()
            if response.status_code != 200 or json.loads(data)["status"] not in OVER:
                self.fault(f"cancelling was answered {response.status_code} {data[:300]!r}")

        await self._again(attempt)
        self._moments.happened("cancel")

    # Checking

    async def _check(self) -> None:
        status = self.record["status"]
        ends = {self.view.end, self.history.end, f"job.{status}"}
        if len(ends) != 1:
            self.fault(f"several ends: {ends}")
        self.faults += [f"{self.wanted.label} {self.job}: live: {text}" for text in self.view.faults]
        self.faults += [f"{self.wanted.label} {self.job}: history: {text}" for text in self.history.faults]
        for _ in range(2):
            if (again := await self._again(self._look))["status"] != status:
                self.fault(f"{status}, and then {again['status']}")
        if self.wanted.way in {Way.KEY, Way.KEY_SYNC} and (job := await self._again(self._submit_once)) != self.job:
            self.fault(f"the Idempotency-Key of {self.job} has become {job}'s")
        await self._check_result(status)
        self._check_legal(status)

    async def _check_result(self, status: str) -> None:
        async def attempt() -> tuple[int, bytes]:
            async with self._asked("GET", f"/v1/jobs/{self.job}/result", read_s=20) as response:
                return response.status_code, await response.aread()

        code, data = await self._again(attempt)
        if status == "completed":
            if code != 200 or not self.wanted.whole(self.job, data):
                self.fault(f"the result is not whole: {code} {data[:300]!r}")
            for answer in self._answers:
                if answer != data:
                    self.fault("the answer at once is another one than the result")
            for name, view in (("live", self.view), ("history", self.history)):
                if view.chunks and view.answer() != data:
                    self.fault(f"the chunks ({name}) are not the result: {view.answer()[:300]!r}")
                if self.wanted.streamed and not view.chunks:
                    self.fault(f"a stream without chunks ({name})")
            return
        error = json.loads(data)["error"]
        expected = (self.record["error"] or {}).get("code") or f"job_{status}"
        if code < 400 or error["code"] != expected:
            self.fault(f"{status} with {self.record['error']}, but the result says {code} {error}")

    def _check_legal(self, status: str) -> None:
        """Whether what was asked for may end so."""
        wanted, starts = self.wanted, self.history.starts
        if wanted.cancel is Cancel.PARKED:
            if status != "cancelled" or starts or self.record["attempts"]:
                self.fault(f"cancelled before it began, but {status} after {starts} starts")
        elif status == "cancelled":
            if wanted.cancel is Cancel.NEVER:
                self.fault("cancelled, which nobody wanted")
        elif wanted.trouble is Trouble.PERMANENT:
            if status != "failed" or (self.record["error"]["code"] != "worker_lost" and starts > 3):
                self.fault(f"told to fail for good, but {status} after {starts} starts")
        elif status == "failed":
            # Three starts are what a job has, anyone who ended them.
            if starts < 3:
                self.fault(f"failed after {starts} starts: {self.record['error']}")
        elif status != "completed":
            self.fault(f"ended as {status}: {self.record['error']}")
        if wanted.body["model"] == MODEL and status == "completed" and not starts:
            self.fault("completed without a start")
