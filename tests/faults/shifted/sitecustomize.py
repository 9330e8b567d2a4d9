"""Found first on PYTHONPATH by a process whose host's clock shall be wrong: everything that asks for the time gets it so."""

import os
import sys
import time

_ahead = float(os.environ.get("NEXUS_TEST_CLOCK_AHEAD_S", "0"))
_time, _time_ns = time.time, time.time_ns


def _shifted() -> float:
    # gRPC compares what it asks Python with what it asks the kernel, whose clock is right here.
    outside = sys._getframe(1).f_globals.get("__name__", "").startswith("grpc")
    return _time() + (0.0 if outside else _ahead)


time.time = _shifted
time.time_ns = lambda: _time_ns() + int(_ahead * 1e9)
