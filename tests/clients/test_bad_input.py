"""What the gateway makes of requests that no SDK sends: raw sockets, nonsense, floods, and honest but odd clients."""

from __future__ import annotations

import asyncio
import contextlib
import json
import string
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.cluster import KEY, Cluster, chat, data_lines

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(60)]

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
BODY = json.dumps(chat("hi you")).encode()
MIB = 1024 * 1024
LARGE = 100 * MIB
RSS_GROWTH = 80 * MIB


@dataclass
class Answer:
    """One HTTP answer as it came over the wire."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Wire:
    """A raw connection to a gateway."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self, *, head_only: bool = False) -> Answer:
        """The next answer; a body without a Content-Length reaches to the connection's end."""
        async with asyncio.timeout(20):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in head[1:] if line)}
            answer = Answer(int(head[0].split(" ")[1]), headers)
            if "content-length" in headers and not head_only:
                answer.body = await self.reader.readexactly(int(headers["content-length"]))
            elif not head_only and answer.status not in (100, 204):
                answer.body = await self.reader.read()
            return answer

    async def ended(self) -> bool:
        """Whether the gateway closes the connection, without another word."""
        async with asyncio.timeout(10):
            with contextlib.suppress(ConnectionError):
                return await self.reader.read() == b""
            return True


@contextlib.asynccontextmanager
async def wire(url: str) -> AsyncIterator[Wire]:
    reader, writer = await asyncio.open_connection(urlsplit(url).hostname, urlsplit(url).port)
    try:
        yield Wire(reader, writer)
    finally:
        writer.close()


def head(*lines: str, method: str = "POST", path: str = CHAT, version: str = "1.1", key: str = KEY) -> bytes:
    """A request's head."""
    return "\r\n".join(
        [f"{method} {path} HTTP/{version}", "host: nexus", f"authorization: Bearer {key}", *lines, "", ""]
    ).encode("latin-1")


def post(body: bytes = BODY, *lines: str, **options: str) -> bytes:
    """A whole request."""
    return head(*lines, f"content-length: {len(body)}", **options) + body


async def exchange(url: str, data: bytes, *, head_only: bool = False) -> Answer:
    """Send `data` over a connection of its own, and return the first answer."""
    async with wire(url) as connection:
        await connection.send(data)
        return await connection.answer(head_only=head_only)


def check_wrong_key(answer: httpx.Response, path: str) -> None:
    """The answer must refuse a key, in the shape of the API that the path belongs to."""
    if path.startswith("/v1/messages"):
        assert answer.status_code == 401
        assert answer.json()["type"] == "error"
        assert answer.json()["error"]["type"] == "authentication_error"
    else:
        check_error(answer, 401, "invalid_api_key")


def check_error(answer: Answer | httpx.Response, status: int, code: str | None = None) -> dict[str, Any]:
    """An answer must be OpenAI's error object, with this status. Returns the object."""
    status_seen = answer.status if isinstance(answer, Answer) else answer.status_code
    body = answer.json if isinstance(answer, Answer) else answer.json()
    assert status_seen == status, body
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert isinstance(error["type"], str)
    assert error["code"] is None or isinstance(error["code"], str)
    assert answer.headers["x-request-id"].startswith("req_")
    assert answer.headers["content-type"] == "application/json"
    if code:
        assert error["code"] == code
    return error


async def works(cluster: Cluster) -> None:
    """The gateway still serves."""
    answer = await cluster.post(CHAT, chat())
    assert answer.status_code == 200, answer.text


async def is_idle(cluster: Cluster, model: str) -> bool:
    return await cluster.stored(model) == 0


def deep(levels: int) -> bytes:
    return json.dumps(chat())[:-1].encode() + b', "x": ' + b"[" * levels + b"]" * levels + b"}"


def deep_objects(levels: int) -> bytes:
    return b'{"a":' * levels + b"1" + b"}" * levels


