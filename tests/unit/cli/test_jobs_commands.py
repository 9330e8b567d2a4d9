"""`nexus jobs` and `nexus dlq`: their requests to the gateway and their output."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner, Result

from cli import options
from cli.app import app
from cli.gateway_client import ApiClient, GatewayTarget
from tests.unit.cli.gateway_double import serve

Answer = Callable[[httpx.Request], Any]


class Gateway:
    """Answers by method and path."""

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {}
        self.requests: list[str] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path
        self.requests.append(f"{request.method} {request.url.raw_path.decode()}")
        answer = self.answers.get(f"{request.method} {path}")
        if answer is None:
            return httpx.Response(404, json={"error": {"message": f"no {path}", "code": "job_not_found"}})
        return httpx.Response(200, json=answer(request) if callable(answer) else answer)


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> Gateway:
    monkeypatch.setenv("COLUMNS", "200")
    gateway = Gateway()
    monkeypatch.setattr(options, "client", lambda *_: ApiClient(GatewayTarget(serve(gateway), "sk")))
    return gateway


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def job(number: int = 1, **fields: Any) -> dict[str, Any]:
    return {
        "id": f"job_{number}",
        "object": "job",
        "endpoint": "/v1/chat/completions",
        "model": "m",
        "service_tier": "default",
        "status": "completed",
        "created_at": int(time.time()) - 90,
        "error": None,
        "metadata": {},
        **fields,
    }


def pages(rows: list[dict[str, Any]], key: str = "after", by: str = "id") -> Answer:
    """As `/v1/jobs` and `/v1/dlq` page."""

    def answer(request: httpx.Request) -> dict[str, Any]:
        after, limit = request.url.params.get(key), int(request.url.params["limit"])
        start = next((n + 1 for n, row in enumerate(rows) if str(row[by]) == after), 0)
        page = rows[start : start + limit]
        more = start + limit < len(rows)
        return {"object": "list", "data": page, "has_more": more, "next_after": page[-1]["id"] if more else None}

    return answer


class TestList:
    def test_one_line_each(self, gateway: Gateway):
        """With what matters about each."""
        gateway.answers["GET /v1/jobs"] = pages(
            [
                job(1, status="in_progress", progress=0.4),
                job(2, status="failed", error={"message": "the model burnt"}),
                job(3, status="queued", queue_position=2),
            ]
        )
        head, *lines = [line.split() for line in run("jobs", "list").stdout.splitlines()]
        assert head == ["job", "age", "endpoint", "model", "lane", "status"]
        assert lines[0] == ["job_1", "2", "min", "/v1/chat/completions", "m", "default", "in_progress", "40%"]
        assert lines[1][-4:] == ["failed", "the", "model", "burnt"]
        assert lines[2][-4:] == ["queued", "2", "before", "it"]

    def test_none(self, gateway: Gateway):
        """Says how to make one."""
        gateway.answers["GET /v1/jobs"] = pages([])
        assert "nexus submit" in run("jobs", "list").stdout

    def test_filters(self, gateway: Gateway):
        """Go to the gateway."""
        gateway.answers["GET /v1/jobs"] = pages([])
        run("jobs", "list", "--status", "failed", "-m", "a/b", "--metadata", "team=x y", "-n", "5")
        assert gateway.requests == ["GET /v1/jobs?status=failed&model=a%2Fb&metadata%5Bteam%5D=x+y&limit=5"]

    @pytest.mark.parametrize(("arguments", "count"), [(["-n", "150"], 150), (["--all"], 205), ([], 20)])
    def test_pages(self, gateway: Gateway, arguments: list[str], count: int):
        """As many as are wanted, whatever a page holds."""
        gateway.answers["GET /v1/jobs"] = pages([job(number) for number in range(205)])
        found = json.loads(run("jobs", "list", "--json", *arguments).stdout)
        assert [row["id"] for row in found["data"]] == [f"job_{number}" for number in range(count)]
        assert found["has_more"] is (count < 205)


class TestOne:
    def test_show(self, gateway: Gateway):
        """All fields of the job, and the deliveries to its webhook."""
        webhook = {
            "url": "https://h.example/",
            "state": "delivered",
            "deliveries": [{"at": 1, "attempt": 1, "status": 200, "error": None}],
        }
        gateway.answers["GET /v1/jobs/job_1"] = job(metadata={"team": "a"}, webhook=webhook)
        shown = run("jobs", "show", "job_1").stdout
        lines = [line.split() for line in shown.splitlines()]
        assert ["status", "completed"] in lines
        assert ["metadata", "team:", "a"] in lines
        assert ["state:", "delivered"] in lines
        assert '"status": 200' in shown
        assert "None" not in shown
        assert json.loads(run("jobs", "show", "job_1", "--json").stdout)["webhook"] == webhook

    def test_cancel_and_retry(self, gateway: Gateway):
        """A line for each; one that fails stops no other, and the command ends with 1."""
        gateway.answers["POST /v1/jobs/job_1/cancel"] = job(1, status="cancelled")
        gateway.answers["POST /v1/jobs/job_3/cancel"] = job(3)
        result = run("jobs", "cancel", "job_1", "job_2", "job_3")
        assert result.stdout == "job_1: cancelled\njob_3: completed\n"
        assert "job_2" in result.stderr
        assert result.exit_code == 1
        gateway.answers["POST /v1/jobs/job_1/retry"] = job(1, status="queued")
        result = run("jobs", "retry", "job_1", "--json")
        assert json.loads(result.stdout)["status"] == "queued"
        assert result.exit_code == 0

    def test_odd_ids_stay_ids(self, gateway: Gateway):
        """No other path is requested."""
        run("jobs", "cancel", "../keys?x=1")
        assert gateway.requests == ["POST /v1/jobs/..%2Fkeys%3Fx%3D1/cancel"]


def letter(number: int, **fields: Any) -> dict[str, Any]:
    return {
        "id": f"job_{number}",
        "object": "dead_letter",
        "seq": 1000 - number,
        "endpoint": "/v1/chat/completions",
        "model": "m",
        "owner": "acme",
        "attempts": 3,
        "dead_at": int(time.time()) - 7200,
        "error": {"message": "three workers died"},
        **fields,
    }


class TestDeadLetters:
    def test_list(self, gateway: Gateway):
        """One line each; or none."""
        gateway.answers["GET /v1/dlq"] = pages([letter(1)], "before", "seq")
        line = run("dlq", "list").stdout.splitlines()[1].split()
        assert line == ["job_1", "2", "h", "/v1/chat/completions", "m", "acme", "3", "three", "workers", "died"]
        assert json.loads(run("dlq", "list", "--json").stdout)["data"][0]["seq"] == 999
        gateway.answers["GET /v1/dlq"] = pages([], "before", "seq")
        assert run("dlq", "list").stdout == "There are no dead letters.\n"

    def test_show(self, gateway: Gateway):
        """With the request."""
        gateway.answers["GET /v1/dlq/job_1"] = letter(1, request={"model": "m", "messages": []})
        shown = run("dlq", "show", "job_1").stdout
        assert "three workers died" in shown
        assert ["request", "model:", "m"] in [line.split() for line in shown.splitlines()]

    def test_replay_some(self, gateway: Gateway):
        """Each under its id."""
        gateway.answers["POST /v1/dlq/job_1/replay"] = job(1, status="queued")
        result = run("dlq", "replay", "job_1", "job_2")
        assert (result.stdout, result.exit_code) == ("job_1: queued\n", 1)

    def test_replay_all(self, gateway: Gateway):
        """Over all pages, each job once."""
        letters = [letter(number) for number in range(120)] + [letter(5, seq=1)]
        gateway.answers["GET /v1/dlq"] = pages(letters, "before", "seq")
        for number in range(120):
            gateway.answers[f"POST /v1/dlq/job_{number}/replay"] = job(number, status="queued")
        result = run("dlq", "replay", "--all")
        assert result.exit_code == 0
        assert sorted(result.stdout.split("\n")) == sorted(["", *(f"job_{number}: queued" for number in range(120))])

    @pytest.mark.parametrize("arguments", [[], ["job_1", "--all"]])
    def test_replay_needs_either_ids_or_all(self, gateway: Gateway, arguments: list[str]):
        """A wrong line."""
        assert run("dlq", "replay", *arguments).exit_code == 2
        assert gateway.requests == []

    def test_delete(self, gateway: Gateway):
        """Says so."""
        gateway.answers["DELETE /v1/dlq/job_1"] = {"id": "job_1", "object": "dead_letter", "deleted": True}
        assert run("dlq", "delete", "job_1").stdout == "job_1: deleted\n"
