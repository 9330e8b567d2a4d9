"""A NATS whose disk has room for the streams, and not for much more."""

from __future__ import annotations

from pathlib import Path

import pytest

from backbone.bus.nats.connection import NatsConnection
from backbone.bus.nats.jetstream import BlobBucketConfig, ensure_bucket
from cli.embedded.servers import NatsServer
from schemas.errors import Unavailable
from tests.jetstream import inbox_of

MB = 1024**2


async def test_a_gateway_starts_again_where_only_its_own_streams_fit(tmp_path: Path) -> None:
    """A stream that is there needs no room for a second one; one that cannot fit is refused, and says why."""
    server = NatsServer(tmp_path, max_file_store=6 * MB)
    await server.start()
    connection = NatsConnection(server.url, name="room")
    await connection.connect()
    try:
        await ensure_bucket(await inbox_of(connection), BlobBucketConfig(max_bytes=4 * MB))
        await ensure_bucket(await inbox_of(connection), BlobBucketConfig(max_bytes=4 * MB))
        await ensure_bucket(await inbox_of(connection), BlobBucketConfig(max_bytes=5 * MB))
        with pytest.raises(Unavailable, match="insufficient storage"):
            await ensure_bucket(await inbox_of(connection), BlobBucketConfig(max_bytes=7 * MB))
    finally:
        await connection.close()
        await server.stop()


async def test_a_stream_for_which_there_is_no_room_says_so(tmp_path: Path) -> None:
    """Not that it was not found."""
    server = NatsServer(tmp_path, max_file_store=2 * MB)
    await server.start()
    connection = NatsConnection(server.url, name="room")
    await connection.connect()
    try:
        with pytest.raises(Unavailable, match="insufficient storage"):
            await ensure_bucket(await inbox_of(connection), BlobBucketConfig(max_bytes=4 * MB))
    finally:
        await connection.close()
        await server.stop()
