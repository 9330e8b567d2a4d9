"""The ledger on both of its databases: each run and each audit event once, sums that agree with the rows, and errors that are Unavailable."""

from __future__ import annotations

import asyncio
import random
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from backbone.ledger.access import LedgerAccess
from backbone.ledger.audit_query import AuditQuery
from backbone.ledger.audit_store import AuditStore
from backbone.ledger.database import LedgerDatabase
from backbone.ledger.usage_ledger import UsageLedger
from backbone.ledger.usage_query import PricedEvent, UsageQuery
from schemas.audit import AuditEvent, AuditResult
from schemas.errors import Unavailable
from schemas.usage import DIMENSIONS
from tests.postgresql import PostgreSQL
from tests.unit.gateway.usage.sample import BEGAN_MS, HOUR_MS, event

BEGAN = BEGAN_MS // 1000
ALL = UsageQuery(0, 2**33)


@pytest.fixture(scope="module")
def server() -> Iterator[PostgreSQL]:
    server = PostgreSQL()
    server.start()
    yield server
    server.remove()


@pytest.fixture(params=["sqlite", "postgresql"])
def access(request: pytest.FixtureRequest, tmp_path: Path) -> LedgerAccess:
    if request.param == "sqlite":
        return LedgerAccess(sqlite_file=tmp_path / "ledger.db")
    server: PostgreSQL = request.getfixturevalue("server")
    name = f"ledger_{random.getrandbits(64):x}"
    server.execute(f"CREATE DATABASE {name}")
    return LedgerAccess(postgresql_url=server.url.replace("/postgres", f"/{name}"))


@pytest_asyncio.fixture
async def ledger(access: LedgerAccess) -> AsyncIterator[UsageLedger]:
    ledger = UsageLedger(LedgerDatabase(access))
    yield ledger
    await ledger.close()


def priced(number: int = 0, cost: int = 5, currency: str = "usd", **fields: Any) -> PricedEvent:
    return PricedEvent(event(number, **fields), cost, currency)


async def requests(ledger: UsageLedger) -> int:
    return sum(row.sums["requests"] for row in await ledger.add_up(ALL))


async def test_each_run_is_one_row(ledger: UsageLedger) -> None:
    """A run that arrives again, in the same batch or later, changes no sum; another run of the job is another row."""
    events = [priced(number) for number in range(100)]
    assert await ledger.store([*events, events[3]]) == 100
    assert await ledger.store(events[50:]) == 0
    assert await ledger.store([priced(1, run=2), priced(7, team="blue")]) == 1
    [row] = await ledger.add_up(ALL)
    assert (row.sums["requests"], row.sums["input_tokens"], row.cost_nanos, row.currency) == (101, 10_100, 505, "usd")


async def test_writers_at_the_same_time(access: LedgerAccess) -> None:
    """Several gateways open a new database together, and write overlapping batches: still each run once."""
    ledgers = [UsageLedger(LedgerDatabase(access)) for _ in range(4)]
    batches = [
        [priced(number, team=f"t{number % 7}") for number in range(start, start + 300)] for start in (0, 100, 200, 50)
    ]
    stored = await asyncio.gather(*(ledger.store(batch) for ledger, batch in zip(ledgers, batches, strict=True)))
    assert sum(stored) == 500
    assert await requests(ledgers[0]) == 500
    for ledger in ledgers:
        await ledger.close()


async def test_hourly_sums_agree_with_rows(ledger: UsageLedger) -> None:
    """Any interval, also one that cuts hours, and any filter: the sums are those of the single runs."""
    luck = random.Random(5)
    events = [
        priced(
            number,
            cost=luck.randrange(1000),
            finished_ms=BEGAN_MS + luck.randrange(50 * HOUR_MS),
            team=luck.choice("abc"),
            model=luck.choice("xyz"),
            durable=luck.random() < 0.5,
            worker=luck.choice(["w1", "w2"]),
        )
        for number in range(600)
    ]
    await ledger.store(events)
    for start, end in ((0, 50 * 3600), (1800, 30 * 3600 + 17), (100, 200), (3599, 3601), (7200, 10_800)):
        for group, filters in ((("team", "durable"), {"model": ("x", "y")}), (("worker",), {"durable": (True,)})):
            chosen = [
                one
                for one in events
                if BEGAN_MS + start * 1000 <= one.event.finished_ms < BEGAN_MS + end * 1000
                and all(getattr(one.event, name) in values for name, values in filters.items())
            ]
            wanted = Counter(tuple(getattr(one.event, name) for name in group) for one in chosen)
            rows = await ledger.add_up(UsageQuery(BEGAN + start, BEGAN + end, "", group, filters))
            assert {tuple(row.group.values()): row.sums["requests"] for row in rows} == wanted
            assert sum(row.cost_nanos for row in rows) == sum(one.cost_nanos for one in chosen)


