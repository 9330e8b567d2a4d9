"""Finds job records in Redis: a script looks for the texts of a filter in the records as they lie, some hundred in one step."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from time import monotonic
from typing import Any

from backbone.store import redis_keys as keys
from backbone.store import search_scripts as scripts
from backbone.store.job_filter import JobFilter
from backbone.store.pipeline import Argument
from backbone.store.redis_connection import RedisConnection
from backbone.store.redis_records import parse_record
from backbone.store.store import FoundJobs
from schemas.errors import InvalidRequest
from schemas.jobs import JobRecord

STEP = 500
"""Records that one script looks at: about a millisecond, for which every other call to Redis waits."""
MAX_SEARCH_S = 2.0
"""The time after which a search returns what it has found so far."""
MAX_OWNERS = 1000
"""Owners whose jobs one search can merge."""
SCAN_COUNT = 1000
COMPLETE_S = 30 * 86_400
"""The time after which the lists of earlier versions are looked for again."""


class RecordSearch:
    """Searches the records of owners; see `backbone.store.store.Store.search`."""

    def __init__(self, connection: RedisConnection) -> None:
        """Read through `connection`, which its owner closes."""
        self._connection = connection
        self._search = connection.script(scripts.SEARCH)
        self._select = connection.script(scripts.SELECT)

    async def search(
        self, owners: Sequence[str] | None, wanted: JobFilter, *, after: str, limit: int, newest_first: bool
    ) -> FoundJobs:
        """Return records that meet the filter. Raises InvalidRequest, Unavailable."""
        if owners is None:
            owners = await self._all_owners()
        lists = {keys.jobs_of(owner): keys.jobs_prefix(owner) for owner in owners}
        first, end = _bounds(wanted, after, newest_first)
        conditions = _conditions(wanted)
        found: list[JobRecord] = []
        stop_at = monotonic() + MAX_SEARCH_S
        while lists and (room := limit - len(found)) > 0:
            args: list[Argument] = [*conditions, int(newest_first), first, end, STEP, room, *lists.values()]
            last, still_open, flat = await self._connection.run(self._search, list(lists), args)
            records = (parse_record(flat[at + 1], flat[at].decode()) for at in range(0, len(flat), 2))
            found += filter(wanted.matches, records)
            names = list(lists)
            lists = {names[at]: lists[names[at]] for at in still_open}
            if lists and (len(found) >= limit or monotonic() > stop_at):
                return FoundJobs(found, last.decode())
            first = f"({last.decode()}"
        return FoundJobs(found, "")

    async def select(self, owner: str, job_ids: Iterable[str], wanted: JobFilter) -> list[JobRecord]:
        """Return the records with these ids that meet the filter. Raises Unavailable."""
        ids = list(job_ids)
        if not ids:
            return []
        names = [keys.job(owner, job_id) for job_id in ids]
        flat = await self._connection.run(self._select, names, _conditions(wanted))
        records = (parse_record(flat[at + 1], ids[flat[at]]) for at in range(0, len(flat), 2))
        return [record for record in records if wanted.matches(record)]

    async def _all_owners(self) -> list[str]:
        complete, names = await asyncio.gather(
            self._execute("EXISTS", keys.JOB_OWNERS_COMPLETE), self._execute("ZRANGE", keys.JOB_OWNERS, 0, MAX_OWNERS)
        )
        if not complete:
            await self._find_owners()
            names = await self._execute("ZRANGE", keys.JOB_OWNERS, 0, MAX_OWNERS)
        if len(names) > MAX_OWNERS:
            raise InvalidRequest(f"More than {MAX_OWNERS} teams have jobs. Name teams with 'team'.", param="team")
        return [name.decode() for name in names]

    async def _find_owners(self) -> None:
        """Enter the owners of the lists that earlier versions made, once."""
        cursor: bytes | str = "0"
        while True:
            cursor, found = await self._execute("SCAN", cursor, "MATCH", f"{keys.JOBS}*", "COUNT", SCAN_COUNT)
            for name in found:
                await self._execute("ZADD", keys.JOB_OWNERS, 0, keys.owner_of(name.decode()))
            if int(cursor) == 0:
                break
        await self._execute("SET", keys.JOB_OWNERS_COMPLETE, "1", "EX", COMPLETE_S)

    async def _execute(self, *command: Argument) -> Any:
        return await self._connection.call(lambda: self._connection.execute(*command))


def _bounds(wanted: JobFilter, after: str, newest_first: bool) -> tuple[str, str]:
    """Return where a list is read from and to, as Redis takes bounds of ids."""
    if newest_first:
        most = min(filter(None, (after, wanted.last_id)), default="")
        return f"({most}" if most else "+", f"[{wanted.first_id}" if wanted.first_id else "-"
    least = f"[{wanted.first_id}" if wanted.first_id else "-"
    if after >= wanted.first_id and after:
        least = f"({after}"
    return least, f"({wanted.last_id}" if wanted.last_id else "+"


def _conditions(wanted: JobFilter) -> list[Argument]:
    """Return the filter as the scripts read it."""
    groups = wanted.texts()
    args: list[Argument] = [len(groups)]
    for group in groups:
        args += [len(group), *group]
    args.append(len(wanted.ranges))
    for name, least, most, since in wanted.ranges:
        args += [f'"{name}":', f'"{since}":' if since else "", _number(least), _number(most)]
    return args


def _number(value: float | None) -> float | str:
    return "" if value is None else value
