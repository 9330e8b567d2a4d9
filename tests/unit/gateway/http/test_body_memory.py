"""Memory for bodies: what came counts, no key waits behind another's slowness, and nothing waits without a bound."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, MutableMapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backbone.testing.blobs import MemoryBlobStore
from gateway.http.body_memory import MAX_WAIT_S, BodyMemory
from gateway.http.multipart import ParsedForm, read_form
from gateway.http.request_body import CallerDisconnected, read_body, stream_body
from schemas.errors import BodyMemoryFull, NexusError, RequestTimeout
from tests.unit.gateway.http.test_multipart import TYPE, form, part
from tests.virtual_time import run

MIB = 1024 * 1024
PIECE = 64 * 1024
TOTAL = 16 * MIB
"""Half of it is for bodies that arrive."""
SERVED_S = 5.0
"""Within this a body that comes at once is served: after two looks, slow bodies end."""

Steps = list[tuple[float, int]]
"""Seconds until a piece comes, and its bytes."""


class Caller:
    """Sends pieces when their time has come, and then nothing more; or says that the body is complete."""

    def __init__(self, steps: Iterable[tuple[float, int]], *, complete: bool = True) -> None:
        self._steps = list(steps)
        self._complete = complete

    async def receive(self) -> MutableMapping[str, Any]:
        if not self._steps:
            await asyncio.get_running_loop().create_future()
        seconds, size = self._steps[0]
        await asyncio.sleep(seconds)
        self._steps.pop(0)
        return {
            "type": "http.request",
            "body": b"x" * size,
            "more_body": bool(self._steps) or not self._complete,
        }


async def send(memory: BodyMemory, key: str, caller: Caller, headers: list[tuple[bytes, bytes]] | None = None) -> float:
    """Returns the seconds it took."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    with memory.share(key) as share:
        body = await read_body(headers or [], caller.receive, TOTAL, 30.0, share=share)
        await share.check(len(body))
    return loop.time() - began


def at_once(size: int) -> Steps:
    return [(0.0, min(PIECE, size - at)) for at in range(0, size, PIECE)]


async def end(tasks: Iterable[asyncio.Task[Any]]) -> list[Any]:
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    return await asyncio.gather(*tasks, return_exceptions=True)


