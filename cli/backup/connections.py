"""Connections of backups to NATS, Redis and etcd, by the settings of a gateway."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

from backbone.bus.nats.auth import read_nats_access
from backbone.bus.nats.backup import StreamBackup
from backbone.bus.nats.requests import JetStreamError
from backbone.registry.auth import read_etcd_access
from backbone.registry.backup import RegistryBackup
from backbone.registry.etcd_client import EtcdClient
from backbone.secret_files import ConfigurationError
from backbone.settings import CommonSettings
from backbone.store.auth import read_redis_access
from backbone.store.backup import RedisBackup
from backbone.store.redis import RedisStore
from cli.errors import ConsoleError
from schemas.errors import NexusError

SERVER_KINDS = ("etcd", "redis", "streams")
REDIS_TIMEOUT_S = 30.0
"""For one command. Longer than a gateway's: no caller waits for it."""


@dataclass(frozen=True, slots=True)
class BackupServers:
    """The open connections of a backup."""

    streams: StreamBackup
    redis: RedisBackup
    registry: RegistryBackup


@asynccontextmanager
async def open_servers(settings: CommonSettings) -> AsyncIterator[BackupServers]:
    """Connect to all three servers, each of which must answer. Raises ConsoleError."""
    with translate_errors():
        streams = StreamBackup(read_nats_access(settings))
        store = RedisStore(read_redis_access(settings), timeout_s=REDIS_TIMEOUT_S, open_s=0)
        etcd = read_etcd_access(settings)
        client = EtcdClient(etcd.url, probe_key=settings.etcd_prefix, tls=etcd.tls, login=etcd.login)
        try:
            await streams.start()
            await store.ping()
            await client.open()
            await client.ping()
            yield BackupServers(streams, RedisBackup(store), RegistryBackup(client, settings.etcd_prefix))
        finally:
            await streams.close()
            await store.close()
            await client.close()


@contextmanager
def translate_errors() -> Iterator[None]:
    """Raise errors of the servers as a ConsoleError."""
    try:
        yield
    except NexusError as error:
        raise ConsoleError(error.info.message) from error
    except JetStreamError as error:
        raise ConsoleError(f"NATS refuses: {error}") from error
    except (ConfigurationError, ValueError) as error:
        raise ConsoleError(str(error)) from error


def parse_kinds(only: str) -> frozenset[str]:
    """Return the kinds of parts in the value of `--only`, all if it is empty. Raises ConsoleError."""
    kinds = frozenset(filter(None, (part.strip() for part in only.split(",")))) or frozenset(SERVER_KINDS)
    if unknown := kinds - set(SERVER_KINDS):
        raise ConsoleError(
            f"--only: unknown {', '.join(sorted(unknown))}. Choose from {', '.join(SERVER_KINDS)}.", exit_code=2
        )
    return kinds
