"""A Nexus on three NATS servers whose streams have three replicas, and on three members of etcd: real processes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from cli.embedded.servers import HOST, EmbeddedServer, EtcdServer, NatsServer, free_port
from tests.cluster import Cluster
from tests.servers import EmbeddedSource, Process, Server

SETTINGS = {
    "STREAM_REPLICAS": "3",
    "ACK_WAIT_S": "4",
    "WORKER_LEASE_S": "3",
    "WORKER_HEALTH_INTERVAL_S": "1",
    "WORKER_CONCURRENCY": "8",
    "GATEWAY_DRAIN_S": "2",
}


class EtcdMember(EtcdServer):
    """One of several. `start` begins with nothing, `restart` with what it had."""

    def __init__(self, data_dir: Path, port: int, peers: dict[str, str]) -> None:
        """`peers`: by name, this one's `data_dir.name` among them, where they reach each other."""
        super().__init__(data_dir, port=port, ready_timeout_s=40.0)
        self._identity = data_dir.name
        self._peers = peers

    def _arguments(self) -> list[str]:
        peer = self._peers[self._identity]
        cluster = ",".join(f"{name}={url}" for name, url in self._peers.items())
        return [
            *("--name", self._identity, "--data-dir", str(self._store)),
            *("--listen-client-urls", self.url, "--advertise-client-urls", self.url),
            *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
            *("--initial-cluster", cluster, "--initial-cluster-state", "new"),
        ]

    def _environment(self) -> dict[str, str]:
        # Those of a machine that does other things too.
        return super()._environment() | {"ETCD_HEARTBEAT_INTERVAL": "100", "ETCD_ELECTION_TIMEOUT": "1000"}


class Members:
    """Several servers as one: what a client is given all the addresses of."""

    def __init__(self, members: Sequence[EmbeddedServer]) -> None:
        self.members = list(members)

    @property
    def url(self) -> str:
        return ",".join(member.url for member in self.members)

    @property
    def port(self) -> int:
        return self.members[0].port

    @property
    def log_file(self) -> Path:
        return self.members[0].log_file

    @property
    def process(self) -> Process:
        return self.members[0].process

    @property
    def running(self) -> bool:
        return any(member.running for member in self.members)

    async def start(self) -> None:
        """Together: each waits for a quorum."""
        await asyncio.gather(*(member.start() for member in self.members))

    async def stop(self, grace_s: float = 2.0) -> None:
        await asyncio.gather(*(member.stop(grace_s) for member in self.members))

    async def restart(self) -> None:
        await asyncio.gather(*(member.restart() for member in self.members))

    def kill(self) -> None:
        for member in self.members:
            member.kill()

    def pause(self) -> None:
        for member in self.members:
            member.pause()

    def resume(self) -> None:
        for member in self.members:
            if member.running:
                member.resume()

    def wipe(self) -> None:
        for member in self.members:
            member.wipe()


class ThreeOfEach(EmbeddedSource):
    """NATS and etcd as clusters of three."""

    def nats(self, folder: Path) -> Server:
        ports = [free_port() for _ in range(3)]
        routes = ", ".join(f'"nats://{HOST}:{port}"' for port in ports)
        cluster = 'cluster {{ name: three, host: "{}", port: {}, routes: [{}] }}'
        return Members(
            [
                NatsServer(folder / f"nats-{n}", port=free_port(), extra_config=cluster.format(HOST, port, routes))
                for n, port in enumerate(ports)
            ]
        )

    def etcd(self, folder: Path) -> Server:
        peers = {f"etcd-{n}": f"http://{HOST}:{free_port()}" for n in range(3)}
        return Members([EtcdMember(folder / name, free_port(), peers) for name in peers])


class Three(Cluster):
    """See the module's docstring."""

    def __init__(self, folder: Path, **settings: str) -> None:
        super().__init__(folder, source=ThreeOfEach(), **(SETTINGS | settings))

    @property
    def nats_nodes(self) -> list[EmbeddedServer]:
        assert isinstance(self.nats, Members)
        return self.nats.members

    @property
    def etcd_members(self) -> list[EmbeddedServer]:
        assert isinstance(self.etcd, Members)
        return self.etcd.members
