"""`nexus aliases` and `nexus services`, with a double of a gateway."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner, Result

from cli import options
from cli.app import app
from cli.gateway_client import ApiClient, GatewayTarget
from tests.unit.cli.gateway_double import serve


class Gateway:
    """Records the requests, and returns the configured answer."""

    def __init__(self) -> None:
        self.answer: dict[str, Any] = {}
        self.requests: list[tuple[str, str, Any]] = []

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
    return CliRunner().invoke(app, arguments)


ALIAS = {"id": "team/chat", "object": "alias", "targets": ["a", "b"], "resolves_to": "b"}
SERVICE = {"id": "tts", "object": "service", "base_url": "http://tts:1", "state": None}


def test_aliases_are_listed(gateway: Gateway) -> None:
    """One line each; what none of its targets serves shows a dash; or the answer as JSON."""
    gateway.answer = {"object": "list", "data": [ALIAS, ALIAS | {"id": "x", "resolves_to": None}]}
    lines = [line.split() for line in run("aliases").stdout.splitlines()]
    assert lines == [["alias", "targets", "now"], ["team/chat", "a,", "b", "b"], ["x", "a,", "b", "-"]]
    assert json.loads(run("aliases", "--json").stdout) == gateway.answer
    gateway.answer["data"] = []
    assert "nexus aliases set" in run("aliases").stdout


def test_an_alias_is_set_and_removed(gateway: Gateway) -> None:
    """With any name; the result is printed."""
    gateway.answer = ALIAS
    assert run("aliases", "set", "team/chat", "a", "b").stdout == "team/chat: a, b (now: b)\n"
    assert json.loads(run("aliases", "set", "team/chat", "a", "b", "--json").stdout) == ALIAS
    assert run("aliases", "remove", "team/chat").stdout == "team/chat: removed\n"
    put = ("PUT", "/v1/aliases/team%2Fchat", {"targets": ["a", "b"]})
    assert gateway.requests == [put, put, ("DELETE", "/v1/aliases/team%2Fchat", None)]


def test_an_unknown_target_is_a_warning_on_standard_error(gateway: Gateway) -> None:
    """Scripts that read what is printed go on."""
    gateway.answer = ALIAS | {"warnings": ["No worker serves or has served a model 'a'. Did you mean 'b'?"]}
    result = run("aliases", "set", "team/chat", "a", "b")
    assert (result.exit_code, result.stdout) == (0, "team/chat: a, b (now: b)\n")
    assert result.stderr == "nexus: warning: No worker serves or has served a model 'a'. Did you mean 'b'?\n"


def test_services_are_listed_added_and_removed(gateway: Gateway) -> None:
    """The same for services."""
    gateway.answer = {"object": "list", "data": [SERVICE]}
    assert run("services").stdout.splitlines()[1].split() == ["tts", "http://tts:1", "not", "served"]
    gateway.answer = SERVICE
    assert run("services", "add", "tts", "http://tts:1").stdout == "tts: http://tts:1\n"
    assert run("services", "add", "tts", "http://tts:1", "--metadata-url", "http://tts:1/m").exit_code == 0
    assert run("services", "remove", "tts").stdout == "tts: removed\n"
    assert gateway.requests[1:] == [
        ("PUT", "/v1/services/tts", {"base_url": "http://tts:1", "metadata_url": ""}),
        ("PUT", "/v1/services/tts", {"base_url": "http://tts:1", "metadata_url": "http://tts:1/m"}),
        ("DELETE", "/v1/services/tts", None),
    ]


@pytest.mark.parametrize("arguments", [("aliases", "set", "x"), ("aliases", "--json", "remove", "x"), ("aliases", "x")])
def test_an_invalid_command_line_sends_nothing(gateway: Gateway, arguments: tuple[str, ...]) -> None:
    """No target, options where they would be ignored, no such subcommand."""
    assert run(*arguments).exit_code == 2
    assert gateway.requests == []


def test_workers_are_listed_with_the_load_of_their_servers(gateway: Gateway) -> None:
    """A column of load figures is there only where a server reports any."""
    row = {"id": "w1", "backend": "vllm", "models": [{"name": "m", "capabilities": ["chat"]}], "state": "ready"}
    gateway.answer = {"data": [row | {"load": {"running": 3, "waiting": 2, "kv_cache_usage": 0.456}}]}
    assert "3 running, 2 waiting, KV cache 46%" in run("workers").output
    gateway.answer = {"data": [row | {"load": {"running": 3, "waiting": 2, "kv_cache_usage": None}}]}
    assert "3 running, 2 waiting" in run("workers").output
    assert "KV cache" not in run("workers").output
    gateway.answer = {"data": [row | {"load": None}]}
    assert "load" not in run("workers").output


def test_workers_are_listed_with_what_their_models_lack(gateway: Gateway) -> None:
    """A column of notes is there only where there is anything to note."""
    limitation = {"model": "m", "feature": "stream", "since": 0, "until": 600}
    row = {"id": "w1", "backend": "openai", "models": [{"name": "m", "capabilities": ["chat"]}], "state": "ready"}
    pause = {"model": "m", "reason": "busy", "seconds": 10.0, "until": 600}
    gateway.answer = {"data": [row | {"limitations": [limitation], "pauses": [pause]}]}
    assert "m lacks stream (until " in run("workers").output
    assert re.search(r"m paused until [\d:]+: busy", run("workers").output)
    gateway.answer = {"data": [row]}
    assert "notes" not in run("workers").output
