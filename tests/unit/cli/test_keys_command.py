"""`nexus keys`, with a double of a gateway."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner, Result

from cli import options
from cli.app import app
from cli.errors import ConsoleError
from cli.gateway_client import ApiClient, GatewayTarget
from cli.keys import KeyScopeOption
from cli.limits import LIMITS, parse_bytes, parse_duration
from gateway.auth.authenticator import Authenticator
from schemas import keys
from tests.unit.cli.gateway_double import serve

ROW = {
    "id": "key_1",
    "object": "api_key",
    "name": "alice",
    "owner": "team",
    "scopes": ["inference", "jobs"],
    "max_queued": 5,
    "max_running": None,
    "created_at": 1_800_000_000,
    "expires_at": 1_900_000_000,
    "status": "active",
    "hint": "abcd",
}
MADE = ROW | {"key": "nexus-secret", "webhook_secret": "whsec_x"}


class Gateway:
    """Records the requests, and returns the configured answer."""

    def __init__(self) -> None:
        self.answer: dict[str, Any] = {}
        self.requests: list[tuple[str, str, Any]] = []

    @property
    def last(self) -> Any:
        return self.requests[-1]

    def __call__(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content) if request.content else None
        self.requests.append((request.method, request.url.raw_path.decode(), body))
        return httpx.Response(200, json=self.answer)


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> Gateway:
    gateway = Gateway()
    monkeypatch.setattr(options, "client", lambda *_: ApiClient(GatewayTarget(serve(gateway), "sk")))
    return gateway


def run(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, arguments)


def test_a_key_is_made_and_printed_once(gateway: Gateway) -> None:
    """With a line that says so; or the whole answer as JSON."""
    gateway.answer = MADE
    out = run("keys", "create", "alice").stdout
    assert out.count("nexus-secret") == 1
    assert "whsec_x" in out
    assert "cannot be shown again" in out
    assert json.loads(run("keys", "create", "alice", "--json").stdout) == MADE
    assert gateway.requests == [("POST", "/v1/keys", {"name": "alice"})] * 2


def test_every_option_is_sent(gateway: Gateway) -> None:
    """Owner, several scopes, limits, and the time until it ends."""
    gateway.answer = MADE
    line = "keys create ci --owner team --scope inference --scope admin --max-queued 0 --max-running 2 --expires 30d"
    assert run(*line.split()).exit_code == 0
    assert gateway.requests == [
        (
            "POST",
            "/v1/keys",
            {
                "name": "ci",
                "owner": "team",
                "scopes": ["inference", "admin"],
                "max_queued": 0,
                "max_running": 2,
                "expires_in": 30 * 86_400,
            },
        )
    ]


@pytest.mark.parametrize("command", [("keys",), ("keys", "list")])
def test_keys_are_listed(gateway: Gateway, command: tuple[str, ...]) -> None:
    """One line each, without the key; or the answer as JSON."""
    gateway.answer = {"object": "list", "data": [ROW, ROW | {"id": "key_2", "expires_at": None, "status": "expired"}]}
    lines = [line.split() for line in run(*command).stdout.splitlines()]
    assert lines[1] == [
        "key_1",
        "alice",
        "team",
        "…abcd",
        "inference,",
        "jobs",
        "5",
        "-",
        "-",
        "2030-03-17",
        "17:46Z",
        "active",
    ]
    assert lines[2] == ["key_2", "alice", "team", "…abcd", "inference,", "jobs", "5", "-", "-", "never", "expired"]
    assert json.loads(run(*command, "--json").stdout) == gateway.answer
    gateway.answer["data"] = []
    assert "nexus keys create" in run(*command).stdout


def test_a_key_is_revoked(gateway: Gateway) -> None:
    """By its id, or by its name; an id that is not listed is the gateway's to judge."""
    gateway.answer = {"data": [ROW, ROW | {"id": "key_2", "name": "key_1"}, ROW | {"id": "key_3", "name": "bob/ci"}]}
    assert run("keys", "revoke", "key_1").stdout == "key_1 (alice): revoked\n"
    assert run("keys", "revoke", "alice").stdout == "key_1 (alice): revoked\n"
    assert run("keys", "revoke", "bob/ci").stdout == "key_3 (bob/ci): revoked\n"
    assert run("keys", "revoke", "key_9/x").stdout == "key_9/x: revoked\n"
    assert json.loads(run("keys", "revoke", "alice", "--json").stdout) == gateway.answer
    revoked = [path for method, path, _ in gateway.requests if method == "DELETE"]
    assert revoked == [f"/v1/keys/{one}" for one in ("key_1", "key_1", "key_3", "key_9%2Fx", "key_1")]


