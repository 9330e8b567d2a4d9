"""Reduces the cost of garbage collection in a long-running process."""

from __future__ import annotations

import gc


def tune_garbage_collector() -> None:
    """Tune the garbage collector; call it once everything is set up.

    Objects that exist now live as long as the process: they are excluded from collection, which makes a full one cheap.
    Requests make few cycles, so that the youngest generation is collected less often: with Python's defaults the collector took
    a tenth of the gateway's time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(5_000, 10, 5)