async def test_intervals(ledger: UsageLedger) -> None:
    """Minutes, hours, days and months begin where they begin in UTC."""
    await ledger.store(
        [priced(0), priced(1, finished_ms=BEGAN_MS + 61_000), priced(2, finished_ms=BEGAN_MS + 40 * 24 * HOUR_MS)]
    )
    starts = {
        bucket: [row.start for row in await ledger.add_up(UsageQuery(0, 2**33, bucket))]
        for bucket in ("minute", "hour", "day", "month")
    }
    late = BEGAN + 40 * 86_400
    assert starts == {
        "minute": [BEGAN, BEGAN + 60, late],
        "hour": [BEGAN, late],
        "day": [BEGAN // 86_400 * 86_400, late // 86_400 * 86_400],
        "month": [1_793_491_200, 1_798_761_600],
    }


async def test_every_dimension_groups_and_filters(ledger: UsageLedger) -> None:
    """Each dimension splits what differs in it alone, and pages go through the groups."""
    for number, name in enumerate(DIMENSIONS):
        value: Any = True if name in ("durable", "batch") else "other"
        changed: dict[str, Any] = {name: value}
        await ledger.store([priced(2 * number, **changed), priced(2 * number + 1)])
        rows = await ledger.add_up(UsageQuery(0, 2**33, "", (name,), {name: (value,)}))
        assert [(row.group, row.sums["requests"]) for row in rows] == [({name: value}, 1)]
    first = await ledger.add_up(UsageQuery(0, 2**33, "", DIMENSIONS, limit=3))
    rest = await ledger.add_up(UsageQuery(0, 2**33, "", DIMENSIONS, limit=100, offset=3))
    assert len(first) == 3
    assert len(first) + len(rest) == len(DIMENSIONS) + 1


async def test_currencies_are_never_added(ledger: UsageLedger) -> None:
    """After a change of the price list's currency a group has two rows."""
    await ledger.store([priced(1, 5, "usd"), priced(2, 7, "eur")])
    assert [(row.cost_nanos, row.currency) for row in await ledger.add_up(ALL)] == [(7, "eur"), (5, "usd")]


async def test_old_runs_are_deleted_and_sums_stay(ledger: UsageLedger) -> None:
    """Single runs have a lifetime, hourly sums have none."""
    await ledger.store([priced(number, finished_ms=BEGAN_MS + number * HOUR_MS) for number in range(10)])
    assert await ledger.delete_runs(BEGAN_MS + 5 * HOUR_MS, 3) == 3
    assert await ledger.delete_runs(BEGAN_MS + 5 * HOUR_MS, 3) == 2
    assert await ledger.delete_runs(BEGAN_MS + 5 * HOUR_MS, 3) == 0
    by_worker = await ledger.add_up(UsageQuery(0, 2**33, "", ("worker",)))
    assert (await requests(ledger), by_worker[0].sums["requests"]) == (10, 5)


def audited(number: int = 0, **fields: Any) -> AuditEvent:
    values: dict[str, Any] = {
        "id": f"aud_{BEGAN_MS + number:012x}{number:020x}", "at_ms": BEGAN_MS + number, "actor": "api_key", "team": "red", "key": "key_1",
        "action": "key.create", "target_type": "key", "target": f"key_{number}", "status": 201,
    }  # fmt: skip
    return AuditEvent(**(values | fields))


EVERYTHING = AuditQuery(0, 2**47)


async def test_audit_events_are_stored_once(access: LedgerAccess) -> None:
    """An event that comes again folds; one without a result gets it, in whichever order they come; writers do not hinder each other."""
    stores = [AuditStore(LedgerDatabase(access)) for _ in range(3)]
    store = stores[0]
    assert await store.store([audited(1, status=0), audited(1), audited(2, status=0), audited(1, status=0)]) == 2
    assert await store.store([audited(1, status=0), audited(2, status=404), audited(3, status=0)]) == 1
    assert await store.store([audited(2, status=0)]) == 0
    batches = [[audited(number) for number in range(first, first + 300)] for first in (10, 110, 60)]
    stored = await asyncio.gather(*(one.store(batch) for one, batch in zip(stores, batches, strict=True)))
    assert sum(stored) == 400
    found = await store.page(EVERYTHING, after="", limit=1000)
    assert [one.event.status for one in found[-3:]] == [0, 404, 201]
    assert len({one.sequence for one in found}) == len(found) == 403
    for one in stores:
        await one._database.close()


async def test_audit_events_are_found(access: LedgerAccess) -> None:
    """By any field, by time, by names that begin alike and by result; pages are newest first, exports miss no late event."""
    database = LedgerDatabase(access)
    store = AuditStore(database)
    actions = ("key.create", "key.change", "keyring.open", "team.create", "key.refused")
    statuses = (200, 0, 403, 500, 401)
    events = [
        audited(10 * number, action=actions[number], status=statuses[number], team="blue" if number == 3 else "red")
        for number in range(5)
    ]
    await store.store(events)

    async def found(**fields: Any) -> list[int]:
        query = AuditQuery(**({"start_ms": 0, "end_ms": 2**47} | fields))
        return [int((one.event.at_ms - BEGAN_MS) / 10) for one in await store.page(query, after="", limit=10)]

    assert await found() == [4, 3, 2, 1, 0]
    assert await found(actions=("key.*",)) == [4, 1, 0]
    assert await found(actions=("team.create", "keyring.*")) == [3, 2]
    assert await found(filters={"team": ("blue",)}) == [3]
    assert await found(start_ms=BEGAN_MS + 10, end_ms=BEGAN_MS + 30) == [2, 1]
    for result, numbers in zip(AuditResult, ([0], [4, 2], [3], [1]), strict=True):
        assert await found(results=(result,)) == numbers, result
    pages = await store.page(EVERYTHING, after=events[3].id, limit=2)
    assert [one.event for one in pages] == [events[2], events[1]]
    first = await store.export(EVERYTHING, after=0, limit=10)
    assert [one.event for one in first] == events
    late = audited(5)
    await store.store([late, audited(10, action="key.change")])
    rest = await store.export(EVERYTHING, after=first[-1].sequence, limit=10)
    assert [one.event for one in rest] == [late, audited(10, action="key.change")]
    await database.close()


async def test_old_audit_events_are_deleted(access: LedgerAccess) -> None:
    """All but the last, behind whose sequence exports continue."""
    database = LedgerDatabase(access)
    store = AuditStore(database)
    await store.store(audited(number) for number in range(10))
    assert [await store.delete(BEGAN_MS + 5, 3) for _ in range(3)] == [3, 2, 0]
    assert await store.delete(BEGAN_MS + 1000, 100) == 4
    [last] = await store.export(EVERYTHING, after=0, limit=10)
    await store.store([audited(99)])
    assert [one.sequence for one in await store.export(EVERYTHING, after=last.sequence, limit=10)] == [
        last.sequence + 1
    ]
    await database.close()


async def test_the_migrations_make_the_tables(access: LedgerAccess) -> None:
    """What migrations create is what the statements expect; a second start changes nothing."""
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    from backbone.ledger.tables import metadata

    for _ in range(2):
        database = LedgerDatabase(access)
        found = await database.read(
            lambda connection: compare_metadata(
                MigrationContext.configure(connection, opts={"version_table": "ledger_version"}), metadata
            )
        )
        assert found == []
        await database.close()


async def test_a_lost_server_is_unavailable(tmp_path: Path) -> None:
    """A stopped server fails the call, whose transaction changed nothing, and works again when it is back."""
    server = PostgreSQL()
    try:
        ledger = UsageLedger(LedgerDatabase(LedgerAccess(postgresql_url=server.url)))
        with pytest.raises(Unavailable):
            await ledger.store([priced(1)])
        server.start()
        assert await ledger.store([priced(1)]) == 1
        server.stop()
        with pytest.raises(Unavailable):
            await ledger.store([priced(2)])
        server.start()
        assert await ledger.store([priced(1), priced(2)]) == 1
        server.execute("ALTER DATABASE postgres SET default_transaction_read_only = on")
        server.stop()
        server.start()
        with pytest.raises(Unavailable):
            await ledger.store([priced(3)])
        assert await requests(ledger) == 2
        await ledger.close()
    finally:
        server.remove()


async def test_a_full_sqlite_file_is_unavailable(tmp_path: Path) -> None:
    """A disk that is full fails the call and loses nothing that was stored; the file is the owner's alone."""
    file = tmp_path / "deep" / "ledger.db"
    ledger = UsageLedger(LedgerDatabase(LedgerAccess(sqlite_file=file)))
    assert await ledger.store([priced(1)]) == 1
    assert file.stat().st_mode & 0o077 == 0
    with sqlite3.connect(file) as other:
        pages = other.execute("PRAGMA page_count").fetchone()[0]
    database = LedgerDatabase(LedgerAccess(sqlite_file=file))

    def limit(connection: Any) -> None:
        connection.exec_driver_sql(f"PRAGMA max_page_count={pages}")

    full = UsageLedger(database)
    await database.write(limit)
    with pytest.raises(Unavailable, match="full"):
        await full.store([priced(number) for number in range(2, 2000)])
    assert await requests(full) == 1
    assert await ledger.store([priced(number) for number in range(2, 2000)]) == 1998
    await ledger.close()
    await full.close()


async def test_a_read_only_sqlite_file_is_unavailable(tmp_path: Path) -> None:
    """A database that cannot be written keeps what it has, and its reads work."""
    file = tmp_path / "ledger.db"
    ledger = UsageLedger(LedgerDatabase(LedgerAccess(sqlite_file=file)))
    await ledger.store([priced(1)])
    database = LedgerDatabase(LedgerAccess(sqlite_file=file))
    await database.write(lambda connection: connection.exec_driver_sql("PRAGMA query_only=1"))
    frozen = UsageLedger(database)
    with pytest.raises(Unavailable):
        await frozen.store([priced(2)])
    assert await requests(frozen) == 1
    await ledger.close()
    await frozen.close()
