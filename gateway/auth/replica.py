"""Keep the records of one kind in the memory of every gateway, with the document store behind them.

Guarantees:
- A lookup never waits for the store. While the store is unavailable, the known records stay, and none can be changed.
- Of two versions of a record the newer one holds, wherever it was read: a gateway that knows a newer version than the store writes it
  back. A record that has ended for good (`is_final`) never comes back, whatever its version.
- A store that has lost its data gets the records back from any gateway that knows them. A gateway that has not read the store for
  `TRUSTED_S` forgets the records that the store does not have.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Generic, Protocol, TypeVar

import structlog
from pydantic import ValidationError

from backbone.store.documents import DocumentStore
from schemas.errors import Unavailable

log = structlog.get_logger(__name__)

RETENTION_S = 14 * 86_400.0
"""Time for which a record is stored after its end: longer than any job lives and any webhook is retried."""
TRUSTED_S = RETENTION_S / 2
PAGE_SIZE = 500
MAX_CHANGE_ATTEMPTS = 10


class VersionedRecord(Protocol):
    """A record whose versions can be compared."""

    @property
    def id(self) -> str:
        """The record's id."""

    @property
    def version(self) -> int:
        """Counts changes."""

    def model_dump_json(self) -> str:
        """Return the record as JSON."""


R = TypeVar("R", bound=VersionedRecord)


class RecordReplica(Generic[R]):
    """The records of one kind; see the module's docstring for the guarantees."""

    def __init__(
        self,
        documents: DocumentStore,
        kind: str,
        *,
        parse: Callable[[bytes], R],
        end: Callable[[R], int | None],
        is_final: Callable[[R], bool],
        on_change: Callable[[str, R | None], None],
        clock: Callable[[], float],
    ) -> None:
        """Begin without records.

        Args:
            documents: The document store.
            kind: The kind of the documents.
            parse: Parses a record. Raises ValueError.
            end: Returns the time at which a record ends, in Unix seconds; None: never.
            is_final: Returns whether a record has ended for good.
            on_change: Receives each new version with its id, and None for a forgotten record.
            clock: Returns the time in Unix seconds.
        """
        self._documents = documents
        self._kind = kind
        self._parse = parse
        self._end = end
        self._is_final = is_final
        self._on_change = on_change
        self._clock = clock
        self._records: dict[str, R] = {}
        self._stored: dict[str, bytes] = {}
        """Records as the store held them at the last refresh, so that unchanged ones are not parsed again."""
        self._read_at = 0.0

    def __len__(self) -> int:
        return len(self._stored)

    def get(self, record_id: str) -> R | None:
        """Return the record with this id, also one that has ended; None for an unknown id."""
        return self._records.get(record_id)

    def all(self) -> Collection[R]:
        """Return every record, including those that have ended."""
        return self._records.values()

    async def add(self, record: R) -> bool:
        """Store a new record. False, without a change: there is one with its id. Raises Unavailable."""
        raw = record.model_dump_json().encode()
        if not await self._documents.add(self._kind, "", record.id, raw, ttl_s=self._ttl_s(record)):
            return False
        self._take(record, raw)
        return True

    async def put(self, record: R) -> None:
        """Store a version of a record. Raises Unavailable."""
        raw = record.model_dump_json().encode()
        ttl_s = self._ttl_s(record)
        await self._documents.put(self._kind, "", record.id, raw, ttl_s=None if ttl_s is None else max(1.0, ttl_s))
        self._take(record, raw)

    async def change(self, record_id: str, update: Callable[[R], R]) -> R | None:
        """Change a record as the store holds it now: of two gateways that change it at once, the second sees the first one's change.

        `update` returns the next version; it may be called again. None: there is no such record. Raises Unavailable.
        """
        for _ in range(MAX_CHANGE_ATTEMPTS):
            raw = await self._documents.get(self._kind, "", record_id)
            stored = self._parsed(record_id, raw) if raw is not None else None
            known = self._records.get(record_id)
            record = known if known is not None and (stored is None or self._is_newer(known, stored)) else stored
            if record is None:
                return None
            new = update(record)
            value = new.model_dump_json().encode()
            if raw is None:
                await self.put(new)
                return new
            if await self._documents.swap(self._kind, "", record_id, raw, value):
                self._take(new, value)
                return new
        raise Unavailable(f"The record {record_id} changes too fast. Retry shortly.", retry_after_s=1.0)

    async def refresh(self) -> bool:
        """Read all records, and write back those that the store has lost. Return whether any was written. Raises Unavailable."""
        known = list(self._stored)
        stored = await self._read()
        trusted = self._clock() - self._read_at < TRUSTED_S
        self._read_at = self._clock()
        written = False
        for record_id, raw in stored.items():
            if self._stored.get(record_id) != raw:
                written |= await self._take_over(record_id, raw)
        lost = [record_id for record_id in known if record_id not in stored]
        if lost:
            await self._restore(lost, trusted=trusted)
        return written

    async def _read(self) -> dict[str, bytes]:
        found: dict[str, bytes] = {}
        after = ""
        while page := await self._documents.page(self._kind, "", after=after, limit=PAGE_SIZE, newest_first=False):
            found.update(page)
            after = page[-1][0]
        return found

    async def _take_over(self, record_id: str, raw: bytes) -> bool:
        """Take over a record of the store, unless a newer version is known here; then write that back, and return True."""
        record = self._parsed(record_id, raw)
        known = self._records.get(record_id)
        if record is None:
            self._stored[record_id] = raw
        elif known is not None and self._is_newer(known, record):
            await self.put(known)
            return True
        else:
            self._take(record, raw)
        return False

    def _is_newer(self, known: R, stored: R) -> bool:
        if self._is_final(known) != self._is_final(stored):
            return self._is_final(known)
        return known.version > stored.version

    async def _restore(self, lost: list[str], *, trusted: bool) -> None:
        """Write back records that only this gateway knows, or forget those whose retention is over."""
        returned = 0
        for record_id in lost:
            record = self._records.get(record_id)
            ttl_s = self._ttl_s(record) if record is not None else 0.0
            if not trusted or (ttl_s is not None and ttl_s <= 0):
                self._stored.pop(record_id, None)
                if self._records.pop(record_id, None) is not None:
                    self._on_change(record_id, None)
            else:
                ours = self._stored[record_id]
                if await self._documents.add(self._kind, "", record_id, ours, ttl_s=ttl_s):
                    returned += 1
                elif (theirs := await self._documents.get(self._kind, "", record_id)) not in (None, ours):
                    await self._take_over(record_id, theirs)  # another gateway was first, and may lack a newer version
        if returned:
            log.warning("keys.restored", kind=self._kind, records=returned)

    def _parsed(self, record_id: str, raw: bytes) -> R | None:
        try:
            record = self._parse(raw)
            if record.id == record_id:
                return record
            problem = "its id does not match"
        except ValueError as error:
            problem = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        log.warning("keys.record_unreadable", kind=self._kind, id=record_id, error=problem)
        return None

    def _take(self, record: R, raw: bytes) -> None:
        self._stored[record.id] = raw
        self._records[record.id] = record
        self._on_change(record.id, record)

    def _ttl_s(self, record: R) -> float | None:
        """Return for how many seconds a record is still stored; None: forever."""
        end = self._end(record)
        return end + RETENTION_S - self._clock() if end is not None else None
