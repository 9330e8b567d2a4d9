"""Follow a job: its queue position, then its events to the end, through outages and restarts of gateways."""

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
"""An outage of the gateway that lasts longer ends the command."""
RETRY_DELAYS_S = (0.1, 0.2, 0.5, 1.0)
"""Delays between polls of a queued job, and between retries in an outage; the last one repeats."""
LONG_POLL_S = 30
EVENTS_EXPIRED = "events_expired"

Notify = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class FollowedJobEvent:
    """One event of a job."""

    id: str
    kind: str
    """`started`, `chunk`, `completed`, …: the event's name without `job.`."""
    data: Any


def job_path(job: str, part: str = "") -> str:
    """Return the path of a job, or of a part of it such as `/events`."""
    return f"/v1/jobs/{quote(job, safe='')}{part}"


class OutageRetry:
    """Delays the retries of an outage, and ends one that lasts longer than `MAX_OUTAGE_S`."""

    def __init__(self, notify: Notify) -> None:
        self._notify = notify
        self._since: float | None = None
        self._pauses: Iterator[float] = iter(())

    def succeeded(self) -> None:
        """Note an answer: the outage is over."""
        self._since = None

    def failed(self, error: ConsoleError) -> None:
        """Wait before the next retry, or raise `error` when the outage has lasted too long."""
        if self._since is None:
            self._since = time.monotonic()
            self._pauses = iter(RETRY_DELAYS_S)
            self._notify(f"{error} Trying again for up to {MAX_OUTAGE_S / 60:.0f} minutes.")
        elif time.monotonic() - self._since > MAX_OUTAGE_S:
            raise error
        time.sleep(next(self._pauses, RETRY_DELAYS_S[-1]))


def is_outage(error: ConsoleError) -> bool:
    """Return whether a retry may succeed."""
    return isinstance(error, GatewayUnreachable) or (isinstance(error, GatewayError) and error.status >= 500)


class JobFollower:
    """Reads the state and the events of one job, and retries in outages."""

    def __init__(self, api: ApiClient, job: str, notify: Notify) -> None:
        """Follow `job`. `notify` is called with a line when an outage begins."""
        self._api = api
        self._job = job
        self._patience = OutageRetry(notify)

    def fetch(self, *, wait_s: int = 0) -> dict[str, Any]:
        """Return the job; with `wait_s`, once it has ended or that time has passed."""
        path = job_path(self._job, f"?wait={wait_s}" if wait_s else "")
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
        """Yield the job while it is queued, beginning with `job`."""
        pauses = iter(RETRY_DELAYS_S)
        while job["status"] == "queued":
            yield job
            time.sleep(next(pauses, RETRY_DELAYS_S[-1]))
            job = self.fetch()

    def events(self) -> Generator[FollowedJobEvent]:
        """Yield all events up to the one that ends the job; that one alone if the others have expired."""
        last = ""
        while True:
            try:
                for event in self._api.events(job_path(self._job, "/events"), last):
                    self._patience.succeeded()
                    parsed = _parse_event(event)
                    last = event.id or last
                    yield parsed
                    if parsed.kind in ENDS:
                        return
            except ConsoleError as error:
                if isinstance(error, GatewayError) and error.code == EVENTS_EXPIRED:
                    yield from self._last_event()
                    return
                if not is_outage(error):
                    raise
                self._patience.failed(error)
            else:
                self._patience.failed(GatewayUnreachable("The events broke off before the job's end."))

    def _last_event(self) -> Generator[FollowedJobEvent]:
        while True:
            job = self.fetch(wait_s=LONG_POLL_S)
            if job["status"] in ENDS:
                yield FollowedJobEvent("", job["status"], job)
                return


def _parse_event(event: ServerSentEvent) -> FollowedJobEvent:
    try:
        data = json.loads(event.data)
    except ValueError as error:
        raise ConsoleError(f"The gateway sent an event that is not JSON: {event.data[:100]}") from error
    if event.event.startswith("job."):
        return FollowedJobEvent(event.id, event.event.removeprefix("job."), data)
    failure = data.get("error") if isinstance(data, dict) else None
    if isinstance(failure, dict):
        status = 503 if failure.get("code") == "unavailable" else 400
        raise GatewayError(str(failure.get("message")), status=status, code=str(failure.get("code") or ""))
    raise ConsoleError(f"The gateway sent an unknown event: {event.event or event.data[:100]}")