def test_an_announced_body_that_never_comes_blocks_no_other() -> None:
    """Requests of one byte, and of none at all with a large Content-Length, leave the memory to the others."""

    async def scenario() -> float:
        memory = BodyMemory(TOTAL, TOTAL // 2)
        announced = [(b"content-length", b"%d" % TOTAL)]
        slow = [
            asyncio.create_task(send(memory, "a", Caller([(0.0, 1)] if one % 2 else [], complete=False), announced))
            for one in range(100)
        ]
        await asyncio.sleep(0.1)
        took = await send(memory, "b", Caller(at_once(6 * MIB)))
        await end(slow)
        assert memory.used == 0
        return took

    assert run(scenario()) == 0


def test_a_key_at_its_limit_leaves_memory_to_others() -> None:
    """However much one key sends and does not finish, another key's body is served at once."""

    async def scenario() -> float:
        memory = BodyMemory(TOTAL)
        slow = [asyncio.create_task(send(memory, "a", Caller(at_once(MIB), complete=False))) for _ in range(20)]
        await asyncio.sleep(0.1)
        took = await send(memory, "b", Caller(at_once(512 * 1024)))
        await end(slow)
        return took

    assert run(scenario()) == 0


def test_slow_bodies_end_while_others_wait() -> None:
    """Where many keys' slow bodies hold everything, they are ended within a few looks; those that are fast are not."""

    async def scenario() -> tuple[float, float, list[Any]]:
        memory = BodyMemory(TOTAL)
        fast = asyncio.create_task(send(memory, "fast", Caller([(0.4, PIECE)] * 6)))
        slow = [
            asyncio.create_task(send(memory, f"key{one}", Caller([*at_once(512 * 1024), *[(0.3, 1)] * 1000])))
            for one in range(14)
        ]
        await asyncio.sleep(0.2)
        took = await send(memory, "b", Caller(at_once(MIB)))
        ended = [task.exception() for task in slow if task.done()]
        await end(slow)
        return took, await fast, ended

    took, fast, ended = run(scenario())
    assert took <= SERVED_S
    assert fast < 10
    assert took > 0
    assert ended
    assert any(isinstance(error, RequestTimeout) for error in ended)


def test_slow_bodies_that_block_no_other_continue() -> None:
    """Without anybody who waits, a slow body has its usual time."""

    async def scenario() -> float:
        return await send(BodyMemory(TOTAL), "a", Caller([(0.5, 1000)] * 40))

    assert run(scenario()) == pytest.approx(20, abs=0.1)


def test_many_bodies_of_one_key_complete_one_after_another() -> None:
    """A burst of bodies, many times what its key may hold, is served: the bodies do not wait for each other's memory."""

    async def scenario() -> list[Any]:
        memory = BodyMemory(TOTAL, 4 * MIB)
        found = await asyncio.gather(
            *(send(memory, "a", Caller([(0.01, PIECE)] * 48)) for _ in range(16)), return_exceptions=True
        )
        assert memory.used == 0
        return found

    assert not [one for one in run(scenario()) if isinstance(one, Exception)]


def test_a_body_that_waits_too_long_is_refused() -> None:
    """A body that finds no memory within the limit is refused: 503, with a time to come again."""

    async def scenario() -> tuple[BaseException, float]:
        memory, loop = BodyMemory(TOTAL), asyncio.get_running_loop()
        share = memory.share("a")
        await share.check(memory.checks.largest)
        began = loop.time()
        with pytest.raises(BodyMemoryFull) as caught, memory.share("a") as other:
            await other.check(memory.checks.largest)
        share.__exit__(None, None, None)
        assert memory.used == 0
        return caught.value, loop.time() - began

    error, waited = run(scenario())
    assert isinstance(error, NexusError)
    assert (error.info.status, error.info.headers()["retry-after"]) == (503, "2")
    assert waited == pytest.approx(MAX_WAIT_S)


def test_a_cancelled_wait_holds_no_memory() -> None:
    async def scenario() -> None:
        memory = BodyMemory(TOTAL)
        with memory.share("a") as holder:
            await holder.check(memory.checks.largest)
            waiting = asyncio.create_task(memory.share("a").check(memory.checks.largest))
            await asyncio.sleep(0)
            await end([waiting])
        assert memory.used == 0

    run(scenario())


def test_a_form_holds_the_bytes_that_are_not_stored_yet() -> None:
    """A file that is passed on piece by piece is charged for what is in memory, and no more."""

    async def scenario() -> int:
        memory, most = BodyMemory(TOTAL), 0
        body = form(part("file", b"x" * (4 * MIB), "a.bin"), part("model", b"m"))

        async def receive() -> MutableMapping[str, Any]:
            nonlocal body, most
            most = max(most, memory.used)
            piece, body = body[:PIECE], body[PIECE:]
            return {"type": "http.request", "body": piece, "more_body": bool(body)}

        with memory.share("a") as share:
            pieces = stream_body([], receive, TOTAL, 30.0, share)
            await read_form(
                TYPE, pieces, ("file",), lambda: MemoryBlobStore().writer(ttl_s=60), ParsedForm(), share=share
            )
        assert memory.used == 0
        return most

    assert PIECE <= run(scenario()) <= 1024 * 1024


SLOW = st.tuples(st.integers(0, 10), st.integers(0, 20), st.floats(0.0, 3.0), st.sampled_from([None, 0.3, 0.9]))
"""A hostile body: its key, its pieces of 64 KiB, when it begins, and how often it then sends one byte (None: never)."""


@settings(max_examples=150, deadline=None)
@given(hostile=st.lists(SLOW, max_size=150), at=st.floats(0.0, 5.0), size=st.integers(1, 6))
def test_a_trickling_body_blocks_no_other(
    hostile: list[tuple[int, int, float, float | None]], at: float, size: int
) -> None:
    """Whatever trickles, from many keys and whenever, a body within its key's part that comes at once is served in seconds."""

    async def attack(memory: BodyMemory, key: int, pieces: int, begin: float, pause: float | None) -> None:
        await asyncio.sleep(begin)
        trickle = [(pause, 1)] * 300 if pause is not None else []
        while True:  # anyone who is refused tries again
            try:
                await send(memory, f"key{key}", Caller([*at_once(pieces * PIECE), *trickle], complete=False))
            except (NexusError, CallerDisconnected):
                await asyncio.sleep(0.05)

    async def scenario() -> None:
        memory = BodyMemory(TOTAL)
        tasks = [asyncio.create_task(attack(memory, *one)) for one in hostile]
        await asyncio.sleep(at)
        took = await send(memory, "victim", Caller(at_once(size * PIECE)))
        await end(tasks)
        assert took <= SERVED_S
        assert memory.used == 0

    run(scenario())
