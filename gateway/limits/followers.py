"""Limit the events and jobs that keys and teams follow at the same time, in one process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gateway.limits.effective import EffectiveLimits
from gateway.limits.open_requests import OpenRequestLimiter


class FollowerLimiter:
    """Counts streams of events and polls that wait for a job: against the limit on open requests, but apart from requests."""

    def __init__(self) -> None:
        self._open = OpenRequestLimiter("streams of events and waiting polls")

    @contextmanager
    def hold(self, limits: EffectiveLimits) -> Iterator[None]:
        """Count a follower within the block. Raises RateLimited."""
        bounds = self._open.acquire(limits)
        try:
            yield
        finally:
            self._open.release(bounds)


class HoldingResponse(Response):
    """Sends a response, and closes what it holds when that has ended."""

    def __init__(self, response: Response, resources: ExitStack) -> None:
        """Own `resources`."""
        self._response = response
        self._resources = resources
        self.status_code = response.status_code
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._resources:
            await self._response(scope, receive, send)
