"""The three servers as backups use them: opened together, by the settings that gateways read."""

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

ALL_KINDS = ("etcd", "redis", "streams")
REDIS_TIMEOUT_S = 30.0
"""For one command: more than gateways have, since nobody waits."""


@dataclass(frozen=True, slots=True)
class BackupServers:
    """What is read and written."""

    streams: StreamBackup
    redis: RedisBackup
    registry: RegistryBackup


@asynccontextmanager
async def open_servers(settings: CommonSettings) -> AsyncIterator[BackupServers]:
    """All three, which must answer. Raises ConsoleError."""
    with translate_errors():
        streams = StreamBackup(read_nats_access(settings))
        store = RedisStore(read_redis_access(settings), timeout_s=REDIS_TIMEOUT_S, rest_s=0)
        etcd = read_etcd_access(settings)
        link = EtcdClient(etcd.url, probe_key=settings.etcd_prefix, tls=etcd.tls, login=etcd.login)
        try:
            await streams.start()
            await store.ping()
            await link.open()
            await link.ping()
            yield BackupServers(streams, RedisBackup(store), RegistryBackup(link, settings.etcd_prefix))
        finally:
            await streams.close()
            await store.close()
            await link.close()


@contextmanager
def translate_errors() -> Iterator[None]:
    """What the servers refuse, as a message for the user."""
    try:
        yield
    except NexusError as error:
        raise ConsoleError(error.info.message) from error
    except JetStreamError as error:
        raise ConsoleError(f"NATS refuses: {error}") from error
    except (ConfigurationError, ValueError) as error:
        raise ConsoleError(str(error)) from error


def parse_kinds(only: str) -> frozenset[str]:
    """The kinds of parts that `--only` names; empty: all. Raises ConsoleError."""
    kinds = frozenset(filter(None, (part.strip() for part in only.split(",")))) or frozenset(ALL_KINDS)
    if unknown := kinds - set(ALL_KINDS):
        raise ConsoleError(f"--only knows {', '.join(ALL_KINDS)}, not {', '.join(sorted(unknown))}", exit_code=2)
    return kinds
