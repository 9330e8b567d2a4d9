"""Batches commands to Redis: the commands of one turn of the loop, or those that wait for earlier ones, share one pipeline.

Most of redis-py's cost for a single command is per connection use, not per command (ADR 0019).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from hashlib import sha1
from typing import Any, NamedTuple

from redis.asyncio import Redis
from redis.exceptions import NoScriptError

MAX_PIPELINES = 2
"""Pipelines that run at the same time."""
MAX_COMMANDS = 512
"""Commands of one pipeline."""

Argument = str | bytes | int | float


class _QueuedCommand(NamedTuple):
    command: tuple[Argument, ...]
    answer: asyncio.Future[Any]


class RedisPipeline:
    """The commands of this process. Commands that one caller awaits one after another keep their order; others do not."""

    def __init__(self, redis: Redis, bound: Callable[[], AbstractAsyncContextManager[None]]) -> None:
        """Configure the pipeline. `bound` ends an unanswered pipeline by TimeoutError."""
        self._redis = redis
        self._bound = bound
        self._waiting: list[_QueuedCommand] = []
        self._running: set[asyncio.Task[None]] = set()
        self._scheduled = False

    async def execute(self, *command: Argument) -> Any:
        """Return the reply to a command. Raises RedisError and OSError. A command that was cancelled before it was sent is not
        sent.
        """
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Any] = loop.create_future()
        self._waiting.append(_QueuedCommand(command, answer))
        if not self._scheduled and len(self._running) < MAX_PIPELINES:
            self._scheduled = True
            loop.call_soon(self._send)
        return await answer

    def script(self, text: str) -> RedisScript:
        """Return a Lua script."""
        return RedisScript(self, text)

    def _send(self) -> None:
        self._scheduled = False
        waiting = [queued for queued in self._waiting if not queued.answer.done()]
        batch, self._waiting = waiting[:MAX_COMMANDS], waiting[MAX_COMMANDS:]
        if not batch:
            return
        task = asyncio.create_task(self._exchange(batch))
        self._running.add(task)
        task.add_done_callback(self._sent)

    def _sent(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        if self._waiting and not self._scheduled:
            self._send()

    async def _exchange(self, batch: list[_QueuedCommand]) -> None:
        try:
            pipeline = self._redis.pipeline(transaction=False)
            for queued in batch:
                pipeline.execute_command(*queued.command)
            async with self._bound():
                answers = await pipeline.execute(raise_on_error=False)
        except Exception as error:  # the caller of `execute` translates it, or fails with it
            answers = [error] * len(batch)
        except asyncio.CancelledError:
            answers = [ConnectionError("the connection is closed")] * len(batch)
        for queued, answer in zip(batch, answers, strict=True):
            if queued.answer.done():
                continue
            if isinstance(answer, Exception):
                queued.answer.set_exception(answer)
            else:
                queued.answer.set_result(answer)

    async def close(self) -> None:
        """Cancel the running pipelines."""
        for task in list(self._running):
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)


class RedisScript:
    """A Lua script, which Redis knows by its digest once it has run it."""

    def __init__(self, pipeline: RedisPipeline, text: str) -> None:
        self._pipeline = pipeline
        self._text = text
        self._digest = sha1(text.encode()).hexdigest()  # noqa: S324 - it is Redis's name for it

    async def __call__(self, keys: Sequence[str], args: Sequence[Argument]) -> Any:
        """Run the script, and return its result. Raises RedisError and OSError."""
        try:
            return await self._pipeline.execute("EVALSHA", self._digest, len(keys), *keys, *args)
        except NoScriptError:
            return await self._pipeline.execute("EVAL", self._text, len(keys), *keys, *args)
