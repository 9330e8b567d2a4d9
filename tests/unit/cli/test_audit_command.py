"""`nexus audit`, with a double of a gateway."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from typer.testing import CliRunner, Result

from cli import options
from cli.app import app
from cli.gateway_client import ApiClient, GatewayTarget
from tests.unit.cli.gateway_double import serve

EVENT: dict[str, Any] = {
    "created_at": 1_793_491_200.5, "actor": {"type": "api_key", "team": "ops", "key": "key_1", "person": None}, "action": "key.change",
    "target": {"type": "key", "id": "key_2", "team": "red"}, "address": "192.0.2.7", "result": "success", "error": None, "count": 3,
    "changes": {"max_open": {"old": 3, "new": 5}},
}  # fmt: skip


class Gateway:
    """Records the paths, and returns one event."""

    def __init__(self) -> None:
        self.paths: list[str] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.paths.append(request.url.raw_path.decode())
        if "/export" in self.paths[-1]:
            return httpx.Response(200, content=b'{"sequence":8}\n')
        return httpx.Response(200, json={"data": [EVENT], "has_more": False})


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> Gateway:
    gateway = Gateway()
    monkeypatch.setattr(options, "client", lambda *_: ApiClient(GatewayTarget(serve(gateway), "sk")))
    return gateway


def run(*arguments: str, columns: int = 200) -> Result:
    return CliRunner().invoke(app, ["audit", *arguments], env={"COLUMNS": str(columns)})


def test_a_table(gateway: Gateway) -> None:
    """Who, what, on what, from where, with which result and changes; filters are in the query."""
    out = run("key.*", "--where", "result=success", "-n", "5").stdout
    assert gateway.paths == ["/v1/audit?action=key.%2A&result=success&limit=5"]
    for text in ("2026-11-01", "ops key_1", "key.change x3", "key_2", "192.0.2.7", "success", "max_open: 3 → 5"):
        assert text in out, out


def test_a_narrow_terminal(gateway: Gateway) -> None:
    """The same, below each other, without a word that is cut in two."""
    lines = run(columns=80).stdout.splitlines()
    assert [line.rstrip() for line in lines] == [
        "time                  event",
        "2026-11-01 00:00:00   key.change x3: success",
        "                      by ops key_1",
        "                      on key_2",
        "                      from 192.0.2.7",
        "                      max_open: 3 → 5",
    ]


def test_an_export(gateway: Gateway) -> None:
    """The lines as they come, behind a sequence; which has no meaning without --export."""
    assert run("--export", "--after", "7").stdout == '{"sequence":8}\n'
    assert gateway.paths == ["/v1/audit/export?after=7"]
    assert run("--after", "7").exit_code != 0
