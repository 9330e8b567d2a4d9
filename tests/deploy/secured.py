"""A running Nexus as deploy/ configures it for production, and strangers who have the password of one of its users."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import nats
from nats.aio.client import Client

from tests.cluster import Cluster
from tests.deploy.production import (
    ProductionNats,
    ProductionSource,
    Secrets,
    gateway_settings,
    worker_block,
    worker_settings,
)

SETTINGS = {"ACK_WAIT_S": "2", "WORKER_LEASE_S": "2", "WORKER_HEALTH_INTERVAL_S": "1"}
MODEL = "org/model:8b"
OTHERS = "another"


@dataclass
class World:
    """A cluster of production's configuration: one gateway, worker `gpu1` for MODEL, worker `gpu2` for OTHERS."""

    cluster: Cluster
    secrets: Secrets

    @property
    def nats(self) -> ProductionNats:
        assert isinstance(self.cluster.nats, ProductionNats)
        return self.cluster.nats

    async def user(self, name: str, password: str, errors: list[str] | None = None) -> Client:
        """A stranger's client with a user's credentials."""

        async def heard(error: Exception) -> None:
            if errors is not None:
                errors.append(str(error))

        return await nats.connect(
            self.nats.url,
            user=name,
            password=self.secrets.text(password),
            tls=self.secrets.client_context,
            inbox_prefix=f"_INBOX.{name}",
            error_cb=heard,
            allow_reconnect=False,
        )

    def violations(self) -> list[str]:
        """What nats-server's log has of them."""
        return [line for line in self.nats.log_file.read_text().splitlines() if "Violation" in line]


@asynccontextmanager
async def secured_world(folder: Path) -> AsyncIterator[World]:
    """Everything is up within the block."""
    secrets = Secrets(folder / "secrets")
    secrets.make()
    worker_block(secrets.folder, "gpu1", "--model", MODEL)
    worker_block(secrets.folder, "gpu2", "--model", OTHERS)
    secrets.make("--worker", "gpu1", "--worker", "gpu2")
    cluster = Cluster(folder, source=ProductionSource(secrets), **SETTINGS)
    async with cluster:
        await cluster.start_gateway(**gateway_settings(secrets))
        for name, model in (("gpu1", MODEL), ("gpu2", OTHERS)):
            await cluster.start_worker(name=name, WORKER_MODELS=model, **worker_settings(secrets, name))
        yield World(cluster, secrets)
