"""Run work on behalf of waiting callers, and cancel it when they disconnect or the gateway shuts down."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

from gateway.http.asgi import EXCHANGE, Receive, Scope, watch_disconnect
from gateway.http.request_body import CallerDisconnected
from schemas.errors import Unavailable

T = TypeVar("T")


class CallerTasks:
    """Tasks that callers of this gateway wait for."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Future[Any]] = set()
        self._is_shutting_down = False

    @property
    def is_shutting_down(self) -> bool:
        """Whether `shut_down` was called."""
        return self._is_shutting_down

    def shut_down(self) -> None:
        """End every wait: callers are answered that the gateway shuts down."""
        self._is_shutting_down = True
        for task in self._tasks:
            task.cancel()

    async def run_while_connected(self, work: Coroutine[Any, Any, T], scope: Scope, receive: Receive) -> T:
        """Return the result of `work`; cancel it when the caller disconnects or the gateway shuts down.

        The request's body must have been read. Raises CallerDisconnected, and Unavailable at shutdown.
        """
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        unwatch = watch_disconnect(scope.get(EXCHANGE), receive, lambda: _cancel(task))
        try:
            return await task
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if current is not None and current.cancelling():
                task.cancel()
                raise
            if self._is_shutting_down:
                raise Unavailable("The gateway is shutting down. Send the request again.", should_retry=True) from None
            raise CallerDisconnected from None
        finally:
            self._tasks.discard(task)
            unwatch()

    async def iterate_until_shutdown(self, items: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
        """Yield the items that come before the gateway shuts down. Does not close `items`."""
        while not self._is_shutting_down:
            task = asyncio.ensure_future(anext(items, None))
            self._tasks.add(task)
            try:
                item = await task
            except asyncio.CancelledError:
                current = asyncio.current_task()
                if current is not None and current.cancelling():
                    task.cancel()
                    raise
                return
            finally:
                self._tasks.discard(task)
            if item is None:
                return
            yield item


def _cancel(task: asyncio.Future[Any]) -> None:
    task.cancel()
