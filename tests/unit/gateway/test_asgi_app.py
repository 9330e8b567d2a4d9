"""Reply and AsgiApp, called as bare ASGI."""

from __future__ import annotations

import json
from collections.abc import MutableMapping
from typing import Any, cast

import pytest

from gateway import asgi_app as asgi_app_module
from gateway.asgi_app import AsgiApp
from gateway.http.asgi import Reply, Send
from gateway.sync.handler import InferenceHandler
from schemas.endpoints import BY_PATH, EndpointSpec
from schemas.errors import AuthenticationFailed, ErrorInfo, InvalidRequest, QueueFull, RequestTooLarge

ENDPOINT = BY_PATH["/v1/chat/completions"]


class Wire:
    """Takes what is sent."""

    def __init__(self) -> None:
        self.messages: list[MutableMapping[str, Any]] = []

    async def send(self, message: MutableMapping[str, Any]) -> None:
        self.messages.append(message)

    @property
    def status(self) -> int:
        return int(self.messages[0]["status"])

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode(): value.decode("latin-1") for name, value in self.messages[0]["headers"]}

    @property
    def body(self) -> bytes:
        return b"".join(message["body"] for message in self.messages[1:])

    @property
    def ended(self) -> bool:
        return not self.messages[-1].get("more_body", True)


class TestReply:
    @pytest.mark.parametrize(
        ("info", "headers"),
        [
            (InvalidRequest("no").info, {}),
            (AuthenticationFailed().info, {"www-authenticate": "Bearer"}),
            (QueueFull().info, {"retry-after": "2"}),
            (RequestTooLarge().info, {"connection": "close"}),
        ],
    )
    async def test_errors(self, info: ErrorInfo, headers: dict[str, str]) -> None:
        """An error is OpenAI's object, with its length and the headers that go with it."""
        wire = Wire()
        await Reply(wire.send, "req_1").send_error(info)
        assert wire.status == info.status
        assert json.loads(wire.body) == info.body()
        length = {"content-length": str(len(wire.body)), "cache-control": "no-store"}
        expected = {"content-type": "application/json", **length, **headers}
        assert wire.headers == expected
        assert wire.ended

    async def test_streams(self) -> None:
        """Pieces go out as they come, after the headers that were added on the way."""
        wire = Wire()
        reply = Reply(wire.send, "req_1")
        reply.headers.append((b"x-nexus-job-id", b"job_1"))
        assert not reply.started
        await reply.send_head(200, [(b"content-type", b"text/event-stream")])
        await reply.send_chunk(b"a")
        await reply.send_end(b"b")
        assert reply.started
        assert wire.headers == {"content-type": "text/event-stream", "x-nexus-job-id": "job_1"}
        assert [message["body"] for message in wire.messages[1:]] == [b"a", b"b"]
        assert wire.ended


class Hot:
    """Stands where inference is."""

    def __init__(self, info: ErrorInfo | None = None) -> None:
        self.info = info
        self.served: list[str] = []

    async def serve(self, endpoint: EndpointSpec, _scope: Any, _receive: Any, send: Send) -> None:
        self.served.append(endpoint.path)
        reply = Reply(send, "req_1")
        if self.info is not None:
            await reply.send_error(self.info)
        else:
            await reply.send_response(200, "application/json", b"{}")


class Cold:
    """Stands where FastAPI is."""

    def __init__(self, error: Exception | None = None, info: ErrorInfo | None = None) -> None:
        self.error = error
        self.info = info
        self.methods: list[str] = []

    async def __call__(self, scope: Any, _receive: Any, send: Send) -> None:
        self.methods.append(scope["method"])
        if self.error is not None:
            raise self.error
        if self.info is not None:
            await Reply(send, "req_1").send_error(self.info)
        else:
            await Reply(send, "req_1").send_response(200, "text/plain", b"cold")


async def nothing() -> MutableMapping[str, Any]:
    raise AssertionError("the door reads no body")


