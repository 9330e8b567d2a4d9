"""Following a job from outside: its place in the queue, then its events to the end, over outages and restarts of gateways."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from cli.errors import ConsoleError, GatewayError, GatewayUnreachable
from cli.gateway_client import ApiClient, ServerSentEvent

ENDS = frozenset({"completed", "failed", "cancelled", "expired"})
MAX_OUTAGE_S = 300.0
"""How long an outage may last."""
RETRY_DELAYS_S = (0.1, 0.2, 0.5, 1.0)
"""Between two looks at a queued job, and between two tries at a gateway that is away; the last one is repeated."""
LONG_POLL_S = 30
EVENTS_EXPIRED = "events_expired"

Notify = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class FollowedJobEvent:
    """What happened to a job."""

    id: str
    kind: str
    """`started`, `chunk`, `completed`, …: the event's name without `job.`."""
    data: Any


def path_of(job: str, part: str = "") -> str:
    """The path of a job, or of a part of it."""
    return f"/v1/jobs/{quote(job, safe='')}{part}"


class OutageRetry:
    """Waits a little after each failure in a row, and gives up when they have lasted too long."""

    def __init__(self, notify: Notify) -> None:
        self._notify = notify
        self._since: float | None = None
        self._pauses: Iterator[float] = iter(())

    def succeeded(self) -> None:
        """Something came."""
        self._since = None

    def failed(self, error: ConsoleError) -> None:
        """Wait, or raise `error` again."""
        if self._since is None:
            self._since = time.monotonic()
            self._pauses = iter(RETRY_DELAYS_S)
            self._notify(f"{error}; trying on")
        elif time.monotonic() - self._since > MAX_OUTAGE_S:
            raise error
        time.sleep(next(self._pauses, RETRY_DELAYS_S[-1]))


def is_outage(error: ConsoleError) -> bool:
    """Whether asking again makes sense."""
    return isinstance(error, GatewayUnreachable) or (isinstance(error, GatewayError) and error.status >= 500)


class JobFollower:
    """Follows one job."""

    def __init__(self, api: ApiClient, job: str, notify: Notify) -> None:
        """`notify` is given news about the way to the gateway."""
        self._api = api
        self._job = job
        self._patience = OutageRetry(notify)

    def look(self, *, wait_s: int = 0) -> dict[str, Any]:
        """The job as it stands; with `wait_s`, when it has ended, at the latest after that time."""
        path = path_of(self._job, f"?wait={wait_s}" if wait_s else "")
        while True:
            try:
                found: dict[str, Any] = self._api.get(path, read_s=wait_s + 30.0)
            except ConsoleError as error:
                if not is_outage(error):
                    raise
                self._patience.failed(error)
            else:
                self._patience.succeeded()
                return found

    def queued(self, job: dict[str, Any]) -> Generator[dict[str, Any]]:
        """The job again and again while it is queued, beginning with `job`."""
        pauses = iter(RETRY_DELAYS_S)
        while job["status"] == "queued":
            yield job
            time.sleep(next(pauses, RETRY_DELAYS_S[-1]))
            job = self.look()

    def events(self) -> Generator[FollowedJobEvent]:
        """All events, the last of which says how the job ended. Where they are not kept any more, that one alone."""
        last = ""
        while True:
            try:
                for event in self._api.events(path_of(self._job, "/events"), last):
                    self._patience.succeeded()
                    found = _read(event)
                    last = event.id or last
                    yield found
                    if found.kind in ENDS:
                        return
            except ConsoleError as error:
                if isinstance(error, GatewayError) and error.code == EVENTS_EXPIRED:
                    yield from self._end_alone()
                    return
                if not is_outage(error):
                    raise
                self._patience.failed(error)
            else:
                self._patience.failed(GatewayUnreachable("the events broke off before the job's end"))

    def _end_alone(self) -> Generator[FollowedJobEvent]:
        while True:
            job = self.look(wait_s=LONG_POLL_S)
            if job["status"] in ENDS:
                yield FollowedJobEvent("", job["status"], job)
                return


def _read(event: ServerSentEvent) -> FollowedJobEvent:
    try:
        data = json.loads(event.data)
    except ValueError as error:
        raise ConsoleError(f"the gateway sent an event that is not JSON: {event.data[:100]}") from error
    if event.event.startswith("job."):
        return FollowedJobEvent(event.id, event.event.removeprefix("job."), data)
    said = data.get("error") if isinstance(data, dict) else None
    if isinstance(said, dict):
        status = 503 if said.get("code") == "unavailable" else 400
        raise GatewayError(str(said.get("message")), status=status, code=str(said.get("code") or ""))
    raise ConsoleError(f"the gateway sent an event that is none of a job's: {event.event or event.data[:100]}")
