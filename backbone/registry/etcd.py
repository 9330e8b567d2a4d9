"""The registry on etcd: workers under leases; the model catalog, aliases, services and holds without leases.

`snapshot` comes from a listing, and a watch that continues at the listing's revision. When the watch ends (etcd is away, wiped
or compacted, or the stream is lost), both begin again; so they do every `resync_s`, in case a watch has fallen silent.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence

import structlog

from backbone.registry.announcement import EtcdAnnouncement
from backbone.registry.auth import EtcdAccess
from backbone.registry.etcd_client import EtcdClient, KeyChange, KeyValue, WatchEnded
from backbone.registry.keys import RegistryKeys
from backbone.registry.snapshot import RegistryState
from backbone.registry.values import RegistryReader
from backbone.registry.version_check import VersionCheck
from schemas.errors import Unavailable
from schemas.presence import Alias, ModelHold, RegistrySnapshot, ServiceRecord, WorkerPresence

log = structlog.get_logger(__name__)

FIRST_SNAPSHOT_TIMEOUT_S = 2.0
"""Seconds that `start` and `announce` wait for etcd before they go on in the background."""
RETRY_DELAY_S = 0.3
PUBLISH_REST_FACTOR = 9.0
"""Publishing takes a tenth of the time at most while many changes arrive: the cost of each grows with the number of models and
workers.
"""
WATCH_WAIT_S = 1.0
"""Seconds that a write waits for the watch to deliver it."""


class EtcdRegistry:
    """A registry on etcd; see `backbone.registry.registry`."""

    def __init__(
        self,
        server: EtcdAccess | str,
        prefix: str = "/nexus/",
        *,
        lease_s: int = 10,
        retain_s: float | None = None,
        resync_s: float = 60.0,
        services_only: bool = False,
    ) -> None:
        """Configure a registry; nothing is opened yet.

        `server`: a URL alone means an open etcd: `http(s)://host:port`, several separated by commas. `lease_s`: seconds after
        which a dead worker disappears. `retain_s`: seconds for which workers that an outage hid stay in the snapshot after it;
        None: `lease_s`. `services_only`: follow the services alone, the only keys of others that a worker may read.
        """
        self._keys = RegistryKeys(prefix)
        self._read = RegistryReader(self._keys)
        self._lease_s = lease_s
        self._resync_s = resync_s
        access = server if isinstance(server, EtcdAccess) else EtcdAccess(server)
        # The probe reads a key that a worker may read too.
        self._client = EtcdClient(access.url, probe_key=self._keys.workers, tls=access.tls, login=access.login)
        # Roles protect gateways from workers: gateways check them.
        self._version_check = VersionCheck(self._client) if access.login and not services_only else None
        self._followed = self._keys.services if services_only else self._keys.prefix
        self._state = RegistryState(retain_s=lease_s if retain_s is None else retain_s)
        self._announcements: list[EtcdAnnouncement] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._first = asyncio.Event()
        self._revision = 0
        """The revision of etcd that `snapshot` shows."""
        self._revision_changed = asyncio.Event()
        self._unpublished = 0
        """The revision of the newest change that was applied."""
        self._publishing: asyncio.TimerHandle | None = None
        self._not_before = 0.0
        self._logged_error = ""
        """The last error of following etcd that is in the log already."""

    @property
    def snapshot(self) -> RegistrySnapshot | None:
        return self._state.snapshot

    @property
    def connected(self) -> bool:
        """Whether etcd answered the latest probe; wrong for about two seconds at most."""
        return self._client.connected

    async def start(self, *, watch: bool = True) -> None:
        """Connect and, with `watch`, follow the registry. Returns within about three seconds, even when etcd is away."""
        await self._client.open()
        if not watch or self._tasks:
            return
        self._tasks = [
            asyncio.create_task(self._follow_forever(), name="etcd-watch"),
            asyncio.create_task(self._drop_expired_workers_forever(), name="etcd-retained-workers"),
        ]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FIRST_SNAPSHOT_TIMEOUT_S):
                await self._first.wait()

    async def close(self) -> None:
        """End the watch and every keepalive; entries disappear with their leases. Idempotent."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        if self._publishing is not None:
            self._publishing.cancel()
            self._publishing = None
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._version_check is not None:
            await self._version_check.close()
        announcements, self._announcements = self._announcements, []
        await asyncio.gather(*(announcement.close() for announcement in announcements))
        await self._client.close()

    def subscribe(self, listener: Callable[[RegistrySnapshot], None]) -> Callable[[], None]:
        return self._state.subscribe(listener)

    async def announce(self, presence: WorkerPresence) -> EtcdAnnouncement:
        """Write the entries of a worker and its models; when etcd is away, as soon as it is back. Call `start` first."""
        announcement = EtcdAnnouncement(self._client, self._keys, presence, lease_s=self._lease_s)
        self._announcements = [*(other for other in self._announcements if not other.closed), announcement]
        await announcement.start(FIRST_SNAPSHOT_TIMEOUT_S)
        return announcement

    async def put_alias(self, alias: Alias) -> None:
        await self._wait_for_revision(
            await self._client.put(self._keys.alias(alias.name), alias.model_dump_json().encode())
        )

    async def remove_alias(self, name: str) -> bool:
        return await self._remove(self._keys.alias(name))

    async def put_service(self, record: ServiceRecord) -> None:
        await self._wait_for_revision(
            await self._client.put(self._keys.service(record.name), record.model_dump_json().encode())
        )

    async def remove_service(self, name: str) -> bool:
        return await self._remove(self._keys.service(name))

    async def put_hold(self, hold: ModelHold) -> None:
        await self._wait_for_revision(
            await self._client.put(self._keys.hold(hold.model), hold.model_dump_json().encode())
        )

    async def remove_hold(self, model: str) -> bool:
        return await self._remove(self._keys.hold(model))

    async def ping(self) -> None:
        await self._client.ping()

    async def _follow_forever(self) -> None:
        outage = False
        while True:
            try:
                async with asyncio.timeout(self._resync_s):
                    await self._follow(after_outage=outage)
            except TimeoutError:
                outage = False
            except WatchEnded as ended:
                log.info("registry.watch_ended", reason=str(ended))
                outage = ended.outage
                await asyncio.sleep(RETRY_DELAY_S)
            except Unavailable as error:
                outage = True
                if self._client.connected and self._logged_error != (
                    message := str(error)
                ):  # an outage has its own log event
                    self._logged_error = message
                    log.error("registry.watch_unavailable", error=message)
                await asyncio.sleep(RETRY_DELAY_S)
            except Exception:
                log.exception("registry.watch_failed")
                outage = True
                await asyncio.sleep(RETRY_DELAY_S)

    async def _follow(self, *, after_outage: bool) -> None:
        """List, then apply changes, until WatchEnded or Unavailable."""
        entries, revision = await self._client.list_prefix(self._followed)
        self._replace(entries, revision, after_outage=after_outage)
        async with contextlib.aclosing(self._client.watch(self._followed, revision + 1)) as changes:
            async for batch in changes:
                self._apply(batch)

    def _replace(self, entries: Sequence[KeyValue], revision: int, *, after_outage: bool) -> None:
        read = self._read
        workers = [worker for entry in entries if (worker := read.worker(entry.key, entry.value))]
        models = [model for entry in entries if (model := read.model(entry.key, entry.value))]
        aliases = [alias for entry in entries if (alias := read.alias(entry.key, entry.value))]
        holds = [hold for entry in entries if (hold := read.hold(entry.key, entry.value))]
        services = [service for entry in entries if (service := read.service(entry.key, entry.value))]
        descriptors = [found for entry in entries if (found := read.descriptors(entry.key, entry.value))]
        self._state.replace(
            {worker.id: worker for worker in workers},
            {model.name: model for model in models},
            {alias.name: alias for alias in aliases},
            {service.name: service for service in services},
            {hold.model: hold for hold in holds},
            dict(descriptors),
            after_outage=after_outage,
        )
        self._publish(revision)
        self._first.set()

    def _apply(self, changes: Sequence[KeyChange]) -> None:
        """Apply the changes now, and publish them soon. A worker with 2,000 models makes as many changes, one by one."""
        for change in changes:
            self._apply_one(change)
        self._unpublished = changes[-1].revision
        if self._publishing is None:
            wait_s = self._not_before - time.monotonic()
            if wait_s <= 0:
                self._publish(self._unpublished)
            else:
                self._publishing = asyncio.get_running_loop().call_later(wait_s, self._publish_later)

    def _publish_later(self) -> None:
        self._publish(self._unpublished)

    def _publish(self, revision: int) -> None:
        """Publish all changes so far, then nothing for a time in proportion to the cost of publishing."""
        if self._publishing is not None:
            self._publishing.cancel()
            self._publishing = None
        began = time.monotonic()
        self._state.publish()
        ended = time.monotonic()
        self._not_before = ended + PUBLISH_REST_FACTOR * (ended - began)
        self._revision = revision
        self._revision_changed.set()
        self._revision_changed.clear()

    def _apply_one(self, change: KeyChange) -> None:
        """Apply one change. An unreadable value counts as deleted, as in a listing."""
        state, keys, read, key, value = self._state, self._keys, self._read, change.key, change.value
        if (worker_id := keys.worker_of(key)) is not None:
            worker = read.worker(key, value)
            state.put_worker(worker) if worker else state.remove_worker(worker_id)
        elif (name := keys.model_of(key)) is not None:
            model = read.model(key, value)
            state.put_model(model) if model else state.remove_model(name)
        elif (name := keys.alias_of(key)) is not None:
            alias = read.alias(key, value)
            state.put_alias(alias) if alias else state.remove_alias(name)
        elif (name := keys.service_of(key)) is not None:
            service = read.service(key, value)
            state.put_service(service) if service else state.remove_service(name)
        elif (name := keys.hold_of(key)) is not None:
            hold = read.hold(key, value)
            state.put_hold(hold) if hold else state.remove_hold(name)
        elif (worker_id := keys.descriptors_of(key)) is not None:
            found = read.descriptors(key, value)
            state.put_descriptors(*found) if found else state.remove_descriptors(worker_id)

    async def _remove(self, key: str) -> bool:
        was_there, revision = await self._client.delete(key)
        if was_there:
            await self._wait_for_revision(revision)
        return was_there

    async def _wait_for_revision(self, revision: int) -> None:
        """Wait for a short time until the snapshot shows `revision`, so that a caller reads its own writes."""
        if not self._tasks:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(WATCH_WAIT_S):
                while self._revision < revision:
                    await self._revision_changed.wait()

    async def _drop_expired_workers_forever(self) -> None:
        """Drop retained workers once their time is over."""
        while True:
            left_s = self._state.remaining_retention_s()
            if left_s == 0:
                self._state.drop_expired_workers()
                self._state.publish()
            await asyncio.sleep(0.5 if left_s is None else min(0.5, left_s + 0.01))
