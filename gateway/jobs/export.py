"""Writes jobs as JSON Lines or CSV, some hundred at a time."""

from __future__ import annotations

import csv
import io
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any

import orjson

from gateway.usage.report import FORMULA_STARTS
from schemas.jobs import JobRecord

JSON_LINES, CSV = "application/jsonl", "text/csv; charset=utf-8"
MAX_EXPORTED = 1_000_000

ToObject = Callable[[JobRecord], dict[str, Any]]


def pick(job: dict[str, Any], fields: Sequence[str]) -> dict[str, Any]:
    """Return these fields of a job object, null where it lacks one. No fields: the whole object."""
    return {name: job.get(name) for name in fields} if fields else job


async def json_lines(
    pages: AsyncGenerator[list[JobRecord], None], to_object: ToObject, fields: Sequence[str]
) -> AsyncGenerator[bytes, None]:
    """Yield one line per job."""
    async with aclosing(pages):
        async for records in pages:
            yield b"".join(orjson.dumps(pick(to_object(record), fields)) + b"\n" for record in records)


async def csv_table(
    pages: AsyncGenerator[list[JobRecord], None], to_object: ToObject, fields: Sequence[str]
) -> AsyncGenerator[bytes, None]:
    """Yield a table (RFC 4180) with a head. Objects and lists are cells of JSON."""
    async with aclosing(pages):
        yield _lines([fields])
        async for records in pages:
            yield _lines([[_cell(value) for value in pick(to_object(record), fields).values()] for record in records])


def _lines(rows: Sequence[Sequence[Any]]) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()


def _cell(value: Any) -> Any:
    """Return a cell that no spreadsheet takes for a formula."""
    if isinstance(value, dict | list):
        return orjson.dumps(value).decode()
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str) and value.startswith(FORMULA_STARTS):
        return f"'{value}"
    return value
