"""`nexus people` and `nexus login`, with a double of a gateway."""

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

ANN = {
    "id": "person_1",
    "name": "Ann",
    "email": "ann@example.com",
    "subject": "a-1",
    "role": "member",
    "team": "vision",
    "status": "active",
    "signed_in_at": 1_800_000_000,
}
BEN = ANN | {"id": "person_2", "email": "ben@example.com", "subject": "b-2", "role": None}
LINK = {"url": "http://127.0.0.1:8800/auth/link?token=x", "expires_at": 1_800_000_000}


class Gateway:
    """Records the changes, and answers lists with two people of one name."""

    def __init__(self) -> None:
        self.changes: list[tuple[str, str, Any]] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            return httpx.Response(200, json={"object": "list", "data": [ANN, BEN]})
        body = json.loads(request.content) if request.content else None
        self.changes.append((request.method, request.url.path, body))
        return httpx.Response(200, json=LINK if request.url.path.endswith("links") else ANN)


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> Gateway:
    gateway = Gateway()
    monkeypatch.setattr(options, "client", lambda *_: ApiClient(GatewayTarget(serve(gateway), "sk")))
    return gateway


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def test_people_are_listed(gateway: Gateway) -> None:
    output = run("people").output
    assert "ben@example.com" in output
    assert "none" in output


@pytest.mark.parametrize(
    ("options", "body"),
    [
        (["--role", "operator", "--team", "art"], {"role": "operator", "team": "art"}),
        (["--role", "groups", "--team", "groups"], {"role": None, "team": None}),
        (["--disable", "--revoke-keys"], {"disabled": True, "keys": "revoke"}),
        (["--enable"], {"disabled": False}),
    ],
)
def test_a_person_is_changed(gateway: Gateway, options: list[str], body: dict[str, Any]) -> None:
    result = run("people", "set", "ann@example.com", *options)
    assert gateway.changes == [("PATCH", "/v1/people/person_1", body)], result.output


def test_a_person_is_signed_out(gateway: Gateway) -> None:
    assert run("people", "sign-out", "b-2").exit_code == 0
    assert gateway.changes == [("DELETE", "/v1/people/person_2/sessions", None)]


@pytest.mark.parametrize(("wanted", "said"), [("Ann", "2 people"), ("eve", "Nobody")])
def test_a_name_that_does_not_say_who_is_refused(gateway: Gateway, wanted: str, said: str) -> None:
    """Nothing is changed."""
    result = run("people", "sign-out", wanted)
    assert (result.exit_code, said in str(result.exception or result.output)) == (1, True)
    assert gateway.changes == []


def test_the_link_is_printed(gateway: Gateway) -> None:
    assert run("login").output.strip() == LINK["url"]
