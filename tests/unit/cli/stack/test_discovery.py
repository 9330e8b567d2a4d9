"""Discovery finds inference servers that already run here, and ignores other programs at their ports."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from cli.stack.discovery import CANDIDATES, PROBES, BackendCandidate, DiscoveredBackend, find_backends, model_names
from cli.stack.ports import free_port
from cli.stack.stack import plan_for
from workers.backends.base import load_adapters

MODELS = {"object": "list", "data": [{"id": "llama3.2:1b", "object": "model", "created": 1, "owned_by": "library"}]}
Answer = tuple[int, str, bytes]
NOT_FOUND: Answer = (404, "text/html", b"<html>not found</html>")


def as_json(value: Any, status: int = 200) -> Answer:
    return status, "application/json", json.dumps(value).encode()


@contextmanager
def listening(answer: Callable[[str], Answer]) -> Iterator[BackendCandidate]:
    """A little HTTP server."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, kind, body = answer(self.path)
            self.send_response(status)
            self.send_header("content-type", kind)
            self.send_header("location", "/elsewhere")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield BackendCandidate("some", "Some", server.server_address[1])
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def serving(answers: dict[str, Answer]) -> Callable[[str], Answer]:
    return lambda path: answers.get(path, NOT_FOUND)


async def test_inference_server_is_found_with_its_models():
    """An OpenAI list at /v1/models, and nothing else."""
    with listening(serving({"/v1/models": as_json(MODELS)})) as candidate:
        assert await find_backends([candidate]) == [DiscoveredBackend(candidate, ("llama3.2:1b",))]


async def test_server_without_models_is_found():
    """Ollama before its first pull says `data: null`."""
    with listening(serving({"/v1/models": as_json({"object": "list", "data": None})})) as candidate:
        assert await find_backends([candidate]) == [DiscoveredBackend(candidate, ())]


async def test_ollama_is_served_by_its_own_adapter():
    """What listens at its port and does not speak its own API is served by OpenAI's."""
    version = as_json({"version": "0.12.11"})
    with listening(serving({"/v1/models": as_json(MODELS), "/api/version": version})) as some:
        ollama = BackendCandidate("ollama", "Ollama", some.port)
        found = await find_backends([ollama, some])
        assert [plan_for(one).backend for one in found] == ["ollama", "openai"]
    with listening(serving({"/v1/models": as_json(MODELS)})) as some:
        [found_one] = await find_backends([BackendCandidate("ollama", "Ollama", some.port)])
        assert plan_for(found_one).backend == "openai"


@pytest.mark.parametrize(
    "answer",
    [
        NOT_FOUND,
        (200, "text/html", b"<html>a page for every path</html>"),
        (200, "application/json", b"{"),
        (302, "text/html", b""),
        as_json({"ok": True}),
        as_json([1, 2]),
        as_json({"object": "list", "data": [{"id": 1, "object": "model"}]}),
        as_json({"object": "list", "data": [{"id": "order-1", "object": "order"}]}),
        as_json({"object": "list", "data": "all of them"}),
        as_json({"error": {"message": "a key, please"}}, 401),
        as_json(MODELS, 500),
        (200, "application/json", b" " * 3_000_000 + json.dumps(MODELS).encode()),
    ],
    ids=[
        "not-found", "html", "broken", "redirect", "object", "array", "bad-id", "other-list", "no-list", "key", "500", "huge",
    ],
)  # fmt: skip
async def test_other_http_servers_are_left_alone(answer: Answer):
    """Something else that happens to listen there, whatever is looked for."""
    with listening(lambda _: answer) as candidate:
        assert await find_backends([replace(candidate, kind=kind) for kind in PROBES]) == []


VOICE = {"audio": {"sample_rate": 22050}, "espeak": {"voice": "en-us"}, "phoneme_id_map": {"_": [0]}, "num_speakers": 1}


