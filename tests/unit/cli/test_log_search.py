"""`nexus logs req_…`, with a double of a gateway."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from typer.testing import CliRunner, Result

from cli import options
from cli.app import app
from cli.gateway_client import ApiClient, GatewayTarget
from tests.unit.cli.gateway_double import serve


def process(name: str, kind: str = "worker", **fields: Any) -> dict[str, Any]:
    whole = {"answered": True, "lines": 1, "oldest_at": "2026-11-30T14:00:00Z", "is_complete": True, "has_more": False}
    return {"id": name, "kind": kind} | whole | fields


LINE = {
    "process": "gpu1", "kind": "worker", "timestamp": "2026-11-30T15:00:00Z", "level": "info", "event": "attempt.finished",
    "fields": {"job": "job_1", "seconds": 0.5, "error": "no \x1b[2Jroom"},
}  # fmt: skip
ANSWER = {
    "data": [LINE | {"process": "a1", "event": "request\x9bfinished"}, LINE],
    "has_more": True,
    "processes": [
        process("a1", "gateway"),
        process("gpu1"),
        process("gpu2", lines=0, is_complete=False),
        process("gpu3", answered=False, lines=0, oldest_at=None, is_complete=None, has_more=None),
    ],
}


class Gateway:
    """Records the paths, and returns one answer."""

    def __init__(self) -> None:
        self.paths: list[str] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.paths.append(request.url.raw_path.decode())
        return httpx.Response(200, json=ANSWER)


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> Gateway:
    gateway = Gateway()
    monkeypatch.setattr(options, "client", lambda *_: ApiClient(GatewayTarget(serve(gateway), "sk")))
    return gateway


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["logs", *arguments])


def test_lines_and_what_is_missing(gateway: Gateway) -> None:
    """A line each, without control characters of a worker; which processes did not answer, or reach back too little."""
    result = run("req_1", "-n", "5")
    assert gateway.paths == ["/v1/logs?id=req_1&limit=5"]
    tail = 'job=job_1 seconds=0.5 error="no \\u001b[2Jroom"'
    assert result.stdout.splitlines() == [
        f"2026-11-30T15:00:00Z a1   info    request\\x9bfinished {tail}",
        f"2026-11-30T15:00:00Z gpu1 info    attempt.finished {tail}",
    ]
    assert result.stderr.splitlines() == [
        "nexus: worker gpu2 has no line about it; its lines reach back to 2026-11-30T14:00:00Z.",
        "nexus: worker gpu3 did not answer: its lines are missing.",
        "nexus: older lines were left out.",
        "nexus: 3 of 4 processes answered.",
    ]


def test_json(gateway: Gateway) -> None:
    """The gateway's answer as it is."""
    assert httpx.Response(200, text=run("job_1", "--json").stdout).json() == ANSWER
    assert gateway.paths == ["/v1/logs?id=job_1&limit=1000"]


def test_an_id_cannot_be_followed(gateway: Gateway) -> None:
    """It is an error, not a command that never ends."""
    assert run("req_1", "-f").exit_code == 2
    assert gateway.paths == []
