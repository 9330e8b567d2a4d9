"""A backup of servers as production has them: logged in, over TLS, as the users that may do it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from backbone.bus.nats.auth import read_nats_access
from backbone.settings import CommonSettings
from backbone.store.auth import read_redis_access
from backbone.store.redis import RedisStore
from backbone.store.redis_documents import RedisDocumentStore
from cli.backup.archive import read_manifest
from cli.backup.command import _backup, _restore
from cli.backup.connections import parse_kinds
from tests.backbone.job_logs import World, new_job, outcome_of
from tests.cluster import Cluster
from tests.deploy.production import ProductionSource, Secrets

pytestmark = pytest.mark.timeout(120)


def admins(cluster: Cluster, secrets: Secrets) -> CommonSettings:
    """The settings that backup.sh and restore.sh give with --prod."""
    return CommonSettings(
        nats_url=cluster.nats.url,
        nats_user="admin",
        nats_password_file=secrets.file("admin/nats-password"),
        nats_tls_ca=secrets.file("admin/ca.crt"),
        etcd_url=cluster.etcd.url,
        etcd_user="root",
        etcd_password_file=secrets.file("admin/etcd-password"),
        etcd_tls_ca=secrets.file("admin/ca.crt"),
        etcd_tls_cert=secrets.file("admin/etcd-client.crt"),
        etcd_tls_key=secrets.file("admin/etcd-client.key"),
        redis_url=cluster.redis.url.replace("gateway@", "admin@"),
        redis_password_file=secrets.file("admin/redis-password"),
    )


async def test_production_is_saved_and_restored(tmp_path: Path) -> None:
    """Words and documents come back in other servers with the same users."""
    secrets = Secrets(tmp_path / "secrets")
    await asyncio.to_thread(secrets.make)
    job = new_job()
    async with Cluster(tmp_path / "old", source=ProductionSource(secrets)) as cluster:
        settings = admins(cluster, secrets)
        world = World(read_nats_access(settings))
        await (await world.gateway()).store_outcome(outcome_of(job), b"the answer")
        await world.close()
        store = RedisStore(read_redis_access(settings))
        await RedisDocumentStore(store).put("key", "", "k", b"{}")
        await store.close()
        await _backup(settings, tmp_path / "saved", parse_kinds(""), print)
    async with Cluster(tmp_path / "new", source=ProductionSource(secrets)) as cluster:
        settings = admins(cluster, secrets)
        folder = tmp_path / "saved"
        await _restore(
            settings, folder, read_manifest(folder), parse_kinds(""), force=False, replicas=None, notify=print
        )
        world = World(read_nats_access(settings))
        decision = await (await world.gateway()).read_outcome(job)
        assert decision is not None
        assert decision.payload == b"the answer"
        await world.close()
        store = RedisStore(read_redis_access(settings))
        assert await RedisDocumentStore(store).get("key", "", "k") == b"{}"
        await store.close()