BAD_BODIES = {
    "empty": b"",
    "blank": b" \n",
    "array": b"[]",
    "string": b'"model"',
    "number": b"1",
    "null": b"null",
    "not JSON": b"model=echo",
    "single quotes": b"{'model': 'echo'}",
    "cut": BODY[:-1],
    "more": BODY + b"}",
    "NUL after": BODY + b"\x00",
    "comma": b'{"model": "echo",}',
    "NaN": b'{"model": "echo", "temperature": NaN}',
    "Infinity": b'{"model": "echo", "temperature": Infinity}',
    "-Infinity": b'{"model": "echo", "x": [-Infinity]}',
    "1e999": b'{"model": "echo", "temperature": 1e999}',
    "5000 digits": b'{"model": "echo", "seed": ' + b"9" * 5000 + b"}",
    "lone surrogate": b'{"model": "echo", "messages": [{"role": "user", "content": "\\ud800"}]}',
    "lone surrogate as a key": b'{"model": "echo", "\\udc00": 1}',
    "invalid UTF-8": b'{"model": "\xff\xfe"}',
    "overlong UTF-8": b'{"model": "\xc0\xaf"}',
    "BOM": b"\xef\xbb\xbf" + BODY,
    "UTF-16": json.dumps(chat()).encode("utf-16"),
    "gzip": b"\x1f\x8b\x08\x00\x00\x00\x00\x00",
    "depth 101": deep(100),
    "depth 1,000": deep(1000),
    "depth 100,000": deep(100_000),
    "objects 1,000 deep": deep_objects(1000),
    "objects 100,000 deep": deep_objects(100_000),
    "open brackets": b"[" * 100_000,
}

# field -> values of it that are wrong, and what `param` says where it is not the field itself
WRONG_CHAT: dict[str, list[tuple[Any, str]]] = {
    "model": [(5, ""), (None, ""), ([], ""), ("", ""), ("x" * 257, ""), ({"a": 1}, "")],
    "messages": [
        ([], ""),
        ("hi", ""),
        (None, ""),
        ({}, ""),
        ([5], "messages.0"),
        ([{}], "messages.0.role"),
        ([{"role": 5}], "messages.0.role"),
        ([{"role": ""}], "messages.0.role"),
        ([{"role": "user", "content": 5}], "messages.0.content"),
        ([{"role": "user", "content": {"text": "x"}}], "messages.0.content"),
        ([{"role": "user", "content": "x"}, {"role": "user", "content": ["x"]}], "messages.1.content.0"),
    ],
    "stream": [("true", ""), (1, ""), ([], "")],
    "stream_options": [("x", ""), ([], ""), ({"include_usage": "yes"}, "stream_options.include_usage")],
    "service_tier": [("gold", ""), (5, "")],
    "max_tokens": [("5", ""), (-1, ""), (1.5, ""), (True, ""), (10**30, "")],
    "max_completion_tokens": [("5", ""), (-1, ""), ([], "")],
    "temperature": [("warm", ""), (-1, ""), ([], ""), (True, "")],
    "top_p": [("x", ""), (1.5, ""), (-0.1, "")],
    "n": [("2", ""), (0, ""), (129, ""), (1.5, "")],
    "stop": [(5, ""), ({"a": 1}, ""), (["x", 5], "stop.1")],
    "seed": [("x", ""), (1.5, ""), (10**30, "")],
    "user": [(5, "")],
    "tools": [("x", ""), ([5], "tools.0")],
    "tool_choice": [(5, ""), ([], "")],
    "response_format": [("json", ""), ([], "")],
    "logprobs": [("yes", ""), (1, "")],
}
WRONG_PROMPTS: list[tuple[Any, str]] = [
    ({"a": 1}, "prompt"),
    (5, "prompt"),
    ([1, "a"], "prompt.0"),
    ([[1, "a"]], "prompt.0.1"),
]


