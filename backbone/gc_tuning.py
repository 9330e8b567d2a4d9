"""How a long-running process keeps its garbage collector out of the way."""

from __future__ import annotations

import gc


def tune_garbage_collector() -> None:
    """Call once everything is set up.

    What exists now lives as long as the process: it is taken out of collection, which makes a full
    one cheap. Requests make few cycles, so that the youngest generation is looked at less often: with Python's defaults
    the collector took a tenth of the gateway's time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(5_000, 10, 5)
