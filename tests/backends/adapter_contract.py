"""What every adapter must do, whatever it serves, as tests. A module runs them by a subclass and a fixture `rig`.

Text adapters have more to do: see contract.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, replace
from typing import cast

import pytest

from schemas.frames import Progress
from schemas.jobs import Capability
from tests.backends.described import check_description
from workers.backends.base import (
    Backend,
    BackendError,
    BackendRefused,
    BackendUnavailable,
    Chunk,
    Finish,
    ModelNotServed,
    Output,
    Task,
)


@dataclass
class AdapterRig:
    """An adapter, what to ask of it, and what may be done to the server behind it."""

    backend: Backend
    capability: Capability
    short: Task
    """Ends well, and soon."""
    check: Callable[[list[Chunk], Finish], None]
    """Whether that is the right answer to `short`."""
    long: Task
    """Takes many seconds, unless it is stopped."""
    bad: Task
    """Refused: it can never work."""
    idle: Callable[[], Awaitable[bool]]
    """Whether the server works on nothing."""
    kill: Callable[[], Awaitable[None]] | None
    """End the server as `kill -9` does; None where there is no server."""
    start: Callable[[], Awaitable[None]] | None
    """Start it again at the same address, and return at once: it may take a moment to serve."""
    progress: bool = False
    """Whether it says how far `long` is."""
    stop_s: float = 3.0
    """How long the server may go on after the iterator was closed."""


async def outputs_of(backend: Backend, work: Task) -> tuple[list[Chunk], list[Progress], Finish]:
    """All output, sorted by kind; exactly one Finish, last."""
    outputs = [output async for output in backend.run(work)]
    finish = outputs.pop()
    assert isinstance(finish, Finish)
    chunks = [output for output in outputs if isinstance(output, Chunk)]
    progress = [output for output in outputs if isinstance(output, Progress)]
    assert len(chunks) + len(progress) == len(outputs)
    return chunks, progress, finish


async def eventually(condition: Callable[[], Awaitable[bool]], seconds: float) -> None:
    async with asyncio.timeout(seconds):
        while not await condition():
            await asyncio.sleep(0.02)


async def served_again(rig: AdapterRig, seconds: float = 30.0) -> None:
    async def healthy() -> bool:
        try:
            await rig.backend.discover()
        except BackendError:
            return False
        return True

    await eventually(healthy, seconds)


class AdapterContract:
    """See the module's docstring."""

    async def test_says_what_it_serves(self, rig: AdapterRig) -> None:
        found = await rig.backend.discover()
        offer = next(model for model in found.models if model.name == rig.short.model)
        assert rig.capability in offer.capabilities
        assert found.slots is None or found.slots > 0

    async def test_says_what_its_models_can_be_told(self, rig: AdapterRig) -> None:
        described = await check_description(rig.backend, rig.short.model)
        assert rig.short.endpoint in described.endpoints

    async def test_is_healthy(self, rig: AdapterRig) -> None:
        await rig.backend.health()

    async def test_does_the_work(self, rig: AdapterRig) -> None:
        chunks, _, finish = await outputs_of(rig.backend, rig.short)
        rig.check(chunks, finish)

    async def test_several_at_once(self, rig: AdapterRig) -> None:
        answers = await asyncio.gather(*(outputs_of(rig.backend, replace(rig.short, job=f"job_{n}")) for n in range(3)))
        for chunks, _, finish in answers:
            rig.check(chunks, finish)

    async def test_an_unknown_model_is_not_found(self, rig: AdapterRig) -> None:
        with pytest.raises(ModelNotServed) as caught:
            await outputs_of(rig.backend, replace(rig.short, model="no-such-model"))
        assert (caught.value.info.status, caught.value.info.code) == (404, "model_not_found")

    async def test_bad_input_is_refused(self, rig: AdapterRig) -> None:
        with pytest.raises(BackendRefused) as caught:
            await outputs_of(rig.backend, rig.bad)
        assert caught.value.info.status in (400, 413)
        assert caught.value.info.type == "invalid_request_error"
        assert not caught.value.transient

    async def test_a_body_that_is_no_json_is_refused(self, rig: AdapterRig) -> None:
        with pytest.raises(BackendRefused):
            await outputs_of(rig.backend, replace(rig.short, body=b"{nonsense"))

    async def test_says_how_far_it_is(self, rig: AdapterRig) -> None:
        if not rig.progress:
            pytest.skip("this server does not say")
        output = cast("AsyncGenerator[Output, None]", rig.backend.run(rig.long))
        async with asyncio.timeout(30):
            async for piece in output:
                if isinstance(piece, Progress) and piece.fraction is not None and 0 < piece.fraction <= 1:
                    break
        await output.aclose()

    async def test_closing_stops_the_server_or_waits_for_it(self, rig: AdapterRig) -> None:
        async def consume() -> None:
            async for _ in rig.backend.run(rig.long):
                pass

        running = asyncio.create_task(consume())
        await eventually(lambda: busy(rig), 30)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        await eventually(rig.idle, rig.stop_s)

    async def test_a_server_that_dies_midway_is_a_transient_failure(self, rig: AdapterRig) -> None:
        if rig.kill is None:
            pytest.skip("there is no server")
        running = asyncio.create_task(outputs_of(rig.backend, rig.long))
        await eventually(lambda: busy(rig), 30)
        await rig.kill()
        with pytest.raises(BackendError) as caught:
            async with asyncio.timeout(10):
                await running
        assert caught.value.transient

    async def test_a_server_that_is_away_is_unavailable_and_comes_back(self, rig: AdapterRig) -> None:
        if rig.kill is None or rig.start is None:
            pytest.skip("there is no server")
        await rig.kill()
        for ask in (rig.backend.health, rig.backend.discover):
            with pytest.raises(BackendUnavailable):
                await ask()
        with pytest.raises(BackendUnavailable):
            await outputs_of(rig.backend, rig.short)
        await rig.start()
        await served_again(rig)
        chunks, _, finish = await outputs_of(rig.backend, rig.short)
        rig.check(chunks, finish)


async def busy(rig: AdapterRig) -> bool:
    return not await rig.idle()
