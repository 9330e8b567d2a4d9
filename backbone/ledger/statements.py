"""The statements of the usage ledger. All functions run inside a transaction of `LedgerDatabase`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from functools import cache
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Compiled,
    Connection,
    Dialect,
    Select,
    delete,
    func,
    literal,
    select,
    tuple_,
    union_all,
)
from sqlalchemy.dialects import postgresql, sqlite

from backbone.ledger.tables import ADDED, HOUR_KEY, usage_hours, usage_runs
from backbone.ledger.usage_query import Bucket, PricedEvent, UsageQuery, UsageSum
from schemas.usage import HOURLY_DIMENSIONS

HOUR_S = 3600
MAX_KEYS = 500
"""Jobs that one statement looks for."""
WRITE_LOCK = 0x6E6578757377
"""PostgreSQL's advisory lock of the process that writes."""
BUCKET_S = {"minute": 60, "hour": HOUR_S, "day": 86_400}


def store(connection: Connection, priced: Iterable[PricedEvent]) -> int:
    """Store the events that are not stored yet, and add them to the hourly sums. Return their number."""
    lock_writes(connection)
    rows = {
        (one.event.job, one.event.run): one.event.__dict__ | {"cost_nanos": one.cost_nanos, "currency": one.currency}
        for one in priced
    }
    for key in _stored(connection, [job for job, _ in rows]):
        rows.pop(key, None)
    if rows:
        insert_runs, add_hours = _writes(connection.dialect)
        new = list(rows.values())
        _execute_many(connection, insert_runs, new)
        _execute_many(connection, add_hours, _by_hour(new))
    return len(rows)


def lock_writes(connection: Connection) -> None:
    """Let one gateway write at a time. SQLite's transactions of writers do so by themselves."""
    if connection.dialect.name == "postgresql":
        connection.execute(select(func.pg_advisory_xact_lock(WRITE_LOCK)))


def _stored(connection: Connection, jobs: list[str]) -> set[tuple[str, int]]:
    """Return the keys of the stored runs of these jobs."""
    found: set[tuple[str, int]] = set()
    for first in range(0, len(jobs), MAX_KEYS):
        chosen = select(usage_runs.c.job, usage_runs.c.run).where(usage_runs.c.job.in_(jobs[first : first + MAX_KEYS]))
        found.update((job, run) for job, run in connection.execute(chosen))
    return found


@cache
def _writes(dialect: Dialect) -> tuple[Compiled, Compiled]:
    """Return the statements that insert runs and add hourly sums, compiled once: that takes longer than a row."""
    insert = postgresql.insert if dialect.name == "postgresql" else sqlite.insert
    hours = insert(usage_hours)
    sums = {name: usage_hours.c[name] + getattr(hours.excluded, name) for name in ("requests", *ADDED)}
    upsert = hours.on_conflict_do_update(index_elements=list(HOUR_KEY), set_=sums)
    return insert(usage_runs).compile(dialect=dialect), upsert.compile(dialect=dialect)


def _execute_many(connection: Connection, statement: Compiled, rows: list[dict[str, Any]]) -> None:
    """Run a statement for each row."""
    names = getattr(statement, "positiontup", None)
    parameters: Any = rows if names is None else [tuple([row[name] for name in names]) for row in rows]
    connection.exec_driver_sql(str(statement), parameters)


