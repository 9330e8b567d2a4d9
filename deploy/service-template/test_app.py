"""The service keeps the contract with Nexus. Run by `pytest`; it needs httpx besides the requirements."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient

from app import MODEL, app, model

ASK = {"model": MODEL, "messages": [{"role": "user", "content": "hello there"}]}


@pytest.fixture
def http() -> Iterator[TestClient]:
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def test_it_is_alive_and_ready(http: TestClient) -> None:
    assert http.get("/health").status_code == 200
    assert http.get("/readyz").status_code == 200


def test_it_is_not_ready_without_its_model(http: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "ready", False)
    assert http.get("/health").status_code == 200
    assert http.get("/readyz").status_code == 503


@pytest.mark.parametrize("path", ["/v1/metadata", "/v1/descriptor"])
def test_it_says_what_it_serves(http: TestClient, path: str) -> None:
    """Every endpoint that it names exists."""
    said = http.get(path).json()
    routes = app.openapi()["paths"]
    assert said["service"]["name"]
    assert [one["path"] for one in said["endpoints"] if one["method"].lower() not in routes.get(one["path"], {})] == []
    assert MODEL in [one["id"] for one in said["models"]]


def test_an_answer_in_one_piece(http: TestClient) -> None:
    answer = http.post("/v1/chat/completions", json=ASK).json()
    assert answer["choices"][0]["message"]["content"] == "olleh ereht"
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == 2


def test_a_stream_ends_with_a_reason_the_usage_and_done(http: TestClient) -> None:
    """Without these three Nexus takes it for broken off."""
    body = ASK | {"stream": True, "stream_options": {"include_usage": True}}
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, done = [line[6:] for line in answer.text.split("\n\n") if line]
    *chunks, last = map(json.loads, events)
    assert "".join(one["choices"][0]["delta"].get("content", "") for one in chunks) == "olleh ereht "
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert last["usage"]["total_tokens"] == 4
    assert done == "[DONE]"


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "user", "content": " "}]}, 400, "messages"),
        ({"model": "another"}, 404, "model"),
    ],
)
def test_what_is_wrong_is_refused_in_openai_s_words(
    http: TestClient, change: dict[str, object], status: int, param: str
) -> None:
    """Also where a stream was asked for: an error is never a 200."""
    answer = http.post("/v1/chat/completions", json=ASK | {"stream": True} | change)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)
    assert answer.json()["error"]["type"] == "invalid_request_error"