async def ask(
    method: str = "POST",
    path: str = ENDPOINT.path,
    *,
    hot: Hot | None = None,
    cold: Cold | None = None,
    origins: str = "*",
    **headers: str,
) -> Wire:
    wire = Wire()
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "headers": [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in headers.items()],
    }
    await AsgiApp(cold or Cold(), cast("InferenceHandler", hot or Hot()), [ENDPOINT], origins)(
        scope, nothing, wire.send
    )
    return wire


class TestAsgiApp:
    async def test_dispatch_of_requests(self) -> None:
        """POST on an inference route takes the short way, everything else goes to FastAPI; HEAD as GET."""
        hot, cold = Hot(), Cold()
        for method, path in [
            ("POST", ENDPOINT.path),
            ("GET", ENDPOINT.path),
            ("POST", "/v1/other"),
            ("HEAD", "/health"),
        ]:
            assert (await ask(method, path, hot=hot, cold=cold)).status == 200
        assert hot.served == [ENDPOINT.path]
        assert cold.methods == ["GET", "POST", "GET"]

    async def test_every_answer_has_an_id_of_its_own(self) -> None:
        """No two answers share a request id, and no caller chooses it."""
        wires = [await ask(x_request_id="mine") for _ in range(3)] + [await ask("GET"), await ask("OPTIONS")]
        ids = [wire.headers["x-request-id"] for wire in wires]
        assert len(set(ids)) == len(ids)
        assert all(request_id.startswith("req_") for request_id in ids)

    async def test_a_defect_is_an_error_object(self) -> None:
        """Whatever a route raises, the caller gets a 500 with the request id and nothing of the exception."""
        wire = await ask("GET", "/v1/models", cold=Cold(RuntimeError("secret detail")))
        assert wire.status == 500
        message = json.loads(wire.body)["error"]["message"]
        assert wire.headers["x-request-id"] in message
        assert "secret" not in message

    async def test_a_refused_body_delays_the_close(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The answer to a body that is not read goes out whole, a moment before the connection is closed."""
        monkeypatch.setattr(asgi_app_module, "LINGER_S", 0.0)
        for path in (ENDPOINT.path, "/v1/other"):
            wire = await ask(path=path, hot=Hot(RequestTooLarge().info), cold=Cold(info=RequestTooLarge().info))
            *_, answer, end = wire.messages
            assert json.loads(answer["body"])["error"]["code"] == "request_too_large"
            assert answer["more_body"]
            assert (end["body"], end["more_body"]) == (b"", False)

    @pytest.mark.parametrize(
        ("origins", "origin", "allowed"),
        [
            ("*", "http://a", "*"),
            ("http://a, http://b", "http://b", "http://b"),
            ("http://a", "http://b", None),
            ("", "http://b", None),
            ("http://a", "http://a.evil", None),
        ],
    )
    async def test_cors(self, origins: str, origin: str, allowed: str | None) -> None:
        """Allowed origins, and only those, may read answers, errors and request ids."""
        for wire in (
            await ask(origins=origins, origin=origin),
            await ask(origins=origins, origin=origin, hot=Hot(InvalidRequest().info)),
            await ask("GET", "/nothing", origins=origins, origin=origin),
            await ask("OPTIONS", origins=origins, origin=origin),
        ):
            assert wire.headers.get("access-control-allow-origin") == allowed
            assert ("x-request-id" in wire.headers.get("access-control-expose-headers", "")) is (allowed is not None)
            if allowed not in (None, "*"):
                assert wire.headers["vary"] == "origin"

    async def test_preflight(self) -> None:
        """A preflight needs no key, and allows the headers that it names."""
        wire = await ask("OPTIONS", origin="http://a", access_control_request_headers="authorization, x-stainless-os")
        assert (wire.status, wire.body, wire.ended) == (204, b"", True)
        assert wire.headers["access-control-allow-headers"] == "authorization, x-stainless-os"
        assert "DELETE" in wire.headers["access-control-allow-methods"]
