"""Finds jobs by their records. The searches of one gateway are bounded: each costs the server of the records up to half a second."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from itertools import islice
from typing import NamedTuple

from backbone.store.job_filter import JobFilter
from backbone.store.store import Store
from gateway.jobs.query import JobQuery
from gateway.limits.effective import Bound
from gateway.limits.owner_slots import OwnerSlots
from schemas.errors import RateLimited
from schemas.jobs import JobRecord

MAX_SEARCHES, MAX_SEARCHES_OF_ONE = 4, 2
"""Searches that run at the same time in one gateway process, of all callers and of one team."""
MAX_WAIT_S = 10.0
"""The time after which a search that has not begun is refused."""
EXPORT_PAGE = 500
"""Records of an export that are in memory at the same time."""
SELECT_SIZE = 500

LineJobs = Callable[[bool], Iterable[str]]
"""Return the ids of a batch's jobs in their order, newest first or oldest first."""


class JobPage(NamedTuple):
    """A page of jobs."""

    records: list[JobRecord]
    after: str
    """The id after which the next page begins. Empty: there is none."""


class JobSearch:
    """Searches job records."""

    def __init__(self, store: Store, keys_of: Callable[[str], Sequence[str]], *, id_slack_s: float) -> None:
        """`keys_of` returns the ids under which a person submits jobs: that of the person, and those of keys that the person made.

        `id_slack_s`: how much older a job's id may be than the job, in seconds.
        """
        self._store = store
        self._keys_of = keys_of
        self.id_slack_s = id_slack_s
        self._slots = OwnerSlots(MAX_SEARCHES, MAX_WAIT_S)

    async def page(
        self, caller: str, owners: Sequence[str] | None, query: JobQuery, lines: LineJobs | None = None
    ) -> JobPage:
        """Return a page of the jobs of these owners (None: of all).

        `caller`: the team that searches. `lines`: the jobs of the query's batch, whose owner is the only one of `owners`. Raises
        RateLimited, InvalidRequest, Unavailable.
        """
        conditions = self._conditions(query)
        async with self._slot(caller):
            if lines is not None and owners:
                return await self._page_of_batch(owners[0], query, conditions, lines)
            more = await self._store.search(
                owners, conditions, after=query.after, limit=query.limit + 1, newest_first=query.newest_first
            )
        return _page(more.records, query.limit, more.after)

    async def pages(
        self, caller: str, owners: Sequence[str] | None, query: JobQuery, lines: LineJobs | None = None
    ) -> AsyncGenerator[list[JobRecord], None]:
        """Yield the first `query.limit` jobs, some hundred at a time. Raises as `page`."""
        left, after = query.limit, query.after
        while left > 0:
            wanted = replace(query, after=after, limit=min(EXPORT_PAGE, left))
            records, after = await self.page(caller, owners, wanted, lines)
            left -= len(records)
            yield records
            if not after:
                return

    async def _page_of_batch(self, owner: str, query: JobQuery, conditions: JobFilter, lines: LineJobs) -> JobPage:
        ids = iter(lines(query.newest_first))
        if query.after:
            ids = (one for one in ids if (one < query.after if query.newest_first else one > query.after))
        found: list[JobRecord] = []
        while len(found) <= query.limit and (some := list(islice(ids, SELECT_SIZE))):
            found += await self._store.select(owner, some, conditions)
        return _page(found, query.limit, "")

    def _conditions(self, query: JobQuery) -> JobFilter:
        """Return the conditions, with the people's keys as keys."""
        if not query.people:
            return query.conditions
        ids = {key for person in query.people for key in self._keys_of(person)}
        named = query.conditions.values.get("key")
        values = tuple(sorted(ids if named is None else ids & set(named)))
        return replace(query.conditions, values={**query.conditions.values, "key": values})

    @asynccontextmanager
    async def _slot(self, caller: str) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            try:
                async with asyncio.timeout(MAX_WAIT_S):
                    slot = self._slots.hold([Bound(caller, MAX_SEARCHES_OF_ONE)], lambda: None)
                    await stack.enter_async_context(slot)
            except TimeoutError:
                raise RateLimited("Other searches for jobs are still running. Retry when they have ended.") from None
            yield


def _page(records: list[JobRecord], limit: int, after: str) -> JobPage:
    if len(records) > limit:
        return JobPage(records[:limit], records[limit - 1].job)
    return JobPage(records, after)
