"""Redaction removes internal addresses, hosts and paths from errors, and keeps the rest of the text."""

from __future__ import annotations

import asyncio
import re
import ssl

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from gateway.operator_requests import ServiceRegistration
from schemas.errors import ErrorInfo
from schemas.redaction import REDACTED_ADDRESS, REDACTED_PATH, Redactor
from tests.ports import free_port
from workers.backends.base import BackendConfig, load_adapters, make_backend, wrap_exception

INSIDES = [
    "http://10.1.2.3:8000/v1/chat/completions",
    "https://192.168.1.7/x?y=z",
    "http://[fd00::17]:8000/v1",
    "http://[::1]:11434/api/chat",
    "http://ollama:11434/api/chat",
    "http://localhost:8080",
    "http://user:secret@example.com/x",
    "nats://nats:4222",
    "redis://:password@cache-3:6379/0",
    "tcp://172.17.0.2:2375",
    "grpc://gpu-box.lan:50051",
    "unix:/run/vllm.sock",
    "unix:///var/run/docker.sock",
    "file:///srv/models/x.gguf",
    "10.0.0.5:6379",
    "127.0.0.1",
    "169.254.169.254",
    "100.64.0.9:443",
    "fe80::1%eth0",
    "[::1]:8000",
    "::ffff:10.0.0.1",
    "host.internal:11434",
    "host.docker.internal",
    "gpu-1.nexus.svc.cluster.local:8000",
    "nas.local",
    "/var/lib/nexus/blobs/1",
    "/home/alice/.cache/huggingface/token",
    "/root/.ollama/models/manifest",
    "/opt/venv/lib/python3.11/site-packages/vllm/engine.py",
    "/models/llama-3/model.safetensors",
    "/app/server.py",
    "~/.ssh/id_rsa",
    "C:\\Users\\alice\\model.bin",
]
SENTENCES = [
    "{}",
    "no connection to {}: [Errno 111] Connect call failed",
    "Connection refused to {}",
    "could not read '{}'.",
    'Post "{}": EOF',
    "error ({}), and more",
    "first line\nsecond: {}\nthird",
    "see {}, then retry",
]
CONTEXTS = [
    "Cannot connect to host gpu-box:8000 ssl:default [Connect call failed ('10.0.0.3', 8000)]",
    "HTTPConnectionPool(host='ollama', port=11434): Max retries exceeded with url: /api/chat (Caused by NewConnectionError)",
    "dial tcp: lookup ollama on 127.0.0.11:53: no such host",
    "getaddrinfo ENOTFOUND ollama",
    "connect ECONNREFUSED 10.3.4.5:8000",
    "Error 111 connecting to ollama:6379. Connection refused.",
    "etcd at gpu-box:2379: timed out",
    "could not resolve host 'gpu-box'",
    "[Errno 111] Connect call failed ('10.0.0.3', 8000, 0, 0)",
    "Multiple exceptions: [Errno 111] Connect call failed ('::1', 8000, 0, 0), [Errno 111] Connect call failed ('127.0.0.1', 8000)",
]
LEAKS = re.compile(r"10\.\d|192\.168|127\.0|gpu-box|ollama|8000|11434|6379|2379")
KEPT = [
    "This model's maximum context length is 4096 tokens. However, you requested 5000 tokens (4900 in the messages, 100 in the completion).",
    "the request exceeds the available context size (4096 tokens), try increasing it: n_ctx:4096, n_predict:128",
    "Your input was flagged by moderation: category 'violence', score 0.93.",
    "Expecting ',' delimiter: line 12 column 34 (char 567)",
    "messages.0.content: Input should be a valid string",
    "at 12:30:45 the model 'meta-llama/Llama-3.1-8B-Instruct:latest' was unloaded",
    "'temperature' must be between 0 and 2.0, not 3.5; see https://platform.openai.com/docs/api-reference/chat",
    "POST /v1/chat/completions does not take 'logprobs'; GET /v1/models lists those that do",
    "std::bad_alloc in ggml::backend, version 1.2.3",
    "the JSON schema's $ref '#/$defs/Node' is not supported",
    "Invalid data URL: data:image/png;base64,iVBORw0KGgo/AAAA//8=",
    "the file 'report.local.txt' and 1/2 of a/b/c are too long: and/or more",
    "Could not connect: the model is still loading. Connected to it are max_tokens and top_p: reduce either",
    "api.example.com:443 answered 502 from 8.8.8.8",
    "mm:ss is 04:05; ratio 16:9; IPv6-like ab:cd",
]


