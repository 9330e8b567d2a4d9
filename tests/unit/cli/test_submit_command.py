"""`nexus submit`: its requests and its output."""

from __future__ import annotations

import json
from email.parser import BytesParser
from email.policy import HTTP
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from typer.testing import CliRunner, Result

from cli import options
from cli.app import app
from cli.errors import ConsoleError
from cli.gateway_client import ApiClient, GatewayTarget
from cli.submit import STREAMED_TEXT_PATHS, endpoint_path
from schemas.endpoints import ENDPOINTS
from tests.unit.cli.gateway_double import serve

JOB = {"id": "job_1", "object": "job", "status": "queued"}


class Gateway:
    """Takes everything, and notes it."""

    def __init__(self) -> None:
        self.requests: list[httpx.Request] = []
        self.files = 0

    def __call__(self, request: httpx.Request) -> httpx.Response:
        request.read()
        self.requests.append(request)
        if request.url.path == "/v1/files":
            self.files += 1
            return httpx.Response(200, json={"id": f"file-{self.files}"})
        return httpx.Response(202, json=JOB)

    @property
    def body(self) -> Any:
        """Of the only request."""
        [request] = self.requests
        return json.loads(request.content)


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> Gateway:
    gateway = Gateway()
    monkeypatch.setattr(options, "client", lambda *_: ApiClient(GatewayTarget(serve(gateway), "sk")))
    return gateway


def run(*arguments: str, stdin: str = "") -> Result:
    return CliRunner().invoke(app, ["submit", *arguments], input=stdin)


def form(request: httpx.Request) -> list[tuple[str, str | None, bytes]]:
    """Name, file name and content of each part."""
    head = f"content-type: {request.headers['content-type']}\r\n\r\n".encode()
    message = BytesParser(policy=HTTP).parsebytes(head + request.content)
    return [
        (
            cast("str", part.get_param("name", header="content-disposition")),
            part.get_filename(),
            cast("bytes", part.get_payload(decode=True)),
        )
        for part in message.iter_parts()
    ]


@pytest.mark.parametrize(
    ("endpoint", "path"),
    [
        ("chat", "/v1/chat/completions"),
        ("chat/completions", "/v1/chat/completions"),
        ("/v1/chat/completions", "/v1/chat/completions"),
        ("completions", "/v1/completions"),
        ("embeddings", "/v1/embeddings"),
        ("images", "/v1/images/generations"),
        ("images/edits", "/v1/images/edits"),
        ("speech", "/v1/audio/speech"),
        ("v1/rerank", "/v1/rerank"),
    ],
)
def test_endpoints_by_short_name_or_path(endpoint: str, path: str):
    """However one likes to write them."""
    assert endpoint_path(endpoint) == path


def test_endpoints_are_those_of_the_table() -> None:
    """The console has its own copy of their names, so that it starts without pydantic."""
    named = {spec.name: spec.path for spec in ENDPOINTS if spec.name}
    assert named
    assert {name: endpoint_path(name) for name in named} == named
    assert set(STREAMED_TEXT_PATHS) == {spec.path for spec in ENDPOINTS if spec.writes_text}


def test_a_request_from_a_file(gateway: Gateway, tmp_path: Path):
    """The id alone is on standard output; standard error says how to watch it."""
    file = tmp_path / "request.json"
    file.write_text('{"messages": [], "seed": 1}')
    result = run("chat", str(file), "-m", "m")
    assert result.stdout == "job_1\n"
    assert "nexus watch job_1" in result.stderr
    assert gateway.body == {"endpoint": "/v1/chat/completions", "body": {"messages": [], "seed": 1, "model": "m"}}
    assert json.loads(run("chat", str(file), "--json").stdout) == JOB


def test_everything_that_can_be_said_about_a_job(gateway: Gateway):
    """From standard input."""
    about = ["--metadata", "team=a", "--metadata", "q=x=y", "--tier", "flex"]
    about += ["--webhook", "https://h.example/", "--timeout", "60"]
    assert run("images", "-", *about, stdin='{"model": "m", "prompt": "a"}').exit_code == 0
    assert gateway.body == {
        "endpoint": "/v1/images/generations",
        "body": {"model": "m", "prompt": "a"},
        "metadata": {"team": "a", "q": "x=y"},
        "service_tier": "flex",
        "webhook": {"url": "https://h.example/"},
        "timeout": 60.0,
    }


def test_a_file_goes_to_the_endpoint_as_a_form(gateway: Gateway, tmp_path: Path):
    """With `Prefer: respond-async`; lists and numbers are encoded as form fields."""
    sound = tmp_path / "a.wav"
    sound.write_bytes(b"RIFF")
    body = '{"temperature": 0.5, "timestamp_granularities": ["word", "segment"], "stream": false, "prompt": "é"}'
    assert run("transcriptions", "-", "--file", f"file={sound}", "-m", "w", stdin=body).stdout == "job_1\n"
    [request] = gateway.requests
    assert request.url.path == "/v1/audio/transcriptions"
    assert request.headers["prefer"] == "respond-async"
    assert form(request) == [
        ("temperature", None, b"0.5"),
        ("timestamp_granularities[]", None, b"word"),
        ("timestamp_granularities[]", None, b"segment"),
        ("stream", None, b"false"),
        ("prompt", None, "é".encode()),
        ("model", None, b"w"),
        ("file", "a.wav", b"RIFF"),
    ]


def test_files_and_what_no_form_can_say(gateway: Gateway, tmp_path: Path):
    """Metadata, a webhook, a time-out: the files are stored first, and the job names them."""
    for name in ("a.png", "b.png", "mask.png"):
        (tmp_path / name).write_bytes(name.encode())
    pictures = [f"image={tmp_path / 'a.png'}", f"image={tmp_path / 'b.png'}", f"mask={tmp_path / 'mask.png'}"]
    files = [argument for picture in pictures for argument in ("-f", picture)]
    assert run("edits", *files, "-m", "m", "--metadata", "a=b").exit_code == 0
    *stored, submitted = gateway.requests
    assert [request.url.path for request in stored] == ["/v1/files"] * 3
    assert form(stored[1]) == [("purpose", None, b"user_data"), ("file", "b.png", b"b.png")]
    assert json.loads(submitted.content) == {
        "endpoint": "/v1/images/edits",
        "body": {"model": "m", "image": ["file-1", "file-2"], "mask": "file-3"},
        "metadata": {"a": "b"},
    }


@pytest.mark.parametrize(
    ("arguments", "stdin"),
    [
        (["chat"], ""),
        (["chat", "/nowhere.json"], ""),
        (["chat", "-"], "{"),
        (["chat", "-"], "[]"),
        (["transcriptions", "-f", "file=/nowhere.wav"], ""),
    ],
)
def test_what_cannot_be_read_is_said(gateway: Gateway, arguments: list[str], stdin: str):
    """And nothing is requested."""
    assert isinstance(run(*arguments, stdin=stdin).exception, ConsoleError)
    assert gateway.requests == []


@pytest.mark.parametrize("option", [("--metadata", "a"), ("--metadata", "=a"), ("-f", "a.wav")])
def test_pairs_that_are_none(gateway: Gateway, option: tuple[str, str]):
    """A wrong line."""
    assert run("chat", "-", *option, stdin="{}").exit_code == 2
    assert gateway.requests == []