class TestBodies:
    @pytest.mark.parametrize("body", BAD_BODIES.values(), ids=BAD_BODIES)
    async def test_what_is_not_a_json_object_is_refused(self, cluster: Cluster, body: bytes) -> None:
        """Whatever is sent instead of a JSON object gets a 400 that says what is wrong."""
        for path in (CHAT, COMPLETIONS):
            answer = await exchange(cluster.url, post(body, "content-type: application/json", path=path))
            assert check_error(answer, 400)["type"] == "invalid_request_error"

    async def test_depth_within_reason_is_fine(self, cluster: Cluster) -> None:
        """100 levels are accepted: real tool schemas are far below."""
        assert (await exchange(cluster.url, post(deep(99)))).status == 200

    @pytest.mark.parametrize(
        ("name", "value", "param"),
        [(name, value, param or name) for name, wrong in WRONG_CHAT.items() for value, param in wrong],
    )
    async def test_a_wrong_field_is_named(self, cluster: Cluster, name: str, value: Any, param: str) -> None:
        """A field of the wrong type or range gets a 400 whose `param` is its place in the request."""
        answer = await cluster.post(CHAT, chat() | {name: value})
        assert check_error(answer, 400)["param"] == param
        missing = name in ("model", "messages")
        if missing:
            without = {key: kept for key, kept in chat().items() if key != name}
            assert check_error(await cluster.post(CHAT, without), 400)["param"] == name

    @pytest.mark.parametrize(("prompt", "param"), WRONG_PROMPTS)
    async def test_a_wrong_prompt_is_named(self, cluster: Cluster, prompt: Any, param: str) -> None:
        """The same for the prompt of a text completion, whichever of its forms comes near."""
        answer = await cluster.post(COMPLETIONS, {"model": "echo", "prompt": prompt})
        assert check_error(answer, 400)["param"] == param

    async def test_null_is_as_good_as_absent(self, cluster: Cluster) -> None:
        """Optional fields may be null: many clients send them so."""
        nulls = dict.fromkeys(set(WRONG_CHAT) - {"model", "messages"})
        assert (await cluster.post(CHAT, chat() | nulls)).status_code == 200

    async def test_large_numbers(self, cluster: Cluster) -> None:
        """The largest integers that travel well are accepted."""
        assert (await cluster.post(CHAT, chat(seed=2**63 - 1, max_tokens=2**53))).status_code == 200

    async def test_of_a_key_that_comes_twice_the_last_counts(self, cluster: Cluster) -> None:
        """Gateway and backend agree about duplicate keys: the last one counts."""
        body = b'{"model": "none", "model": "echo", "messages": [], "messages": [{"role": "user", "content": "last"}]}'
        answer = await exchange(cluster.url, post(body))
        assert (answer.status, answer.json["choices"][0]["message"]["content"]) == (200, "last")
        body = b'{"model": "echo", "model": "none", "messages": [{"role": "user", "content": "last"}]}'
        check_error(await exchange(cluster.url, post(body)), 404, "model_not_found")

    @pytest.mark.parametrize(
        "kind", [None, "application/x-www-form-urlencoded", "text/plain", "application/json; charset=x"]
    )
    async def test_the_content_type_does_not_matter(self, cluster: Cluster, kind: str | None) -> None:
        """`curl -d` sends JSON as a form; it works all the same."""
        lines = [f"content-type: {kind}"] if kind else []
        assert (await exchange(cluster.url, post(BODY, *lines))).status == 200


class TestModelNames:
    @pytest.mark.parametrize(
        "name",
        [
            "a.b.c", "*", ">", "echo.*", "echo.>", "echo ", " echo", "Echo", "modèle", "日本語", "👩‍👩‍👧", "../../etc/passwd",
            "echo\x00", "echo\n", "echo\r\nx-evil: 1", "\x7f\x1b[31m", "$SYS.>", "_INBOX.>", "x" * 256, "日" * 256, "%00", "%2e%2e",
        ],
    )  # fmt: skip
    async def test_a_name_that_nobody_serves(self, cluster: Cluster, name: str) -> None:
        """Any name that nobody serves is 404 `model_not_found`, and never reaches NATS."""
        answer = await cluster.post(CHAT, chat(model=name))
        assert check_error(answer, 404, "model_not_found")["param"] == "model"
        assert "x-evil" not in answer.headers

    @pytest.mark.parametrize(
        "path",
        [
            "%00",
            "%ff",
            "a%0d%0ax-evil:%201",
            "%zz",
            "%u1234",
            "..%2f..%2fetc",
            "%E6%97%A5",
            "x" * 5000,
            "a//b",
            "a%3Fb%23c",
        ],
    )
    async def test_a_path_that_names_no_model(self, cluster: Cluster, path: str) -> None:
        """The same in `/v1/models/{id}`."""
        answer = await exchange(cluster.url, head(method="GET", path=f"/v1/models/{path}"))
        assert check_error(answer, 404)["code"] in ("model_not_found", "not_found")
        assert "x-evil" not in answer.headers

    async def test_a_served_name_with_every_special_character(self, cluster: Cluster) -> None:
        """A model called `a.b *c>/d` works from end to end."""
        answer = await cluster.post(CHAT, chat("hello", model="a.b *c>/d"))
        assert (answer.status_code, answer.json()["model"]) == (200, "a.b *c>/d")
        lines = [line async for line in cluster.stream(chat("hello", model="a.b *c>/d"))]
        assert lines[-1] == "[DONE]"
        assert (await cluster.get("/v1/models/a.b%20*c%3E/d")).json()["id"] == "a.b *c>/d"