def _by_hour(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the hourly sums of rows, in the order of their keys."""
    sums: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        second = row["finished_ms"] // 1000
        key = (second - second % HOUR_S, *(row[name] for name in HOUR_KEY[1:]))
        total = sums.get(key)
        if total is None:
            total = sums[key] = dict(zip(HOUR_KEY, key, strict=True)) | {"requests": 0} | dict.fromkeys(ADDED, 0)
        total["requests"] += 1
        for name in ADDED:
            total[name] += row[name]
    return [sums[key] for key in sorted(sums)]


def add_up(connection: Connection, query: UsageQuery) -> list[UsageSum]:
    """Return the sums, by interval, then by group. Groups are split by currency where the price list's has changed."""
    parts = _sources(query)
    source = (union_all(*parts) if len(parts) > 1 else parts[0]).subquery()
    columns = source.c
    keys: list[ColumnElement[Any]] = [columns[name] for name in (*query.group_by, "currency")]
    interval = _interval(connection, columns["at"], query.bucket)
    if interval is not None:
        keys.insert(0, interval)
    totals = [func.sum(columns[name]).label(name) for name in ("requests", *ADDED)]
    statement = select(*keys, *totals).group_by(*keys).order_by(*keys).limit(query.limit).offset(query.offset)
    found = []
    for row in connection.execute(statement):
        values = list(row)
        start = _start(values.pop(0)) if interval is not None else None
        group = dict(zip(query.group_by, values, strict=False))
        currency = values[len(query.group_by)]
        sums = dict(zip(("requests", *ADDED), map(int, values[len(query.group_by) + 1 :]), strict=True))
        found.append(UsageSum(start, group, sums, sums.pop("cost_nanos"), currency))
    return found


def _sources(query: UsageQuery) -> Sequence[Select[Any]]:
    """Return what is added up: the hourly sums as far as they hold what is asked for, and single runs for the rest."""
    names = {*query.group_by, *query.filters}
    first, last = -(-query.start // HOUR_S) * HOUR_S, query.end // HOUR_S * HOUR_S
    if query.bucket == "minute" or not names <= set(HOURLY_DIMENSIONS) or first >= last:
        return [_runs(query, query.start, query.end)]
    at = usage_hours.c.hour
    hours = _filtered(
        select(at.label("at"), *_dimensions(query, usage_hours), *(usage_hours.c[n] for n in ("requests", *ADDED))),
        usage_hours,
        query,
    ).where(at >= first, at < last)
    edges = [_runs(query, start, end) for start, end in ((query.start, first), (last, query.end)) if start < end]
    return [hours, *edges]


def _runs(query: UsageQuery, start: int, end: int) -> Select[Any]:
    at = usage_runs.c.finished_ms
    one = literal(1).label("requests")
    chosen = select(
        (at // 1000).label("at"), *_dimensions(query, usage_runs), one, *(usage_runs.c[name] for name in ADDED)
    )
    return _filtered(chosen, usage_runs, query).where(at >= start * 1000, at < end * 1000)


def _dimensions(query: UsageQuery, table: Any) -> list[Any]:
    return [table.c[name] for name in (*query.group_by, "currency")]


def _filtered(statement: Select[Any], table: Any, query: UsageQuery) -> Select[Any]:
    for name, values in query.filters.items():
        statement = statement.where(table.c[name].in_(values))
    return statement


def _interval(connection: Connection, at: ColumnElement[Any], bucket: Bucket) -> ColumnElement[Any] | None:
    if not bucket:
        return None
    if bucket != "month":
        return (at - at % BUCKET_S[bucket]).label("interval")
    if connection.dialect.name == "postgresql":
        return func.to_char(func.to_timestamp(at).op("AT TIME ZONE")("UTC"), "YYYY-MM").label("interval")
    return func.strftime("%Y-%m", at, "unixepoch").label("interval")


def _start(interval: int | str) -> int:
    if isinstance(interval, str):
        return int(datetime.strptime(interval, "%Y-%m").replace(tzinfo=UTC).timestamp())
    return int(interval)


def delete_runs(connection: Connection, before_ms: int, limit: int) -> int:
    """Delete at most `limit` single runs that finished before `before_ms`; the hourly sums stay. Return their number."""
    key = tuple_(usage_runs.c.job, usage_runs.c.run)
    old = select(usage_runs.c.job, usage_runs.c.run).where(usage_runs.c.finished_ms < before_ms).limit(limit)
    return connection.execute(delete(usage_runs).where(key.in_(old))).rowcount