@pytest.mark.parametrize("inside", INSIDES)
@pytest.mark.parametrize("sentence", SENTENCES)
def test_what_is_inside_is_hidden(inside: str, sentence: str) -> None:
    """Internal addresses, hosts and paths are removed anywhere in a sentence; the other words stay."""
    hidden = Redactor().redact(sentence.format(inside))
    assert hidden in {sentence.format(REDACTED_ADDRESS), sentence.format(REDACTED_PATH)}


@pytest.mark.parametrize("text", CONTEXTS)
def test_hosts_after_words_that_name_one(text: str) -> None:
    """Clients of every language name the host that they could not reach."""
    hidden = Redactor().redact(text)
    assert not LEAKS.search(hidden), hidden
    assert REDACTED_ADDRESS in hidden


@pytest.mark.parametrize("text", KEPT)
def test_words_about_the_request_stay(text: str) -> None:
    """A server's message about the request reaches the caller unchanged."""
    assert Redactor().redact(text) == text


def test_configured_names_are_hidden() -> None:
    """A public host of the process's configuration is removed too. A plain word counts only with a port."""
    rules = Redactor(
        [
            "https://models.example.com:8443/v1",
            "redis://cache:6379",
            "gpu-7",
            "nats://a.example:4222,nats://b.example:4222",
        ]
    )
    said = "models.example.com failed; cache:6379 is away, the cache is cold; gpu-7 is lost; b.example:4222; other.example.com is fine"
    assert rules.redact(said) == (
        f"{REDACTED_ADDRESS} failed; {REDACTED_ADDRESS} is away, the cache is cold; {REDACTED_ADDRESS} is lost; {REDACTED_ADDRESS}; other.example.com is fine"
    )


@given(st.text(max_size=300))
def test_any_text(text: str) -> None:
    """Redaction accepts any text and is idempotent."""
    once = Redactor().redact(text)
    assert Redactor().redact(once) == once


@given(
    st.lists(st.sampled_from([*INSIDES, "the", "error:", "model", "'x'", "400", "(see", "log)"]), max_size=12),
)
def test_any_mixture(words: list[str]) -> None:
    hidden = Redactor().redact(" ".join(words))
    for inside in INSIDES:
        assert inside not in hidden


def test_errors_hide_it_at_the_edge() -> None:
    """The body of any error is redacted. The error itself keeps the full message for logs."""
    info = ErrorInfo(status=503, type="server_error", message="no connection to http://10.1.2.3:8000/v1")
    assert info.body()["error"]["message"] == f"no connection to {REDACTED_ADDRESS}"
    assert "10.1.2.3" in info.message
    assert info.redacted().message == f"no connection to {REDACTED_ADDRESS}"
    plain = ErrorInfo(status=400, type="x", message="too long")
    assert plain.redacted() is plain


WITH_SERVER = sorted(set(load_adapters()) - {"echo", "command", "service"})


@pytest.mark.parametrize("kind", WITH_SERVER)
@pytest.mark.parametrize("trouble", ["refused", "dns", "tls", "garbage"])
async def test_no_adapter_tells_where_its_server_is(kind: str, trouble: str) -> None:
    """Callers do not learn the address of a server that an adapter cannot reach."""

    async def garbage(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"\x00\x01 nonsense\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(garbage, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    closed = free_port()
    url = {
        "refused": f"http://127.0.0.1:{closed}",
        "dns": "http://gpu-1.nexus.internal:8123",
        "tls": f"https://localhost:{port}",
        "garbage": f"http://127.0.0.1:{port}",
    }[trouble]
    backend = make_backend(kind, BackendConfig(url=url))
    shown = []
    for ask in (backend.health, backend.discover):
        try:
            async with asyncio.timeout(10):
                await ask()
        except (Exception, ssl.SSLError) as error:
            shown.append(wrap_exception(error).info.body()["error"]["message"])
    server.close()
    await backend.close()
    assert shown
    for text in shown:
        assert not re.search(rf"127\.0\.0\.1|gpu-1|internal(?! address)|localhost|{closed}|{port}|8123", text), text


def test_the_refusal_of_a_service_names_its_field() -> None:
    """The name of a field behind the word `host` was taken for a host."""
    with pytest.raises(ValidationError) as refused:
        ServiceRegistration.model_validate({"base_url": "ftp://tts"})
    text = f"{refused.value.errors()[0]['msg']}: 'base_url'"
    assert Redactor().redact(text) == text
