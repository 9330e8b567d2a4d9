"""Following a job from outside: its place in the queue, then its events to the end, over outages and restarts of gateways."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from cli.errors import ConsoleError, Refused, Unreachable
from cli.gateway_client import ApiClient, ServerSentEvent

ENDS = frozenset({"completed", "failed", "cancelled", "expired"})
PATIENCE_S = 300.0
"""How long an outage may last."""
PAUSES_S = (0.1, 0.2, 0.5, 1.0)
"""Between two looks at a queued job, and between two tries at a gateway that is away; the last one is repeated."""
POLL_S = 30
EVENTS_EXPIRED = "events_expired"

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class JobEvent:
    """What happened to a job."""

    id: str
    kind: str
    """`started`, `chunk`, `completed`, …: the event's name without `job.`."""
    data: Any


def path_of(job: str, part: str = "") -> str:
    """The path of a job, or of a part of it."""
    return f"/v1/jobs/{quote(job, safe='')}{part}"


class Patience:
    """Waits a little after each failure in a row, and gives up when they have lasted too long."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._since: float | None = None
        self._pauses: Iterator[float] = iter(())

    def succeeded(self) -> None:
        """Something came."""
        self._since = None

    def failed(self, error: ConsoleError) -> None:
        """Wait, or raise `error` again."""
        if self._since is None:
            self._since = time.monotonic()
            self._pauses = iter(PAUSES_S)
            self._tell(f"{error}; trying on")
        elif time.monotonic() - self._since > PATIENCE_S:
            raise error
        time.sleep(next(self._pauses, PAUSES_S[-1]))


def is_outage(error: ConsoleError) -> bool:
    """Whether asking again makes sense."""
    return isinstance(error, Unreachable) or (isinstance(error, Refused) and error.status >= 500)


class Follower:
    """Follows one job."""

    def __init__(self, api: ApiClient, job: str, tell: Tell) -> None:
        """`tell` is given news about the way to the gateway."""
        self._api = api
        self._job = job
        self._patience = Patience(tell)

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
        pauses = iter(PAUSES_S)
        while job["status"] == "queued":
            yield job
            time.sleep(next(pauses, PAUSES_S[-1]))
            job = self.look()

    def events(self) -> Generator[JobEvent]:
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
                if isinstance(error, Refused) and error.code == EVENTS_EXPIRED:
                    yield from self._end_alone()
                    return
                if not is_outage(error):
                    raise
                self._patience.failed(error)
            else:
                self._patience.failed(Unreachable("the events broke off before the job's end"))

    def _end_alone(self) -> Generator[JobEvent]:
        while True:
            job = self.look(wait_s=POLL_S)
            if job["status"] in ENDS:
                yield JobEvent("", job["status"], job)
                return


def _read(event: ServerSentEvent) -> JobEvent:
    try:
        data = json.loads(event.data)
    except ValueError as error:
        raise ConsoleError(f"the gateway sent an event that is not JSON: {event.data[:100]}") from error
    if event.event.startswith("job."):
        return JobEvent(event.id, event.event.removeprefix("job."), data)
    said = data.get("error") if isinstance(data, dict) else None
    if isinstance(said, dict):
        status = 503 if said.get("code") == "unavailable" else 400
        raise Refused(str(said.get("message")), status=status, code=str(said.get("code") or ""))
    raise ConsoleError(f"the gateway sent an event that is none of a job's: {event.event or event.data[:100]}")
