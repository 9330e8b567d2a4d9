"""NATS JetStream as the bus."""

from backbone.optional_libraries import hide_library

# nats-py loads aiohttp for its websocket transport. `connection` loads it where an URL is of websockets.
with hide_library("aiohttp"):
    import nats.aio.client  # noqa: F401
