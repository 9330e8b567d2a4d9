"""A gateway that is told to stop."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from tests.cluster import Cluster, chat
from tests.conftest import Eventually


async def test_open_streams_finish_or_are_told(tmp_path: Path, eventually: Eventually) -> None:
    """On SIGTERM an answer that ends in time ends well, and one that does not gets an error, never a silent cut."""
    async with Cluster(tmp_path, GATEWAY_DRAIN_S="2") as cluster:
        gateway = await cluster.start_gateway()
        await cluster.start_worker("echo")
        seen: dict[str, list[str]] = {"short": [], "long": []}

        async def follow(name: str, **script: int) -> None:
            async for data in cluster.stream(chat("one two three", echo=script)):
                seen[name].append(data)

        async def running() -> bool:
            return await cluster.in_progress("echo") == 4

        streams = asyncio.gather(
            follow("short", tokens=12, delay_ms=100),
            follow("long", tokens=10_000, delay_ms=100),
            return_exceptions=True,
        )
        plain = [await cluster.send(chat("x", echo={"tokens": n, "delay_ms": 100})) for n in (12, 10_000)]
        await eventually(lambda: all(seen.values()))
        await eventually(running)
        stop = asyncio.create_task(gateway.stop(15))
        assert list(await streams) == [None, None]
        assert seen["short"][-1] == "[DONE]"
        assert json.loads(seen["long"][-1])["error"]["code"] == "unavailable"
        answers = [(await reader.read()).partition(b"\r\n\r\n") for reader, _ in plain]
        assert [head.split()[1] for head, _, _ in answers] == [b"200", b"503"]
        assert all(b"connection: close" in head for head, _, _ in answers)
        assert json.loads(answers[1][2])["error"]["code"] == "unavailable"
        assert await stop == 0
