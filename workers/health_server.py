"""The worker's HTTP server for probes, in a thread: `/health`, `/readyz`, and metrics at any other path.

| path | 200 | 503 |
|---|---|---|
| `/health` | the worker's event loop runs | it did not run within `LOOP_TIMEOUT_S`: restart the process |
| `/readyz` | the worker takes jobs | the state in JSON: disconnected from NATS, an inference server that does not answer, draining |

`problems` in the answer to `/readyz` says why the worker is unhealthy, or what a ready worker does not serve.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app, start_http_server

LOOP_TIMEOUT_S = 3.0
"""How long the event loop may take to run a callback; a busy one takes milliseconds."""

App = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


def serve_probes(
    host: str,
    port: int,
    registry: CollectorRegistry,
    state: Callable[[], str],
    problems: Callable[[], Sequence[str]] = tuple,
) -> WSGIServer:
    """Answer on this address until the process ends; `state` is called in the running event loop. Raises OSError."""
    server, _ = start_http_server(port, host, registry)
    server.set_app(probe_app(asyncio.get_running_loop(), state, make_wsgi_app(registry), problems))
    return server


def probe_app(
    loop: asyncio.AbstractEventLoop,
    state: Callable[[], str],
    metrics: Any,
    problems: Callable[[], Sequence[str]] = tuple,
) -> App:
    """Return the WSGI application. `state`, which is called in the loop, returns `ready` for a worker that takes jobs."""

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        if path not in {"/health", "/readyz"}:
            return list(metrics(environ, start_response))
        current = _call_in_loop(loop, state)
        ok = current == "ready" if path == "/readyz" else current is not None
        status = "stuck" if current is None else current if path == "/readyz" else "ok"
        start_response("200 OK" if ok else "503 Service Unavailable", [("Content-Type", "application/json")])
        answer: dict[str, Any] = {"status": status}
        if path == "/readyz" and (listed := list(problems())):
            answer["problems"] = listed
        return [json.dumps(answer).encode()]

    return app


def _call_in_loop(loop: asyncio.AbstractEventLoop, state: Callable[[], str]) -> str | None:
    """Return the result of `state`, called in the loop; None where the loop does not run."""

    async def call() -> str:
        return state()

    try:
        return asyncio.run_coroutine_threadsafe(call(), loop).result(LOOP_TIMEOUT_S)
    except (concurrent.futures.TimeoutError, concurrent.futures.CancelledError):
        return None
