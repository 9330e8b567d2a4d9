"""Keeps a worker's entry in etcd by one task, which writes it again whatever happens to etcd or the lease."""

from __future__ import annotations

import asyncio
import contextlib
from time import monotonic

import structlog
from pydantic import ValidationError

from backbone.registry.etcd_client import EtcdClient, LeaseNotFound
from backbone.registry.keys import RegistryKeys
from backbone.registry.snapshot import catalog_entry, cataloged_offers, joined_entry
from schemas.errors import Unavailable
from schemas.presence import CatalogEntry, ModelOffer, WorkerPresence, WorkerState

log = structlog.get_logger(__name__)

RETRY_DELAY_S = 0.3
"""The pause after a failed call."""
BUSY_WRITE_INTERVAL_S = 0.25
"""Changes of `busy` alone are written at most once in this time."""
WITHDRAW_TIMEOUT_S = 1.5
MAX_EXCHANGES = 10
"""More than there are capabilities: each turn adds one that other workers have written meanwhile, or is the last."""


class EtcdAnnouncement:
    """A worker's entry; see `backbone.registry.registry.Announcement`. One task grants, renews and replaces its lease.

    Every third of the lease, it renews the lease and checks the entry; a missing or foreign entry is written again. When etcd
    is back after an outage, this happens at once.
    """

    def __init__(self, client: EtcdClient, keys: RegistryKeys, presence: WorkerPresence, *, lease_s: int) -> None:
        self._client = client
        self._keys = keys
        self._key = keys.worker(presence.id)
        self._lease_s = lease_s
        self._presence = presence
        self._logged_error = ""
        """The last error of writing the entry that is in the log already."""
        self._lease = 0
        self._written: WorkerPresence | None = None
        self._cataloged: frozenset[ModelOffer] = frozenset()
        self._descriptors = b""
        self._written_descriptors = b""
        self._wake = asyncio.Event()
        self._recheck = False
        self._renewed = 0.0
        self._entered = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._forget = client.on_recovery(self._recheck_soon)
        self.closed = False

    async def start(self, timeout_s: float) -> None:
        """Start the task; returns when the entry is written, or after `timeout_s`."""
        self._task = asyncio.create_task(self._run(), name=f"announce-{self._presence.id}")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._entered.wait()

    async def update(self, presence: WorkerPresence) -> None:
        """Replace the entry. Returns at once; the newest value is written as soon as etcd accepts it."""
        if presence.id != self._presence.id:
            raise ValueError("the id of an announced worker cannot change")
        self._presence = presence
        self._wake.set()

    async def describe(self, descriptors: bytes) -> None:
        """Replace the descriptors of the worker's models. Returns at once; the newest value is written as soon as etcd accepts it."""
        self._descriptors = descriptors
        self._wake.set()

    async def withdraw(self) -> None:
        """Remove the entry now by revoking its lease. Idempotent; returns within about two seconds."""
        await self.close()
        lease, self._lease = self._lease, 0
        if not lease:
            return
        try:
            async with asyncio.timeout(WITHDRAW_TIMEOUT_S):
                await self._write_draining(lease)
                await self._client.revoke_lease(lease)
        except LeaseNotFound:
            pass
        except (Unavailable, TimeoutError) as error:
            log.warning("registry.withdraw_failed", worker=self._presence.id, error=str(error))

    async def close(self) -> None:
        """End the task; the entry disappears with its lease. Idempotent."""
        if self.closed:
            return
        self.closed = True
        self._forget()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _write_draining(self, lease: int) -> None:
        """Write DRAINING last, so that watchers can tell a worker that left from a lapsed lease."""
        if self._written is None or self._written.state is WorkerState.DRAINING:
            return
        entry = await self._client.get(self._key)
        if entry is not None and entry.lease == lease:  # else the entry belongs to a successor of the same name
            leaving = self._written.model_copy(update={"state": WorkerState.DRAINING})
            await self._client.put(self._key, leaving.model_dump_json().encode(), lease=lease)

    async def _run(self) -> None:
        while True:
            try:
                await self._bring_up_to_date()
                await self._wait()
            except LeaseNotFound:
                log.warning("registry.lease_lost", worker=self._presence.id)
                self._lease, self._written = 0, None
            except Unavailable as error:
                self._recheck = True
                if self._client.connected and self._logged_error != (
                    message := str(error)
                ):  # an outage has its own log event
                    self._logged_error = message
                    log.error("registry.announce_failed", worker=self._presence.id, error=message)
                await asyncio.sleep(RETRY_DELAY_S)
            except Exception:
                log.exception("registry.announcement_failed", worker=self._presence.id)
                await asyncio.sleep(RETRY_DELAY_S)

    async def _bring_up_to_date(self) -> None:
        """Ensure a valid lease, the entry, and the catalog entries in etcd. Raises LeaseNotFound, Unavailable."""
        if not self._lease:
            self._lease = await self._client.grant_lease(self._lease_s)
            self._written, self._cataloged, self._recheck = None, frozenset(), False
            self._written_descriptors = b""
            self._renewed = monotonic()
        if self._recheck or self._seconds_to_renewal() <= 0:
            began = monotonic()
            await self._check()
            self._recheck, self._renewed = False, began
        if self._written != self._presence:
            presence = self._presence
            await self._client.put(self._key, presence.model_dump_json().encode(), lease=self._lease)
            self._written = presence
        await self._write_catalog()
        self._entered.set()
        await self._write_descriptors()

    async def _check(self) -> None:
        """Renew the lease, and check that the entry belongs to it."""
        await self._client.renew_lease(self._lease)
        entry = await self._client.get(self._key)
        if entry is None or entry.lease != self._lease:
            if entry is not None:
                log.warning("registry.duplicate_worker_name", worker=self._presence.id)
            self._written, self._written_descriptors = None, b""

    async def _wait(self) -> None:
        """Wait until there is something to write, or the lease must be renewed."""
        try:
            async with asyncio.timeout(max(0.0, self._seconds_to_renewal())):
                await self._wake.wait()
        except TimeoutError:
            pass
        self._wake.clear()
        if self._written is not None and _only_load_differs(self._written, self._presence):
            await asyncio.sleep(BUSY_WRITE_INTERVAL_S)

    def _seconds_to_renewal(self) -> float:
        """Return the seconds until the lease must be renewed, however often the entry is written meanwhile."""
        return self._renewed + self._lease_s / 3 - monotonic()

    def _recheck_soon(self) -> None:
        self._recheck = True
        self._wake.set()

    async def _write_catalog(self) -> None:
        """Write the catalog entries of new models, or of all models under a new lease."""
        offers = cataloged_offers(self._presence)
        for offer in sorted(offers - self._cataloged, key=lambda offer: offer.name):
            await self._write_catalog_entry(offer)
        self._cataloged = offers

    async def _write_descriptors(self) -> None:
        """Write the descriptors, if they have changed. Where etcd refuses them, the worker is served without them."""
        descriptors = self._descriptors
        if self._written_descriptors == descriptors:
            return
        key = self._keys.worker_descriptors(self._presence.id)
        try:
            if descriptors:
                await self._client.put(key, descriptors, lease=self._lease)
            else:
                await self._client.delete(key)
        except Unavailable as error:
            if not self._client.connected:
                raise
            log.warning("registry.descriptors_refused", worker=self._presence.id, error=str(error))
        self._written_descriptors = descriptors

    async def _write_catalog_entry(self, offer: ModelOffer) -> None:
        """Add `offer` to the model's catalog entry without losing the additions of other workers.

        etcd returns the previous value: a worker that overwrote an entry which it had not read writes the two joined.
        """
        key = self._keys.model(offer.name)
        found = await self._client.get(key)
        seen = found.value if found else None
        known = _parse(seen)
        entry = catalog_entry(offer, known)
        for _ in range(MAX_EXCHANGES):
            if entry == known:
                return
            written = entry.model_dump_json().encode()
            replaced = await self._client.exchange(key, written)
            if replaced == seen:
                return
            seen, known, entry = written, entry, joined_entry(entry, _parse(replaced))
        if entry != known:
            raise Unavailable(f"the catalog entry of {offer.name} changes too fast; the write is retried")


def _only_load_differs(old: WorkerPresence, new: WorkerPresence) -> bool:
    return old != new and old == new.model_copy(update={"busy": old.busy, "load": old.load})


def _parse(value: bytes | None) -> CatalogEntry | None:
    """Return the entry; None for an unreadable one, which is written again."""
    if value is None:
        return None
    try:
        return CatalogEntry.model_validate_json(value)
    except ValidationError:
        return None