class TestSize:
    """100 MB, which no request may have."""

    @staticmethod
    def _memory(pid: int, what: str) -> int:
        status = Path(f"/proc/{pid}/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith(what)).split()[1]) * 1024

    @pytest.mark.parametrize("chunked", [False, True], ids=["with Content-Length", "chunked"])
    async def test_a_huge_body_is_refused_before_its_end(self, cluster: Cluster, chunked: bool) -> None:
        """A body over the limit is 413 as soon as that is known; the gateway neither reads on nor keeps it."""
        pid = cluster.gateways[0].pid
        assert pid is not None
        measured = Path(f"/proc/{pid}/status").exists()
        before = 0
        if measured:
            with contextlib.suppress(OSError):
                Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak begins again
            before = self._memory(pid, "VmRSS")
        piece = b"x" * 65536
        framed = b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece
        sent = 0

        async def send(connection: Wire) -> None:
            nonlocal sent
            with contextlib.suppress(ConnectionError):
                while sent < LARGE:
                    await connection.send(framed)
                    sent += len(piece)

        async with wire(cluster.url) as connection:
            length = "transfer-encoding: chunked" if chunked else f"content-length: {LARGE}"
            await connection.send(head(length, "content-type: application/json"))
            sending = asyncio.create_task(send(connection))
            answer = await connection.answer()
            assert await connection.ended()
            sending.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await sending
        check_error(answer, 413, "request_too_large")
        assert answer.headers["connection"] == "close"
        assert sent < LARGE / 2
        if measured:
            assert self._memory(pid, "VmHWM") - before < RSS_GROWTH
        await works(cluster)

    async def test_a_client_that_asks_first_sends_nothing(self, cluster: Cluster) -> None:
        """`Expect: 100-continue` before a huge body gets the 413 at once, and no `100 Continue`."""
        answer = await exchange(cluster.url, head("expect: 100-continue", f"content-length: {LARGE}"))
        check_error(answer, 413, "request_too_large")

    @pytest.mark.parametrize("lines", [["x-large: " + "x" * 600_000], [f"x-{n}: {'x' * 1000}" for n in range(600)]])
    async def test_huge_headers(self, cluster: Cluster, lines: list[str]) -> None:
        """Headers have a limit too."""
        async with wire(cluster.url) as connection:
            with contextlib.suppress(ConnectionError):
                await connection.send(head(*lines)[:-2])
            check_error(await connection.answer(), 431, "headers_too_large")
        await works(cluster)


class TestTime:
    async def test_a_slow_body(self, impatient_url: str) -> None:
        """A body that does not arrive in time is 408, and the SDKs are told not to try again."""
        async with wire(impatient_url) as connection:
            await connection.send(head(f"content-length: {len(BODY)}") + BODY[:20])
            answer = await connection.answer()
            check_error(answer, 408, "request_timeout")
            assert answer.headers["x-should-retry"] == "false"
            assert await connection.ended()

    async def test_slow_headers(self, impatient_url: str) -> None:
        """So are headers."""
        async with wire(impatient_url) as connection:
            await connection.send(head()[:-2])
            check_error(await connection.answer(), 408, "request_timeout")
            assert await connection.ended()

    async def test_a_body_in_many_pieces(self, cluster: Cluster) -> None:
        """A body may come byte by byte."""
        async with wire(cluster.url) as connection:
            await connection.send(head(f"content-length: {len(BODY)}"))
            for byte in BODY:
                await connection.send(bytes([byte]))
            assert (await connection.answer()).status == 200


class TestFraming:
    @pytest.mark.parametrize(
        "data",
        [
            head("content-length: 5", "content-length: 6") + b"hello",
            head("content-length: 5", "transfer-encoding: chunked") + b"0\r\n\r\n",
            head("content-length: -5") + b"hello",
            head("content-length: five") + b"hello",
            head("content-length: 99999999999999999999999999") + b"hello",
            head("transfer-encoding: chunked") + b"zz\r\nhello\r\n",
            head("transfer-encoding: gzip") + b"hello",
            head("x-a: b\rc"),
            head("x-a: b\x00c"),
            head(" x-a: folded"),
            head("x a: b"),
            head(path="/v1/mödels", method="GET"),
            head(path="http://host", method="GET"),
            head(method="CONNECT", path="host:80"),
            head(method="BREW"),
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 200,
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            b"\r\n\r\nhello\r\n\r\n",
        ],
        ids=lambda data: repr(bytes(data[:200].split(b"KEY")[-1][-60:]))[2:-1],
    )
    async def test_what_is_not_http(self, cluster: Cluster, data: bytes) -> None:
        """What is not HTTP/1.1, or could be read in two ways, is a 400 with an error object, and the connection ends."""
        async with wire(cluster.url) as connection:
            await connection.send(data)
            check_error(await connection.answer(), 400, "invalid_http")
            assert await connection.ended()

    async def test_a_content_length_that_is_too_small(self, cluster: Cluster) -> None:
        """The request is what its Content-Length says; what follows is not taken for another request's answer."""
        async with wire(cluster.url) as connection:
            await connection.send(head("content-length: 10") + BODY)
            check_error(await connection.answer(), 400)
            assert await connection.ended()

    async def test_a_body_that_breaks_off(self, cluster: Cluster) -> None:
        """A client that goes away in the middle of its body harms nobody."""
        for _ in range(5):
            async with wire(cluster.url) as connection:
                await connection.send(head("content-length: 1000") + BODY)
        await works(cluster)

    async def test_chunked_bodies(self, cluster: Cluster) -> None:
        """A body may come in chunks, with extensions and trailers."""
        chunks = b"".join(b"1;x=y\r\n%c\r\n" % byte for byte in BODY) + b"0\r\nx-trailer: 1\r\n\r\n"
        answer = await exchange(cluster.url, head("transfer-encoding: chunked") + chunks)
        assert answer.status == 200

    async def test_expect_100_continue(self, cluster: Cluster) -> None:
        """A client that waits for `100 Continue` gets it, and then its answer."""
        async with wire(cluster.url) as connection:
            await connection.send(head("expect: 100-continue", f"content-length: {len(BODY)}"))
            assert (await connection.answer()).status == 100
            await connection.send(BODY)
            assert (await connection.answer()).status == 200

    async def test_http_1_0(self, cluster: Cluster) -> None:
        """HTTP/1.0 clients are served: no chunks, and the connection ends with the answer."""
        async with wire(cluster.url) as connection:
            await connection.send(post(version="1.0"))
            assert (await connection.answer()).json["choices"][0]["message"]["content"] == "hi you"
            assert await connection.ended()
        answer = await exchange(cluster.url, post(json.dumps(chat(stream=True)).encode(), version="1.0"))
        assert "transfer-encoding" not in answer.headers
        lines = data_lines(answer.body.decode())
        assert lines[-1] == "[DONE]"
        assert all(json.loads(line)["object"] == "chat.completion.chunk" for line in lines[:-1])
        assert answer.body.startswith(b"data: ")

    async def test_pipelined_requests(self, cluster: Cluster) -> None:
        """Requests sent in one go are answered one after the other."""
        texts = ["one", "two", "three"]
        async with wire(cluster.url) as connection:
            await connection.send(b"".join(post(json.dumps(chat(text)).encode()) for text in texts))
            answers = [(await connection.answer()).json for _ in texts]
        assert [answer["choices"][0]["message"]["content"] for answer in answers] == texts

    @pytest.mark.parametrize("more", [b"", post(), b"nonsense\r\n\r\n"], ids=["alone", "pipelined", "nonsense"])
    async def test_a_caller_who_hangs_up(self, cluster: Cluster, eventually: Any, more: bytes) -> None:
        """A caller who hangs up stops the work, whatever else it has sent."""
        body = json.dumps(chat(model="a.b *c>/d", echo={"delay_ms": 60_000})).encode()
        async with wire(cluster.url) as connection:
            await connection.send(post(body) + more)
            await eventually(lambda: cluster.in_progress("a.b *c>/d"))
        await eventually(lambda: is_idle(cluster, "a.b *c>/d"))

    async def test_nonsense_after_a_request(self, cluster: Cluster) -> None:
        """Nonsense that follows a request does not take its answer away."""
        async with wire(cluster.url) as connection:
            await connection.send(post() + b"\x00\x01 nonsense\r\n\r\n")
            assert (await connection.answer()).status == 200
            assert await connection.ended()

    async def test_an_offer_to_upgrade(self, cluster: Cluster) -> None:
        """`curl --http2` and Java's HttpClient offer HTTP/2 with their request; it is answered over HTTP/1.1, body and all."""
        offer = ["connection: Upgrade, HTTP2-Settings", "upgrade: h2c", "http2-settings: AAMAAABkAAQAoAAAAAIAAAAA"]
        async with wire(cluster.url) as connection:
            await connection.send(post(BODY, *offer))
            assert (await connection.answer()).json["choices"][0]["message"]["content"] == "hi you"
            await connection.send(head(*offer, f"content-length: {len(BODY)}"))
            await connection.send(BODY)
            assert (await connection.answer()).status == 200
            await connection.send(head("connection: upgrade", "upgrade: websocket", method="GET", path="/v1/models"))
            assert (await connection.answer()).status == 200

    async def test_header_injection(self, cluster: Cluster) -> None:
        """Nothing that a caller sends becomes a header of an answer, but for the CORS headers that it asks for."""
        answer = await cluster.post(CHAT, chat(model="echo"), headers={"x-request-id": "mine", "origin": "http://a.b"})
        assert answer.headers["x-request-id"].startswith("req_")
        assert answer.headers["access-control-allow-origin"] == "*"
        evil = await exchange(cluster.url, post(b'{"model": "a\\r\\nx-evil: 1", "messages": [{"role": "user"}]}'))
        check_error(evil, 404)
        assert "x-evil" not in evil.headers


class TestRoutes:
    PATHS = [
        CHAT, COMPLETIONS, "/v1/models", "/v1/models/echo", "/v1/workers", "/v1/queues", "/v1/workers/none/drain", "/v1", "/v1/",
        "/v1/nothing", "/v1/models/", CHAT + "/", "//v1/models", "//v1" + CHAT, "/v1//models", "/v1/../v1/models", "/nothing", "/", "/health",
    ]  # fmt: skip

    @pytest.mark.parametrize(
        "method", ["GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE", "TRACE", "PROPFIND"]
    )
    @pytest.mark.parametrize("path", PATHS)
    async def test_every_method_everywhere(self, cluster: Cluster, path: str, method: str) -> None:
        """Every method on every path gets an answer or an error object, never a 500, never a redirect."""
        answer = await exchange(
            cluster.url, head("content-length: 0", method=method, path=path), head_only=method == "HEAD"
        )
        assert answer.headers["x-request-id"].startswith("req_")
        assert answer.status < 300 or 400 <= answer.status < 500
        if method == "OPTIONS":
            assert answer.status == 204
        elif answer.status >= 400 and method != "HEAD":
            check_error(answer, answer.status)
        if answer.status == 405:
            assert answer.headers["allow"]

    @pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
    async def test_get_where_post_is_meant(self, cluster: Cluster, path: str) -> None:
        """GET on an inference route is 405 and names POST."""
        answer = await cluster.get(path)
        check_error(answer, 405, "method_not_allowed")
        assert answer.headers["allow"] == "POST"

    async def test_405_names_all_methods_of_the_path(self, cluster: Cluster) -> None:
        """Also where several routes share it."""
        answer = await cluster.http.delete(cluster.url + "/v1/jobs")
        error = check_error(answer, 405, "method_not_allowed")
        assert answer.headers["allow"] == "GET, POST"
        assert error["message"].endswith("It accepts GET, POST.")

    async def test_a_base_url_without_its_prefix(self, cluster: Cluster) -> None:
        """The most usual mistake of a first hour is answered with what to do."""
        answer = await cluster.http.post(cluster.url + "/chat/completions", json={})
        assert "must end in /v1" in check_error(answer, 404, "not_found")["message"]

    async def test_a_wrong_value_of_a_query_is_named(self, cluster: Cluster) -> None:
        """The message alone says which one."""
        answer = await cluster.http.get(cluster.url + "/v1/jobs?status=bogus")
        assert check_error(answer, 400)["message"].startswith("'status'")

    async def test_head_is_get_without_a_body(self, cluster: Cluster) -> None:
        """HEAD works where GET does: monitors use it."""
        for path in ("/health", "/readyz", "/v1/models"):
            assert (await cluster.http.head(cluster.url + path)).status_code == 200

    async def test_odd_queries(self, cluster: Cluster) -> None:
        """Query strings that no route reads are passed over."""
        for query in ("?limit=abc&after=%ff%00", "?" + "a=b&" * 1000, "?%", "??"):
            answer = await exchange(cluster.url, head(method="GET", path="/v1/models" + query))
            assert answer.status == 200
        assert (await exchange(cluster.url, post(path=CHAT + "?api-version=2024-01-01"))).status == 200


class TestBrowsers:
    ORIGIN = {"origin": "https://app.example"}

    async def test_preflight(self, cluster: Cluster) -> None:
        """A browser may ask without a key, and may send what OpenAI's SDK sends."""
        wanted = "authorization,content-type,x-stainless-arch,x-stainless-lang,x-stainless-os,x-stainless-retry-count"
        asked = self.ORIGIN | {"access-control-request-method": "POST", "access-control-request-headers": wanted}
        async with httpx.AsyncClient() as browser:
            for path in (CHAT, "/v1/models", "/v1/models/org/name:tag"):
                answer = await browser.options(cluster.url + path, headers=asked)
                assert answer.status_code == 204
                assert answer.headers["access-control-allow-origin"] in ("*", self.ORIGIN["origin"])
                assert answer.headers["access-control-allow-headers"] == wanted
                assert "POST" in answer.headers["access-control-allow-methods"]

    async def test_answers_and_errors_can_be_read(self, cluster: Cluster) -> None:
        """A page can read answers, streams and errors of every kind, and their request ids."""
        async with httpx.AsyncClient(headers=self.ORIGIN) as browser:
            key = {"authorization": f"Bearer {KEY}"}
            answers = [
                await browser.post(cluster.url + CHAT, json=chat(), headers=key),
                await browser.post(cluster.url + CHAT, json=chat(stream=True), headers=key),
                await browser.post(cluster.url + CHAT, json=chat()),
                await browser.post(cluster.url + CHAT, content=b"{", headers=key),
                await browser.post(cluster.url + CHAT, json=chat(model="none"), headers=key),
                await browser.get(cluster.url + CHAT, headers=key),
                await browser.get(cluster.url + "/v1/nothing", headers=key),
                await browser.get(cluster.url + "/v1/models"),
            ]
        assert [answer.status_code for answer in answers] == [200, 200, 401, 400, 404, 405, 404, 401]
        for answer in answers:
            assert answer.headers["access-control-allow-origin"] == "*"
            assert "x-request-id" in answer.headers["access-control-expose-headers"]
        assert len({answer.headers["x-request-id"] for answer in answers}) == len(answers)

    async def test_without_an_origin_there_is_no_cors(self, cluster: Cluster) -> None:
        """Clients that are no browsers are not bothered with CORS headers."""
        assert not any(name.startswith("access-control") for name in (await cluster.get("/v1/models")).headers)


SECRET = "sk-very-secret-and-wrong"


class TestKeys:
    @staticmethod
    async def _routes(cluster: Cluster) -> list[tuple[str, str]]:
        document = (await cluster.get("/openapi.json")).json()
        return [
            (method.upper(), path.replace("{", "").replace("}", ""))
            for path, methods in document["paths"].items()
            for method in methods
            if path.startswith("/v1") and not path.startswith("/v1/results/")  # whose URLs are the permission
        ]

    async def test_every_route_wants_a_key(self, cluster: Cluster) -> None:
        """Every route under /v1 is 401 `invalid_api_key` without a key and with a wrong one, whatever else is wrong."""
        routes = await self._routes(cluster)
        assert len(routes) >= 5
        async with httpx.AsyncClient() as stranger:
            for method, path in routes:
                for headers in ({}, {"authorization": f"Bearer {SECRET}"}, {"authorization": ""}):
                    answer = await stranger.request(method, cluster.url + path, content=b"{not json", headers=headers)
                    check_wrong_key(answer, path)
                    assert answer.headers["www-authenticate"] == "Bearer"
                    assert SECRET not in answer.text + str(answer.headers)

    @pytest.mark.parametrize(
        "given",
        [
            KEY, f"Basic {KEY}", "Bearer", "Bearer ", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Bearer {KEY.upper()}", f"Bearer {KEY} x",
            f"Bearer, {KEY}", f"Token {KEY}", f"Bearer\t{KEY}", "Bearer \xff\xfe\xe9", "Bearer " + "x" * 50_000, "\xff", f"Bearer {KEY},Bearer {KEY}",
        ],
    )  # fmt: skip
    async def test_wrong_keys(self, cluster: Cluster, given: str) -> None:
        """Nothing but the key is the key; bytes that are no text are only wrong."""
        request = head(f"content-length: {len(BODY)}").replace(f"Bearer {KEY}".encode(), given.encode("latin-1")) + BODY
        answer = await exchange(cluster.url, request)
        check_error(answer, 401, "invalid_api_key")
        assert KEY not in answer.body.decode()

    @pytest.mark.parametrize("given", [f"bearer {KEY}", f"BEARER {KEY}", f"Bearer  {KEY}", f"Bearer {KEY}  "])
    async def test_right_keys(self, cluster: Cluster, given: str) -> None:
        """The scheme's case and blanks around the key do not matter."""
        request = head(f"content-length: {len(BODY)}").replace(f"Bearer {KEY}".encode(), given.encode()) + BODY
        assert (await exchange(cluster.url, request)).status == 200

    @pytest.mark.parametrize("length", [LARGE, 5])
    async def test_the_key_comes_before_the_body(self, cluster: Cluster, length: int) -> None:
        """A stranger's body is not looked at, not even waited for."""
        check_error(await exchange(cluster.url, head(f"content-length: {length}", key="wrong")), 401)

    async def test_a_gateway_without_a_key(self, keyless_url: str, cluster: Cluster) -> None:
        """Without a configured key nothing under /v1 opens, not even to an empty key."""
        async with httpx.AsyncClient() as stranger:
            for method, path in await self._routes(cluster):
                for headers in (
                    {},
                    {"authorization": f"Bearer {KEY}"},
                    {"authorization": "Bearer None"},
                ):
                    answer = await stranger.request(method, keyless_url + path, headers=headers)
                    check_wrong_key(answer, path)
            assert (await stranger.get(keyless_url + "/health")).status_code == 200
        check_error(await exchange(keyless_url, post(key="")), 401, "invalid_api_key")


FIELDS = [*(set(WRONG_CHAT) - {"model", "messages"}), "metadata", "logit_bias", "unknown", "prompt", "input"]
TEXT = st.text(max_size=20) | st.text(alphabet=st.characters(categories=("Cs", "Cc", "Lo")), max_size=5)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool", ""]) | JSON}, optional={"content": JSON, "name": JSON}
)
REQUEST = st.fixed_dictionaries(
    {"model": st.sampled_from(["echo"] * 8) | JSON, "messages": st.lists(MESSAGE, max_size=3) | JSON},
    optional=dict.fromkeys(FIELDS, JSON) | {"stream": st.booleans(), "n": st.integers(0, 3)},
)
MUTATED = st.builds(
    lambda body, at, char: body[: at % len(body)] + char + body[at % len(body) :],
    st.just(json.dumps(chat("hi", stream=True, stop=["x"], n=1))),
    st.integers(0, 200),
    st.sampled_from([*string.punctuation, "\\u", "\x00", "0", "null", "é"]),
)


class TestFuzz:
    async def test_no_small_body_breaks_it(self, cluster: Cluster) -> None:
        """Whatever a small body holds, the answer is a 200 or an error object of the caller's, never a 5xx."""

        def check(url: str, body: str, path: str) -> None:
            answer = caller.post(url + path, content=body.encode("utf-8", "surrogatepass"))
            if answer.status_code == 200:
                event = data_lines(answer.text)[-1] if "event-stream" in answer.headers["content-type"] else answer.text
                assert event == "[DONE]" or json.loads(event)["choices"], (body, answer.text)
            else:
                assert 400 <= answer.status_code < 500, (body, answer.text)
                check_error(answer, answer.status_code)

        @settings(max_examples=100, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(body=REQUEST.map(json.dumps) | MUTATED, path=st.sampled_from([CHAT, COMPLETIONS]))
        def fuzz(body: str, path: str) -> None:
            check(cluster.url, body, path)

        with httpx.Client(headers={"authorization": f"Bearer {KEY}"}, timeout=20) as caller:
            await asyncio.to_thread(fuzz)
        await works(cluster)
