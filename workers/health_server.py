"""The worker's own small HTTP server, in a thread: `/health`, `/readyz`, and `/metrics` at any other path.

| path | 200 | 503 |
|---|---|---|
| `/health` | the worker's event loop turns | it has not within `TURN_S`: start the process again |
| `/readyz` | it takes jobs | with the state in JSON: no connection to NATS, an inference server that does not answer, draining |

`problems` in the answer to `/readyz` says why the worker is unhealthy, or what it does not serve though it is ready.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app, start_http_server

TURN_S = 3.0
"""For the event loop to take a turn: a busy one takes milliseconds."""

App = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


def serve_probes(
    host: str,
    port: int,
    registry: CollectorRegistry,
    state: Callable[[], str],
    problems: Callable[[], Sequence[str]] = tuple,
) -> WSGIServer:
    """Answer on this address until the process ends, whose running loop asks `state`. Raises OSError."""
    server, _ = start_http_server(port, host, registry)
    server.set_app(probe_app(asyncio.get_running_loop(), state, make_wsgi_app(registry), problems))
    return server


def probe_app(
    loop: asyncio.AbstractEventLoop,
    state: Callable[[], str],
    metrics: Any,
    problems: Callable[[], Sequence[str]] = tuple,
) -> App:
    """The WSGI application; `state`, `ready` for a worker that takes jobs, is asked in the loop."""

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        if path not in {"/health", "/readyz"}:
            return list(metrics(environ, start_response))
        found = _asked(loop, state)
        ok = found == "ready" if path == "/readyz" else found is not None
        said = "stuck" if found is None else found if path == "/readyz" else "ok"
        start_response("200 OK" if ok else "503 Service Unavailable", [("Content-Type", "application/json")])
        answer: dict[str, Any] = {"status": said}
        if path == "/readyz" and (sentences := list(problems())):
            answer["problems"] = sentences
        return [json.dumps(answer).encode()]

    return app


def _asked(loop: asyncio.AbstractEventLoop, state: Callable[[], str]) -> str | None:
    """What `state` says in the loop's own turn; None: the loop takes none."""

    async def ask() -> str:
        return state()

    try:
        return asyncio.run_coroutine_threadsafe(ask(), loop).result(TURN_S)
    except (concurrent.futures.TimeoutError, concurrent.futures.CancelledError):
        return None
