"""Know which gateway processes run: each announces itself on NATS."""

from __future__ import annotations

import asyncio
import contextlib
from time import monotonic
from typing import Annotated

from pydantic import BaseModel, StringConstraints

from backbone.bus.bus import GatewayBus

TOPIC = "gateways"
ANNOUNCE_INTERVAL_S = 10.0
LIFETIME_S = 3 * ANNOUNCE_INTERVAL_S
"""A gateway that has been silent for longer is not listed any more."""
MAX_PEERS = 1000


class GatewayNotice(BaseModel):
    """What a gateway says of itself."""

    id: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    starts: bool = False
    """The gateway knows no other one yet: the others announce themselves at once."""
    leaves: bool = False


class GatewayPeers:
    """The gateways that were heard of in the last `LIFETIME_S` seconds, this one included."""

    def __init__(self, bus: GatewayBus, name: str) -> None:
        self._bus = bus
        self.name = name
        self._heard_at: dict[str, float] = {}
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Announce this gateway until `close`. Raises Unavailable."""
        await self._bus.subscribe_gateways(TOPIC, self._on_announcement)
        self._announce(starts=True)
        self._task = asyncio.create_task(self._announce_forever())

    async def close(self) -> None:
        """Announce that this gateway leaves."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._announce(leaves=True)

    @property
    def names(self) -> frozenset[str]:
        """The names of the gateways, as their log lines have them."""
        since = monotonic() - LIFETIME_S
        return frozenset(name for name, at in self._heard_at.items() if at >= since) | {self.name}

    def _announce(self, *, starts: bool = False, leaves: bool = False) -> None:
        announcement = GatewayNotice(id=self.name, starts=starts, leaves=leaves)
        self._bus.send_to_gateways(TOPIC, announcement.model_dump_json().encode())

    async def _announce_forever(self) -> None:
        while True:
            await asyncio.sleep(ANNOUNCE_INTERVAL_S)
            self._announce()
            current = self.names
            self._heard_at = {name: at for name, at in self._heard_at.items() if name in current}

    def _on_announcement(self, message: bytes) -> None:
        try:
            peer = GatewayNotice.model_validate_json(message)
        except ValueError:
            return
        if peer.id == self.name:
            return
        if peer.leaves:
            self._heard_at.pop(peer.id, None)
        elif peer.id in self._heard_at or len(self._heard_at) < MAX_PEERS:
            self._heard_at[peer.id] = monotonic()
        if peer.starts:
            self._announce()