@pytest.mark.parametrize(
    ("kind", "path", "answer"),
    [
        ("comfyui", "/system_stats", as_json({"system": {"os": "posix", "comfyui_version": "0.3.40"}, "devices": []})),
        ("invokeai", "/api/v1/app/version", as_json({"version": "6.9.0"})),
        ("sdwebui", "/sdapi/v1/sd-models", as_json([{"title": "v1-5 [abc]", "model_name": "v1-5", "hash": "abc"}])),
        ("piper", "/voices", as_json({"en_US-joe-medium": VOICE})),
        ("whisper", "/", (200, "text/html", b"<html><title>Whisper.cpp Server</title></html>")),
    ],
)
async def test_servers_are_recognized_by_their_own_apis(kind: str, path: str, answer: Answer):
    """And served by their own adapters; no other kind takes them for its own."""
    with listening(serving({path: answer})) as candidate:
        [found] = await find_backends([replace(candidate, kind=one) for one in PROBES])
        assert (plan_for(found).backend, plan_for(found).chat) == (kind, False)


def test_every_kind_has_an_adapter():
    """Which a worker can run."""
    assert {candidate.kind for candidate in CANDIDATES} == set(PROBES)
    assert set(PROBES) <= set(load_adapters())
    assert len({candidate.name for candidate in CANDIDATES}) == len(CANDIDATES)


async def test_nexus_is_left_alone():
    """A gateway would send its own jobs round in circles; ready or not."""
    for status in (200, 503):
        ready = as_json({"status": "ready", "parts": {"nats": {"ok": True}}}, status)
        with listening(serving({"/v1/models": as_json(MODELS), "/readyz": ready})) as candidate:
            assert await find_backends([candidate]) == []


async def test_a_gateway_is_recognized_by_its_request_ids():
    """Its readiness on the public port does not list its dependencies."""

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        models = json.dumps(MODELS).encode()
        writer.write(b"HTTP/1.1 200 OK\r\nx-request-id: req_1\r\nconnection: close\r\n")
        writer.write(b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(models), models))
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    assert await find_backends([BackendCandidate("x", "X", server.sockets[0].getsockname()[1])]) == []
    server.close()


async def test_silent_server_costs_no_more_than_the_timeout():
    """A port that accepts and never answers."""
    server = await asyncio.start_server(lambda *_: asyncio.sleep(30), "127.0.0.1", 0)
    candidate = BackendCandidate("mute", "Mute", server.sockets[0].getsockname()[1])
    before = asyncio.get_running_loop().time()
    assert await find_backends([candidate], timeout_s=0.3) == []
    assert asyncio.get_running_loop().time() - before < 2
    server.close()


async def test_server_that_speaks_no_http_is_left_alone():
    """A database at port 8000."""

    async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"\x00\x01 not http\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(greet, "127.0.0.1", 0)
    assert await find_backends([BackendCandidate("db", "DB", server.sockets[0].getsockname()[1])]) == []
    server.close()


async def test_results_keep_the_order_of_the_candidates():
    """And a port without a server is skipped."""
    with ExitStack() as stack:
        first, second = (stack.enter_context(listening(serving({"/v1/models": as_json(MODELS)}))) for _ in range(2))
        nobody = BackendCandidate("nobody", "Nobody", free_port())
        assert [one.candidate for one in await find_backends([first, nobody, second])] == [first, second]


def test_default_ports():
    """The ports where these servers listen without configuration."""
    assert {one.name: one.port for one in CANDIDATES} == {
        "ollama": 11434, "vllm": 8000, "llama-cpp": 8080, "lm-studio": 1234,
        "comfyui": 8188, "invokeai": 9090, "sdwebui": 7860, "piper": 5000,
        "whisper-cpp": 8080, "whisper-cpp-8081": 8081,
    }  # fmt: skip


def test_llama_cpp_list_is_one():
    """llama.cpp adds Ollama's `models` beside `data`."""
    assert model_names({"models": [{}], **MODELS}) == ("llama3.2:1b",)
