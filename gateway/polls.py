"""`GET /v1/jobs/{id}` as bare ASGI: callers poll, many of them, and often."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qs

import orjson

from gateway.auth.authenticator import Auth
from gateway.http.asgi import Receive, Reply, Scope, Send, request_id_of, told_as
from gateway.http.disconnect import Waiting
from gateway.http.preferences import MAX_WAIT_S
from gateway.http.request_body import CallerGone
from gateway.jobs.base import Jobs
from gateway.jobs.shape import shape
from schemas.errors import ErrorInfo, InvalidRequest, Unavailable
from schemas.jobs import JobRecord
from schemas.keys import Scope as KeyScope

PREFIX = "/v1/jobs/"


def polled(path: str) -> str:
    """The id of the job that a GET of `path` is about; empty: it is about something else."""
    rest = path.removeprefix(PREFIX) if path.startswith(PREFIX) else ""
    return "" if "/" in rest else rest


async def shown(jobs: Jobs, record: JobRecord) -> dict[str, Any]:
    """A job as callers see it, with its place and its outlook."""
    position, eta_s = await jobs.outlook(record)
    return shape(record, position=position, eta_s=eta_s)


class Polls:
    """See the module's docstring."""

    def __init__(self, jobs: Jobs, waiting: Waiting, auth: Auth) -> None:
        self._jobs = jobs
        self._waiting = waiting
        self._auth = auth

    async def serve(self, job_id: str, scope: Scope, receive: Receive, send: Send) -> None:
        """The job; with `?wait=N`, as soon as it has ended, or after so many seconds (at most 300). Never raises, but for cancellation."""
        reply = Reply(send, request_id_of(scope))
        info: ErrorInfo | None = None
        try:
            caller = self._auth.check(scope)
            caller.require(KeyScope.JOBS)
            seconds = _wait_s(scope["query_string"])
            if seconds:
                await self._wait(caller.owner, job_id, seconds, scope, receive)
            record = await self._jobs.get(caller.owner, job_id)
            await reply.whole(200, "application/json", orjson.dumps(await shown(self._jobs, record)))
        except (CallerGone, OSError):
            return
        except Exception as error:
            info = told_as(error, reply.request_id)
        if info is not None and not reply.started:
            await reply.error(info)

    async def _wait(self, owner: str, job_id: str, seconds: float, scope: Scope, receive: Receive) -> None:
        """Until the job has ended, or the time is up, or the gateway shuts down. Raises CallerGone."""
        try:
            await self._waiting.while_there(self._jobs.wait(owner, job_id, seconds), scope, receive)
        except Unavailable:
            if not self._waiting.ending:
                raise


def _wait_s(query: bytes) -> float:
    """Raises InvalidRequest."""
    if not query:
        return 0.0
    text = parse_qs(query.decode("latin-1")).get("wait", ["0"])[-1]
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise InvalidRequest(f"'wait' is a number of seconds, not '{text[:50]}'", param="wait")
    return min(seconds, MAX_WAIT_S)
