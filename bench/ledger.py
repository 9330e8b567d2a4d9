"""Fill a ledger with a million requests of a month, and measure its questions: `python -m bench.ledger [--rows N] [--url URL]`."""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
import time
from pathlib import Path

from backbone.ledger.access import LedgerAccess
from backbone.ledger.database import LedgerDatabase
from backbone.ledger.usage_ledger import UsageLedger
from backbone.ledger.usage_query import Bucket, PricedEvent, UsageQuery
from schemas.usage import UsageEvent

MONTH_S = 30 * 86_400
BEGAN = 1_793_491_200
BATCH = 5000
TEAMS, KEYS, MODELS, WORKERS = 20, 40, 8, 12
TARGET_S = 1.0


def make_event(number: int, rows: int, luck: random.Random) -> PricedEvent:
    """Return one request; requests are spread over a month, by teams of very different sizes."""
    key = min(int(luck.expovariate(4 / KEYS)), KEYS - 1)
    model = min(int(luck.expovariate(4 / MODELS)), MODELS - 1)
    event = UsageEvent.model_construct(
        **{name: field.default for name, field in UsageEvent.model_fields.items() if not field.is_required()},
        job=f"job_{number:032x}", run=1, finished_ms=1000 * BEGAN + 1000 * MONTH_S * number // rows,
        team=f"team-{key * TEAMS // KEYS}", model=f"model-{model}", public_model=f"model-{model}",
        endpoint="/v1/chat/completions", capability="chat", lane="default",
        status="completed" if luck.random() < 0.98 else "failed",
    ).model_copy(update={"key": f"key_{key}", "worker": f"w{luck.randrange(WORKERS)}", "input_tokens": 900, "output_tokens": 200})  # fmt: skip
    return PricedEvent(event, 255_000, "usd")


async def main(rows: int, url: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        access = LedgerAccess(postgresql_url=url) if url else LedgerAccess(sqlite_file=Path(folder) / "ledger.db")
        ledger, luck = UsageLedger(LedgerDatabase(access)), random.Random(1)
        began = time.perf_counter()
        for first in range(0, rows, BATCH):
            await ledger.store([make_event(number, rows, luck) for number in range(first, min(first + BATCH, rows))])
        seconds = time.perf_counter() - began
        print(
            f"{'PostgreSQL' if url else 'SQLite'}: {rows:,} rows in {seconds:.0f} s, {1e6 * seconds / rows:.0f} µs a row"
        )
        whole = (BEGAN, BEGAN + MONTH_S)
        questions: list[tuple[str, int, int, Bucket, tuple[str, ...]]] = [
            ("a month by team and model", *whole, "month", ("team", "model")),
            ("a month by day, team and model", *whole, "day", ("team", "model")),
            ("30 days that cut hours, by key", BEGAN + 1000, BEGAN + MONTH_S - 1000, "", ("key",)),
            ("a month by worker, from single rows", *whole, "", ("worker",)),
            ("an hour by minute, from single rows", BEGAN + 7200, BEGAN + 10_800, "minute", ()),
        ]
        for title, start, end, bucket, group_by in questions:
            times, found = [], 0
            for _ in range(3):
                began = time.perf_counter()
                found = len(await ledger.add_up(UsageQuery(start, end, bucket, group_by, limit=10_000)))
                times.append(time.perf_counter() - began)
            print(f"  {title}: {found} rows, {min(times):.3f} s")
        await ledger.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--url", default="", help="PostgreSQL; empty: a SQLite file")
    arguments = parser.parse_args()
    asyncio.run(main(arguments.rows, arguments.url))
