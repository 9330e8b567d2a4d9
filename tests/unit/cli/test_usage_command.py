"""`nexus usage`, with a double of a gateway."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner, Result

from cli import options
from cli.app import app
from cli.gateway_client import ApiClient, GatewayTarget
from tests.unit.cli.gateway_double import serve

ROW: dict[str, Any] = {
    "model": "smollm2", "requests": 1200, "input_tokens": 34567, "output_tokens": 8, "cached_tokens": 0, "reasoning_tokens": 0, "images": 0,
    "audio_seconds": 0.0, "characters": 0, "bytes_in": 1, "bytes_out": 1, "queue_seconds": 0.5, "run_seconds": 2.0, "slot_seconds": 2.4,
    "cost": {"value": 1.25, "currency": "usd"},
}  # fmt: skip


class Gateway:
    """Records the paths, and returns the configured answer."""

    def __init__(self) -> None:
        self.answer: dict[str, Any] = {"bucket": None, "group_by": ["model"], "data": [ROW], "has_more": False}
        self.paths: list[str] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.paths.append(request.url.raw_path.decode())
        if "format=csv" in self.paths[-1]:
            return httpx.Response(200, content=b"model,requests\r\nsmollm2,1200\r\n")
        return httpx.Response(200, json=self.answer)


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> Gateway:
    gateway = Gateway()
    monkeypatch.setattr(options, "client", lambda *_: ApiClient(GatewayTarget(serve(gateway), "sk")))
    return gateway


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["usage", *arguments])


def test_a_table(gateway: Gateway) -> None:
    """A line for each group; measures that are all zero are left out; intervals are times."""
    lines = [line.split() for line in run().stdout.splitlines()]
    assert lines[0] == ["model", "requests", "tokens", "in", "out", "slot", "s", "cost"]
    assert lines[1] == ["smollm2", "1,200", "34,567", "8", "2", "1.2500", "usd"]
    assert gateway.paths == ["/v1/usage?group_by=model"]
    gateway.answer |= {"bucket": "day", "data": [ROW | {"start": 1_793_491_200, "cost": None}], "has_more": True}
    out = run("--bucket", "day").stdout
    assert "2026-11-01 00:00" in out
    assert "--csv" in out
    gateway.answer["data"] = []
    assert "Nothing was used" in run().stdout


def test_what_is_asked(gateway: Gateway) -> None:
    """Options become the query's parameters; `--json` and `--csv` print the answer as it is."""
    answer = run("--by", "team,key", "--start", "2026-11-01", "--where", "model=a", "--where", "model=b c", "--json")
    assert json.loads(answer.stdout) == gateway.answer
    assert run("--csv").stdout.replace("\r", "") == "model,requests\nsmollm2,1200\n"
    assert gateway.paths == [
        "/v1/usage?group_by=team%2Ckey&start=2026-11-01&model=a&model=b+c",
        "/v1/usage?group_by=model&format=csv&limit=10000",
    ]
    assert run("--where", "model").exit_code != 0
