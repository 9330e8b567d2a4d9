"""A worker's entry in etcd, kept there by one task: written again after whatever may happen to etcd or the lease."""

from __future__ import annotations

import asyncio
import contextlib
from time import monotonic

import structlog
from pydantic import ValidationError

from backbone.registry.etcd_client import EtcdClient, LeaseNotFound
from backbone.registry.keys import RegistryKeys
from backbone.registry.snapshot import cataloged_offers, catalogue_entry, joined_entry
from schemas.errors import Unavailable
from schemas.presence import CatalogEntry, ModelOffer, WorkerPresence, WorkerState

log = structlog.get_logger(__name__)

RETRY_S = 0.3
"""Pause after a call that failed."""
BUSY_WRITE_S = 0.25
"""At most one write in this time where only `busy` changed."""
WITHDRAW_S = 1.5
EXCHANGE_TRIES = 10
"""More than there are capabilities: each turn adds one that others have entered meanwhile, or is the last one."""


class EtcdAnnouncement:
    """See `backbone.registry.registry.Announcement`. Its lease is granted, renewed and replaced by one task.

    Every third of the lease, the lease is renewed and the entry is looked at: gone, or somebody else's, it is written
    again. When etcd comes back after an outage that happens at once.
    """

    def __init__(self, link: EtcdClient, keys: RegistryKeys, presence: WorkerPresence, *, lease_s: int) -> None:
        self._link = link
        self._keys = keys
        self._key = keys.worker(presence.id)
        self._lease_s = lease_s
        self._presence = presence
        self._told = ""
        """Why the entry could not be written, as the log has it already."""
        self._lease = 0
        self._written: WorkerPresence | None = None
        self._catalogued: frozenset[ModelOffer] = frozenset()
        self._wake = asyncio.Event()
        self._recheck = False
        self._renewed = 0.0
        self._entered = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._forget = link.on_recovery(self._look_again)
        self.closed = False

    async def start(self, timeout_s: float) -> None:
        """Begin; returns when the entry is there, or after `timeout_s`."""
        self._task = asyncio.create_task(self._keep(), name=f"announce-{self._presence.id}")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._entered.wait()

    async def update(self, presence: WorkerPresence) -> None:
        """Replace the entry. Returns at once; the newest value is written as soon as etcd takes it."""
        if presence.id != self._presence.id:
            raise ValueError("an announcement keeps its worker's id")
        self._presence = presence
        self._wake.set()

    async def withdraw(self) -> None:
        """Remove the entry at once, by ending its lease. Idempotent; within about two seconds."""
        await self.close()
        lease, self._lease = self._lease, 0
        if not lease:
            return
        try:
            async with asyncio.timeout(WITHDRAW_S):
                await self._say_goodbye(lease)
                await self._link.revoke_lease(lease)
        except LeaseNotFound:
            pass
        except (Unavailable, TimeoutError) as error:
            log.warning("registry.withdraw_left_to_the_lease", worker=self._presence.id, error=str(error))

    async def close(self) -> None:
        """End the keepalive; the entry goes with its lease. Idempotent."""
        if self.closed:
            return
        self.closed = True
        self._forget()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _say_goodbye(self, lease: int) -> None:
        """Write DRAINING last, so that watchers can tell a worker that left from a lapsed lease."""
        if self._written is None or self._written.state is WorkerState.DRAINING:
            return
        entry = await self._link.get(self._key)
        if entry is not None and entry.lease == lease:  # else it is a successor's under the same name
            leaving = self._written.model_copy(update={"state": WorkerState.DRAINING})
            await self._link.put(self._key, leaving.model_dump_json().encode(), lease=lease)

    async def _keep(self) -> None:
        while True:
            try:
                await self._bring_up_to_date()
                await self._wait()
            except LeaseNotFound:
                log.warning("registry.lease_lost", worker=self._presence.id)
                self._lease, self._written = 0, None
            except Unavailable as error:
                self._recheck = True
                if self._link.connected and self._told != (told := str(error)):  # an outage has its own line
                    self._told = told
                    log.error("registry.not_entered", worker=self._presence.id, error=told)
                await asyncio.sleep(RETRY_S)
            except Exception:
                log.exception("registry.announcement_failed", worker=self._presence.id)
                await asyncio.sleep(RETRY_S)

    async def _bring_up_to_date(self) -> None:
        """Have a living lease, the entry and the catalogue in etcd. Raises LeaseNotFound, Unavailable."""
        if not self._lease:
            self._lease = await self._link.grant_lease(self._lease_s)
            self._written, self._catalogued, self._recheck = None, frozenset(), False
            self._renewed = monotonic()
        if self._recheck or self._renewal_in() <= 0:
            began = monotonic()
            await self._check()
            self._recheck, self._renewed = False, began
        if self._written != self._presence:
            presence = self._presence
            await self._link.put(self._key, presence.model_dump_json().encode(), lease=self._lease)
            self._written = presence
        await self._catalogue()
        self._entered.set()

    async def _check(self) -> None:
        """Renew the lease and see whether the entry is still ours."""
        await self._link.renew_lease(self._lease)
        entry = await self._link.get(self._key)
        if entry is None or entry.lease != self._lease:
            if entry is not None:
                log.warning("registry.same_name_twice", worker=self._presence.id)
            self._written = None

    async def _wait(self) -> None:
        """Until there is something to write, or the lease wants renewing."""
        try:
            async with asyncio.timeout(max(0.0, self._renewal_in())):
                await self._wake.wait()
        except TimeoutError:
            pass
        self._wake.clear()
        if self._written is not None and _only_load_differs(self._written, self._presence):
            await asyncio.sleep(BUSY_WRITE_S)

    def _renewal_in(self) -> float:
        """Seconds until the lease wants renewing, however often the entry is written meanwhile."""
        return self._renewed + self._lease_s / 3 - monotonic()

    def _look_again(self) -> None:
        self._recheck = True
        self._wake.set()

    async def _catalogue(self) -> None:
        """Enter the models that are new since the last time, or all of them under a new lease."""
        offers = cataloged_offers(self._presence)
        for offer in sorted(offers - self._catalogued, key=lambda offer: offer.name):
            await self._enter(offer)
        self._catalogued = offers

    async def _enter(self, offer: ModelOffer) -> None:
        """Add what `offer` says to the model's catalogue entry, without losing what others add meanwhile.

        A worker that wrote over an entry which it had not read learns so from etcd's answer, and writes the two joined.
        """
        key = self._keys.model(offer.name)
        found = await self._link.get(key)
        seen = found.value if found else None
        known = _parse(seen)
        entry = catalogue_entry(offer, known)
        for _ in range(EXCHANGE_TRIES):
            if entry == known:
                return
            written = entry.model_dump_json().encode()
            replaced = await self._link.exchange(key, written)
            if replaced == seen:
                return
            seen, known, entry = written, entry, joined_entry(entry, _parse(replaced))
        if entry != known:
            raise Unavailable(f"the catalogue entry of {offer.name} changes too fast")


def _only_load_differs(old: WorkerPresence, new: WorkerPresence) -> bool:
    return old != new and old == new.model_copy(update={"busy": old.busy, "load": old.load})


def _parse(value: bytes | None) -> CatalogEntry | None:
    """An entry that cannot be read is written anew."""
    if value is None:
        return None
    try:
        return CatalogEntry.model_validate_json(value)
    except ValidationError:
        return None
