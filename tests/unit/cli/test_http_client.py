"""The console's HTTP client over real sockets: proxies, forms, certificates, truncated answers."""

from __future__ import annotations

import io
import os
import socket
import ssl
import threading
from collections.abc import Callable
from contextlib import closing, suppress
from email import message_from_bytes
from pathlib import Path
from typing import Any

import httpx
import pytest

from cli.embedded.certificates import make_certificates
from cli.http_client import (
    ConnectionBroken,
    ConsoleHttpClient,
    HttpTimeout,
    InvalidUrl,
    NoConnection,
    UntrustedCertificate,
    encode_form,
    is_loopback,
    resolve_url,
)
from cli.stack.ports import free_port
from tests.unit.cli.gateway_double import serve

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.lower().endswith("_proxy") or name.startswith("SSL_CERT")]:
        monkeypatch.delenv(name)


def listen(answer: Callable[[socket.socket], None]) -> int:
    """A server for one connection, byte by byte; its port."""
    server = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        with server, server.accept()[0] as connection, suppress(OSError):
            answer(connection)

    threading.Thread(target=run, daemon=True).start()
    return int(server.getsockname()[1])


def read_head(connection: socket.socket) -> bytes:
    seen = b""
    while b"\r\n\r\n" not in seen and (part := connection.recv(65536)):
        seen += part
    return seen


def answer_with(answer: bytes, heads: list[bytes] | None = None) -> Callable[[socket.socket], None]:
    """Return a server's answer to one request, whose head goes into `heads`."""

    def run(connection: socket.socket) -> None:
        head = read_head(connection)
        if heads is not None:
            heads.append(head)
        connection.sendall(answer)

    return run


def get(url: str, path: str = "/x", *, read_s: float = 5.0) -> bytes:
    with closing(ConsoleHttpClient(url, {"authorization": "Bearer sk"}).send("GET", path, read_s=read_s)) as response:
        return response.read()


def test_a_path_before_the_api_is_kept():
    """A gateway behind a proxy at a path."""
    seen: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request.url.raw_path.decode())
        return httpx.Response(200)

    get(serve(answer) + "/nexus/", "/v1/jobs?a=b%2Fc")
    assert seen == ["/nexus/v1/jobs?a=b%2Fc"]


@pytest.mark.parametrize("url", ["ftp://h", "http://", "http://h:x", "http://h:99999", "http://[::1"])
def test_an_invalid_url(url: str):
    """A typo is one error, whatever is wrong with it."""
    with pytest.raises(InvalidUrl):
        get(url)


def test_a_key_that_no_header_can_hold():
    """Pasted with an invisible character: an error without a traceback, and nothing is sent."""
    url = serve(lambda _: httpx.Response(200))
    for key in ("k€y", "a\r\nx: y"):
        with pytest.raises(InvalidUrl, match="characters"):
            ConsoleHttpClient(url, {"authorization": key}).send("GET", "/", read_s=5)


def test_no_server_at_the_address():
    """Refused, or no such host."""
    for host in (f"127.0.0.1:{free_port()}", "no-such-host.invalid"):
        with pytest.raises(NoConnection):
            get(f"http://{host}")


def test_a_missing_answer_times_out():
    """After exactly the given time."""

    def stay_silent(connection: socket.socket) -> None:
        read_head(connection)
        connection.recv(1)

    port = listen(stay_silent)
    with pytest.raises(HttpTimeout):
        get(f"http://127.0.0.1:{port}", read_s=0.05)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n",
        b"220 mail.example ESMTP\r\n\r\n",
    ],
    ids=["nothing", "half of it", "no last chunk", "not HTTP"],
)
def test_an_answer_that_breaks_off(answer: bytes):
    """Is never taken for a whole one."""
    port = listen(answer_with(answer))
    with pytest.raises(ConnectionBroken):
        get(f"http://127.0.0.1:{port}")


def test_parts_come_as_they_are_sent():
    """A token is shown when it is there, not when the next one is."""
    first_seen = threading.Event()

    def answer(connection: socket.socket) -> None:
        read_head(connection)
        connection.sendall(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\none\r\n")
        if first_seen.wait(10):
            connection.sendall(b"3\r\ntwo\r\n0\r\n\r\n")

    port = listen(answer)
    with closing(ConsoleHttpClient(f"http://127.0.0.1:{port}").send("GET", "/", read_s=5)) as response:
        parts = response.parts()
        assert next(parts) == b"one"
        first_seen.set()
        assert b"".join(parts) == b"two"


def test_a_form_as_browsers_send_it(tmp_path: Path):
    """Fields, lists, files with their types, names with quotes; its length is known."""
    (tmp_path / "a.wav").write_bytes(b"RIFF" + b"x" * 200_000)
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200)

    with (tmp_path / "a.wav").open("rb") as file:
        body, headers = encode_form({"model": "ü", "n[]": ["1", "2"]}, [("file", ('a".wav', file))])
        ConsoleHttpClient(serve(answer)).send("POST", "/v1/x", body=body, headers=headers, read_s=5).close()
    assert int(seen[0].headers["content-length"]) == len(seen[0].content)
    kind = seen[0].headers["content-type"]
    form_ = message_from_bytes(f"content-type: {kind}\r\n\r\n".encode() + seen[0].content)
    parts: Any = form_.get_payload()
    told = [(one.get_param("name", header="content-disposition"), one.get_payload(decode=True)) for one in parts]
    wav = (tmp_path / "a.wav").read_bytes()
    assert told == [("model", "ü".encode()), ("n[]", b"1"), ("n[]", b"2"), ("file", wav)]
    assert (parts[3].get_filename(), parts[3].get_content_type()) == ("a%22.wav", "audio/x-wav")


