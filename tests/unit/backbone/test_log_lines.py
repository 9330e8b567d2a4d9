"""The cheap lines of requests and attempts are structlog's lines."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

PROGRAM = """
import sys
import structlog
from backbone.logging import configure_logging, log_info
configure_logging(sys.argv[1], sys.argv[2])
structlog.contextvars.bind_contextvars(worker="w1", status=0)
fields = {"request_id": "req_1", "seconds": 0.5, "status": 200, "kind": None, "text": "é", "path": __import__("pathlib").Path("x")}
structlog.get_logger("x").info("request.finished", **fields)
log_info("request.finished", fields)
"""


def lines(log_format: str, level: str) -> list[str]:
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM, log_format, level], capture_output=True, text=True, check=True, timeout=60
    )
    return found.stdout.splitlines()


def test_both_lines_are_the_same() -> None:
    """The same keys, values and form; the lines are written before the process ends."""
    slow, fast = (json.loads(line) for line in lines("json", "info"))
    assert slow.pop("timestamp")[:16] == fast["timestamp"][:16]
    assert fast.pop("timestamp").endswith("Z")
    assert fast == slow
    assert fast["worker"] == "w1"


@pytest.mark.parametrize(
    ("log_format", "level", "count"), [("json", "warning", 0), ("json", "debug", 2), ("console", "info", 2)]
)
def test_level_and_format_are_respected(log_format: str, level: str, count: int) -> None:
    """A higher level writes no line; on a terminal both are sentences."""
    found: list[Any] = lines(log_format, level)
    assert len(found) == count
