"""The usage ledger: stores the usage of finished jobs, each run once, and adds it up."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from backbone.ledger.database import LedgerDatabase
from backbone.ledger.usage_query import PricedEvent, UsageQuery, UsageSum

if TYPE_CHECKING:
    from sqlalchemy import Connection


class UsageLedger:
    """Stores and reads usage. SQLAlchemy is imported by the first call, in the database's thread: starts do not wait for it."""

    def __init__(self, database: LedgerDatabase) -> None:
        self._database = database

    async def store(self, events: Iterable[PricedEvent]) -> int:
        """Store the events whose (job, run) is not stored yet. Return their number. Raises Unavailable: repeat the call then.

        `events` is read in the database's thread.
        """

        def work(connection: Connection) -> int:
            from backbone.ledger.statements import store

            return store(connection, events)

        return await self._database.write(work)

    async def add_up(self, query: UsageQuery) -> list[UsageSum]:
        """Return the sums, by interval, then by group. A group is split where the price list's currency has changed. Raises Unavailable."""

        def work(connection: Connection) -> list[UsageSum]:
            from backbone.ledger.statements import add_up

            return add_up(connection, query)

        return await self._database.read(work)

    async def delete_runs(self, before_ms: int, limit: int) -> int:
        """Delete at most `limit` single runs that finished before `before_ms`, and return their number. Raises Unavailable."""

        def work(connection: Connection) -> int:
            from backbone.ledger.statements import delete_runs

            return delete_runs(connection, before_ms, limit)

        return await self._database.write(work)

    async def close(self) -> None:
        """Close the connections."""
        await self._database.close()
