"""Calls that are open in a session end with it."""

from __future__ import annotations

from typing import Any, cast

from backbone.testing.broadcast import MemoryBroadcast
from backbone.testing.documents import MemoryDocumentStore
from gateway.auth.authenticator import Authenticator
from gateway.auth.key_store import KeyStore
from gateway.http.asgi import EXCHANGE
from gateway.people.browser import Origin
from gateway.people.session_gate import SessionGate
from gateway.people.sessions import SessionStore
from schemas.errors import NexusError

TOKEN = "nexus-bootstrap"


class Call:
    """The exchange of an open call."""

    def __init__(self) -> None:
        self.error: NexusError | None = None

    def end_call(self, error: NexusError) -> None:
        self.error = error


class Gates:
    """A gate of one gateway, with a clock. Sessions end as at another gateway: in the store."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0
        self.documents = MemoryDocumentStore(lambda: self.now)
        self.auth = Authenticator(TOKEN)
        self.sessions = SessionStore(self.documents, idle_s=600, longest_s=3600, clock=lambda: self.now)
        keys = KeyStore(self.documents, MemoryBroadcast())
        self.gate = SessionGate(self.sessions, keys, self.auth, Origin())

    async def scope(self, secret: str, path: str = "/v1/jobs") -> dict[str, Any]:
        headers = [(b"cookie", b"nexus-session=" + secret.encode()), (b"host", b"nexus")]
        scope = {"type": "http", "method": "GET", "path": path, "headers": headers, EXCHANGE: Call()}
        await self.gate.enter(scope)
        return scope


def error_of(scope: dict[str, Any]) -> NexusError | None:
    return cast("Call", scope[EXCHANGE]).error


async def test_a_session_takes_its_open_calls_along() -> None:
    """Signed out anywhere, or too old: only its own calls end, and none while the store is away."""
    gates = Gates()
    key = gates.auth.fingerprint(TOKEN.encode())
    secrets = [await gates.sessions.begin(key=key) for _ in range(2)]
    first, second, ended = [await gates.scope(secret) for secret in (*secrets, secrets[0])]
    gate = gates.gate
    with gate.open_call(first), gate.open_call(second):
        with gate.open_call(ended):
            pass
        await gates.sessions.end(secrets[0])
        gates.documents.available = False
        await gate.end_calls()
        assert error_of(first) is None
        gates.documents.available = True
        await gate.end_calls()
        assert (error_of(first) is not None, error_of(second), error_of(ended)) == (True, None, None)
        gates.now += 3600
        await gate.end_calls()
        assert error_of(second) is not None
    assert not gate._calls


async def test_an_idle_session_keeps_its_open_calls() -> None:
    """And the call that signs out is answered itself; a request without a session is none of its business."""
    gates = Gates()
    secret = await gates.sessions.begin(key=gates.auth.fingerprint(TOKEN.encode()))
    gate = gates.gate
    stream, logout, stranger = [
        await gates.scope(*given) for given in ((secret,), (secret, "/auth/logout"), ("x" * 43,))
    ]
    with gate.open_call(stream), gate.open_call(logout), gate.open_call(stranger):
        gates.now += 700
        await gate.end_calls()
        assert error_of(stream) is None
        await gates.sessions.end(secret)
        await gate.end_calls()
    assert error_of(stream) is not None
    assert error_of(logout) is None
    assert error_of(stranger) is None
