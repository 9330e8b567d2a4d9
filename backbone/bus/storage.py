"""How full NATS's streams are."""

from __future__ import annotations

import asyncio

from nats.aio.client import Client

from backbone.bus.base import Storage, StreamRoom
from backbone.bus.streams import CONSUMER_NOT_FOUND, STREAM_NOT_FOUND, ApiError, request
from backbone.bus.subjects import DONE_STREAM, RECORDER, STREAMS
from schemas.errors import Unavailable


async def read_storage(client: Client) -> Storage:
    """Every stream that exists. Raises Unavailable."""
    rooms = await asyncio.gather(*(_room(client, stream) for stream in STREAMS))
    return Storage(tuple(room for room in rooms if room is not None), await _unrecorded(client))


async def _room(client: Client, stream: str) -> StreamRoom | None:
    try:
        info = await request(client, f"STREAM.INFO.{stream}")
    except ApiError as error:
        if error.code == STREAM_NOT_FOUND:
            return None
        raise Unavailable(f"NATS: {error}") from error
    state, most = info["state"], info["config"]["max_bytes"]
    return StreamRoom(stream, state["messages"], state["bytes"], most if most > 0 else None)


async def _unrecorded(client: Client) -> int:
    try:
        info = await request(client, f"CONSUMER.INFO.{DONE_STREAM}.{RECORDER}")
    except ApiError as error:
        if error.code in {STREAM_NOT_FOUND, CONSUMER_NOT_FOUND}:
            return 0
        raise Unavailable(f"NATS: {error}") from error
    return int(info["num_pending"]) + int(info["num_ack_pending"])