def test_a_form_from_a_pipe():
    """`--file file=<(…)`: of unknown length, so in chunks."""
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200)

    reading, writing = os.pipe()
    os.write(writing, b"piped")
    os.close(writing)
    with io.FileIO(reading) as file:
        body, headers = encode_form({}, [("file", ("x", file))])
        ConsoleHttpClient(serve(answer)).send("POST", "/", body=body, headers=headers, read_s=5).close()
    assert "content-length" not in headers
    assert b"piped" in seen[0].content


def test_a_refusal_before_all_was_sent():
    """A gateway rejects a large upload and closes the connection: its answer is returned."""

    def answer(connection: socket.socket) -> None:
        read_head(connection)
        connection.sendall(b"HTTP/1.1 413 Too Large\r\ncontent-length: 3\r\nconnection: close\r\n\r\nbig")
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(1 << 20):
            pass

    client = ConsoleHttpClient(f"http://127.0.0.1:{listen(answer)}")
    with closing(client.send("POST", "/", body=b"x" * (1 << 22), read_s=5)) as response:
        assert (response.status, response.read()) == (413, b"big")


def test_a_proxy_is_used_for_other_hosts_alone(monkeypatch: pytest.MonkeyPatch):
    """HTTP_PROXY with a password; this machine, and NO_PROXY, are reached directly."""
    heads: list[bytes] = []
    port = listen(answer_with(OK, heads))
    monkeypatch.setenv("http_proxy", f"http://me:p%40ss@127.0.0.1:{port}")
    assert get(serve(lambda _: httpx.Response(200, text="direct"))) == b"direct"
    monkeypatch.setenv("no_proxy", "gw.invalid")
    with pytest.raises(NoConnection):
        get("http://gw.invalid")
    assert heads == []
    assert get("http://gateway.invalid:8800", "/v1/jobs?x=1") == b"ok"
    lines = heads[0].decode().split("\r\n")
    assert lines[0] == "GET http://gateway.invalid:8800/v1/jobs?x=1 HTTP/1.1"
    assert "Host: gateway.invalid:8800" in lines
    assert "proxy-authorization: Basic bWU6cEBzcw==" in lines


def test_https_through_a_proxy_is_a_tunnel(monkeypatch: pytest.MonkeyPatch):
    """The proxy sees the host, and no key."""
    heads: list[bytes] = []
    refusal = b"HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\n\r\n"
    port = listen(answer_with(refusal, heads))
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{port}")
    with pytest.raises(NoConnection, match="403"):
        get("https://gateway.invalid")
    assert heads[0].startswith(b"CONNECT gateway.invalid:443 HTTP/1.")
    assert b"Bearer" not in heads[0]


def test_certificates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An unknown authority is refused and named as the reason; SSL_CERT_FILE makes it known."""
    authority, pairs = make_certificates(["gateway"])
    for name, text in (("ca", authority), ("cert", pairs["gateway"].certificate), ("key", pairs["gateway"].key)):
        (tmp_path / name).write_text(text)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert", tmp_path / "key")

    def answer(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as secured:
            read_head(secured)
            secured.sendall(OK)

    with pytest.raises(UntrustedCertificate):
        get(f"https://127.0.0.1:{listen(answer)}")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca"))
    assert get(f"https://127.0.0.1:{listen(answer)}") == b"ok"


def test_signed_urls_are_absolute_or_not():
    """As PUBLIC_URL has them."""
    assert resolve_url("http://gw:1/nexus", "/v1/results/x?s=y") == ("http://gw:1", "/v1/results/x?s=y")
    assert resolve_url("http://gw:1", "https://cdn/r?s=y") == ("https://cdn", "/r?s=y")
    with pytest.raises(InvalidUrl):
        resolve_url("http://gw:1", "file:///etc/passwd")


def test_loopback_hosts():
    """Names and addresses."""
    assert [is_loopback(one) for one in ("localhost", "127.0.0.2", "::1", "10.0.0.1", "gw")] == [True] * 3 + [False] * 2
