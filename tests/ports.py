"""Ports for what tests start."""

from __future__ import annotations

import itertools
import os
import random
import socket
from collections.abc import Iterator
from contextlib import suppress


def _ports() -> Iterator[int]:
    """Ports below those that the system gives out by itself, in a range of this process's own among those of one test run."""
    place = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 8
    first = 12_000 + 2_000 * place
    offset = random.randrange(2_000)
    # Several gateway processes take the ports behind the one they are given.
    return (first + (offset + 8 * n) % 2_000 for n in itertools.count())


_next_ports = _ports()


def free_port() -> int:
    """A port that was free a moment ago, and that no other test of this run is given."""
    for port in _next_ports:
        with socket.socket() as probe, suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("unreachable")