def test_a_name_that_does_not_say_which_key_revokes_none(gateway: Gateway) -> None:
    """Several keys with the name are listed with their ids; for an unknown name, a similar one is suggested."""
    gateway.answer = {"data": [ROW, ROW | {"id": "key_2", "owner": "other"}]}
    for name, expected in (
        ("alice", r"2 keys .*\n  key_1  owner team.*\n  key_2  owner other"),
        ("alcie", "Did you mean 'alice'"),
    ):
        with pytest.raises(ConsoleError, match=expected):
            CliRunner().invoke(app, ("keys", "revoke", name), catch_exceptions=False)
    assert {method for method, _, _ in gateway.requests} == {"GET"}


def test_the_bootstrap_keys_webhook_secret(gateway: Gateway) -> None:
    """Made from the key alone, as gateways make it; of a created key it cannot be."""
    secret = Authenticator("sk-boot").webhook_secret("")
    assert run("keys", "webhook-secret", "--key", "sk-boot").stdout == f"{secret}\n"
    assert json.loads(run("keys", "webhook-secret", "--key", "sk-boot", "--json").stdout) == {"webhook_secret": secret}
    with pytest.raises(ConsoleError, match="nexus keys create"):
        CliRunner().invoke(app, ("keys", "webhook-secret", "--key", "nexus-" + "x" * 43), catch_exceptions=False)
    assert gateway.requests == []


@pytest.mark.parametrize(
    ("text", "value"), [("90s", 90), ("45m", 2700), ("12H", 43_200), ("30d", 2_592_000), (" 2w", 1_209_600)]
)
def test_durations(text: str, value: int) -> None:
    """With a unit."""
    assert parse_duration(text) == value


@pytest.mark.parametrize(
    "arguments",
    [
        ("create",),
        ("create", "x", "--scope", "root"),
        ("create", "x", "--max-running", "0"),
        *(("create", "x", "--expires", text) for text in ("30", "d", "0d", "-1d", "1y", "1.5h", "")),
        ("revoke",),
        ("--json", "revoke", "x"),
        ("frobnicate",),
    ],
)
def test_an_invalid_command_line_sends_nothing(gateway: Gateway, arguments: tuple[str, ...]) -> None:
    """It says what is wrong with it."""
    assert run("keys", *arguments).exit_code == 2
    assert gateway.requests == []


def test_scopes_are_those_of_the_gateway() -> None:
    """The console has them on its own, so that its help needs no pydantic."""
    assert [(one.name, one.value) for one in KeyScopeOption] == [(one.name, one.value) for one in keys.Scope]


def test_limits_are_set_and_removed(gateway: Gateway) -> None:
    """For a key by its name, and for a team; what is left out is not sent."""
    gateway.answer = {"object": "list", "data": [ROW]} | ROW
    line = "keys set alice --model llama* --max-stored-bytes 2G --network 10.0.0.0/8 --unset max-queued --unset expires"
    assert run(*line.split()).exit_code == 0
    limits: dict[str, Any] = {"models": ["llama*"], "max_stored_bytes": 2 * 1024**3, "networks": ["10.0.0.0/8"]}
    assert gateway.last == ("PATCH", "/v1/keys/key_1", limits | {"max_queued": None, "expires_at": None})
    gateway.answer = {"id": "a/b", "max_open": 3}
    assert run("teams", "set", "a/b", "--max-open", "3").exit_code == 0
    assert gateway.last == ("PATCH", "/v1/teams/a%2Fb", {"max_open": 3})
    assert run("teams", "create", "new", "--lane", "flex").exit_code == 0
    assert gateway.last == ("POST", "/v1/teams", {"id": "new", "lanes": ["flex"]})
    for wrong in ("keys set alice", "keys set alice --unset speed", "teams set a --max-stored-bytes lots"):
        assert run(*wrong.split()).exit_code != 0


