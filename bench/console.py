"""What the console weighs, and how soon it is on the screen.

make bench ARGS="--scenario console"
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

from bench.report import table
from gateway.console.files import APP
from tests.cluster import Cluster
from tests.console.browser import chromium
from tests.console.site import Site

MAX_KB = 300
MAX_PAINT_MS = 1000
ROUNDS, QUICK_ROUNDS = 9, 3
PAINT = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
TRANSFERRED = "performance.getEntries().reduce((sum, one) => sum + (one.transferSize ?? 0), 0)"


async def first_paints(rounds: int) -> tuple[list[float], list[float]]:
    """Return, by round, the milliseconds until something of a screen is painted and the kB loaded; each with an empty cache."""
    paints, loads = [], []
    with tempfile.TemporaryDirectory(prefix="nexus-bench-") as folder:
        async with Cluster(Path(folder)) as cluster, chromium() as browser:
            await cluster.start_gateway()
            site = Site(cluster, browser, "")
            for _ in range(rounds):
                tab = await site.tab()
                await tab.open("services", heading="Services")
                paints.append(await tab.page.evaluate(PAINT))
                loads.append(await tab.page.evaluate(TRANSFERRED) / 1000)
                await site.close_tabs()
    return paints, loads


async def run(*, quick: bool) -> None:
    """Measure, and print a row for each figure."""
    size = sum(path.stat().st_size for path in APP.rglob("*.gz")) / 1000
    paints, loads = await first_paints(QUICK_ROUNDS if quick else ROUNDS)
    paint = statistics.median(paints)
    rows = [
        ["console", "figure", "target", "met"],
        ["all of it as gzip", f"{size:.0f} kB", f"<= {MAX_KB} kB", "yes" if size <= MAX_KB else "NO"],
        ["loaded for a first screen", f"{statistics.median(loads):.0f} kB", "", ""],
        ["first paint, median", f"{paint:.0f} ms", f"<= {MAX_PAINT_MS} ms", "yes" if paint <= MAX_PAINT_MS else "NO"],
        ["first paint, slowest", f"{max(paints):.0f} ms", "", ""],
    ]
    print(f"\n{table(rows)}")
