"""`nexus models`, with a double of a gateway."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner, Result

from cli import options
from cli.app import app
from cli.gateway_client import ApiClient, GatewayTarget
from schemas.jobs import Capability
from schemas.parameters.standard import standard_descriptor
from tests.unit.cli.gateway_double import serve

CHAT = {"id": "smollm2", "object": "model", "capabilities": ["chat"], "context_length": 4096}
ALIAS = {"id": "tts-1", "object": "model", "capabilities": ["chat"], "alias_for": ["smollm2"], "resolves_to": "smollm2"}


def worker(name: str, state: str, *models: str, capability: str = "chat") -> dict[str, Any]:
    return {"id": name, "state": state, "models": [{"name": one, "capabilities": [capability]} for one in models]}


class Gateway:
    """Answers with these lists; without `workers`, it refuses the key."""

    def __init__(self) -> None:
        self.models: list[dict[str, Any]] = [CHAT]
        self.workers: list[dict[str, Any]] | None = [worker("w1", "ready", "smollm2")]

    def __call__(self, request: httpx.Request) -> httpx.Response:
        rows = self.models if request.url.path == "/v1/models" else self.workers
        if rows is None:
            return httpx.Response(403, json={"error": {"message": "admin", "code": "permission_denied"}})
        return httpx.Response(200, json={"object": "list", "data": rows})


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> Gateway:
    gateway = Gateway()
    monkeypatch.setattr(options, "client", lambda *_: ApiClient(GatewayTarget(serve(gateway), "sk")))
    return gateway


def run(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ("models", *arguments))


def rows() -> dict[str, list[str]]:
    return {line.split()[0]: line.split()[1:] for line in run().stdout.splitlines()}


def test_models_with_their_workers(gateway: Gateway) -> None:
    """An alias says what it stands for; workers that manage models alone are no models."""
    gateway.models = [CHAT, ALIAS]
    gateway.workers = [
        worker("w1", "ready", "smollm2"),
        worker("w2", "draining", "smollm2"),
        worker("w3", "ready", "worker:w3", capability="models"),
    ]
    assert rows() == {
        "model": ["capabilities", "state", "workers", "context"],
        "smollm2": ["chat", "ready", "w1,", "w2", "4096"],
        "tts-1": ["chat", "alias", "for", "smollm2", "-", "-"],
    }


def test_load_states_are_shown(gateway: Gateway) -> None:
    """The best state of any, and that of each worker."""
    gateway.models = [CHAT | {"state": "loaded", "workers": {"w1": "cold", "w2": "loaded"}}]
    gateway.workers = [worker("w1", "ready", "smollm2"), worker("w2", "ready", "smollm2")]
    assert rows()["smollm2"] == ["chat", "loaded", "w1", "(cold),", "w2", "(loaded)", "4096"]
    (row,) = json.loads(run("--json").stdout)["data"]
    assert (row["workers"], row["loads"]) == (["w1", "w2"], {"w1": "cold", "w2": "loaded"})


def test_a_model_that_no_ready_worker_serves_is_there_too(gateway: Gateway) -> None:
    """With what its workers are: it is why requests are 503."""
    gateway.models = []
    gateway.workers = [worker("w1", "unhealthy", "qwen"), worker("w2", "draining", "qwen")]
    assert rows()["qwen"] == ["chat", "draining,", "unhealthy", "w1,", "w2", "-"]


def test_a_key_that_may_not_see_workers_sees_models(gateway: Gateway) -> None:
    gateway.workers = None
    assert rows()["smollm2"] == ["chat", "ready", "-", "4096"]


def test_without_models_it_says_how_to_begin(gateway: Gateway) -> None:
    gateway.models, gateway.workers = [], []
    assert "nexus worker --backend" in run().stdout


def test_a_model_with_its_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values, defaults, and a first request for each endpoint, as a command."""
    usual = standard_descriptor((Capability.CHAT, Capability.IMAGES))
    assert usual is not None
    kinds = {path: "multipart/form-data" if path.endswith("edits") else "application/json" for path in usual.endpoints}
    endpoints = {path: one.model_dump() | {"content_type": kinds[path]} for path, one in usual.endpoints.items()}
    entry = {
        "id": "org/m",
        "state": "loaded",
        "capabilities": ["chat", "images"],
        "workers": [{"id": "w1", "backend": "comfyui", "state": "ready", "load": "loaded"}],
        "modalities": {"input": ["image", "text"], "output": ["image", "text"]},
        "alias_for": ["a", "org/m"],
        "resolves_to": "org/m",
        "limitations": ["n"],
        "endpoints": endpoints,
    }

    def answer(request: httpx.Request) -> httpx.Response:
        assert request.url.raw_path == b"/v1/catalog/org%2Fm"
        return httpx.Response(200, json=entry)

    monkeypatch.setattr(options, "client", lambda *_: ApiClient(GatewayTarget(serve(answer), "sk")))
    shown = run("show", "org/m")
    assert shown.exit_code == 0, shown.output
    assert "w1 (comfyui, loaded)" in shown.stdout
    assert "image, text -> image, text" in shown.stdout
    assert "number, from 0.0 to 2.0" in shown.stdout
    assert "file (image/*)" in shown.stdout
    assert "| nexus submit /v1/chat/completions - --wait" in shown.stdout
    assert "-F image=@FILE" in shown.stdout
    assert json.loads(run("show", "org/m", "--json").stdout) == entry
    assert run("--json", "show", "org/m").exit_code == 2