def test_a_key_is_rotated(gateway: Gateway) -> None:
    gateway.answer = {"object": "list", "data": [ROW]} | MADE | {"id": "key_1"}
    assert "nexus-secret" in run("keys", "rotate", "alice", "--overlap", "1h").stdout
    assert gateway.last == ("POST", "/v1/keys/key_1/rotate", {"overlap_s": 3600})


def test_options_and_record_have_the_same_limits() -> None:
    assert tuple(keys.AccessLimits.model_fields) == LIMITS
    assert (parse_bytes("500000"), parse_bytes("2G"), parse_bytes("10kb")) == (500_000, 2 * 1024**3, 10_240)


def test_a_revoked_key_takes_its_jobs_along(gateway: Gateway) -> None:
    gateway.answer = {"object": "list", "data": [ROW], "deleted": True}
    assert run("keys", "revoke", "alice", "--jobs", "cancel").exit_code == 0
    assert gateway.last[:2] == ("DELETE", "/v1/keys/key_1?jobs=cancel")


def test_budgets_are_written_as_one_option_each(gateway: Gateway) -> None:
    """Amount, period and the share of the warning; nonsense is named. A new webhook's secret is printed once."""
    gateway.answer = {"id": "t", "budgets": [{"unit": "cost", "amount": 9.5, "period": "week", "warn_at": 0.8}]}
    gateway.answer["webhook_secret"] = "whsec_x"
    line = "teams set t --budget tokens=5000/month --budget cost=9.5/week@0.8 --budget-webhook https://x.example/ --expires 1d"
    out = run(*line.split()).stdout
    assert "budgets: cost=9.5/week@0.8" in out
    assert "whsec_x" in out
    _, _, body = gateway.last
    assert body["budgets"] == [
        {"unit": "tokens", "amount": 5000, "period": "month"},
        {"unit": "cost", "amount": 9.5, "period": "week", "warn_at": 0.8},
    ]
    assert (body["budget_webhook"], body["expires_in"]) == ("https://x.example/", 86_400)
    run("keys", "create", "k", "--budget", "slot_seconds=60/day", "--max-open", "3")
    assert gateway.last[2] == {
        "name": "k",
        "max_open": 3,
        "budgets": [{"unit": "slot_seconds", "amount": 60, "period": "day"}],
    }
    run("teams", "set", "t", "--unset", "budget")
    assert gateway.last[2] == {"budgets": None}
    for nonsense in ("5000", "tokens=5000", "tokens=x/day", "apples=5/day", "tokens=5/year", "cost=5/day@.8.1"):
        assert run("teams", "set", "t", "--budget", nonsense).exit_code == 2


def test_what_is_left_of_budgets(gateway: Gateway) -> None:
    """A line for each budget, over all pages."""
    row = {"holder": "team", "holder_id": "red", "unit": "tokens", "currency": None, "period": "day", "amount": 10_000}
    row |= {"spent": 1234, "reserved": 0, "left": 8766, "renews_at": 1_796_083_200}
    gateway.answer = {"data": [row], "has_more": False, "next_after": None}
    lines = [line.split() for line in run("budgets").stdout.splitlines()]
    assert lines[1] == ["team", "red", "tokens", "day", "10,000", "1,234", "0", "8,766", "2026-12-01", "00:00Z"]
    assert json.loads(run("budgets", "--json").stdout)["data"] == [row]
    gateway.answer["data"] = []
    assert "no budgets" in run("budgets").stdout
