"""A double of a gateway over real HTTP: a test gives its answers."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx

Answer = Callable[[httpx.Request], httpx.Response]
_running: list[ThreadingHTTPServer] = []


class Handler(BaseHTTPRequestHandler):
    """One request. An httpx.HTTPError from the answer, or in its middle, breaks the connection off."""

    protocol_version = "HTTP/1.1"
    answer: Answer

    def do(self) -> None:
        url = f"http://{self.headers.get('host', 'gw')}{self.path}"
        content = self.rfile.read(int(self.headers.get("content-length") or 0)) or b"".join(self.chunks())
        self.close_connection = True
        try:
            self.send(
                type(self).answer(httpx.Request(self.command, url, headers=self.headers.items(), content=content))
            )
        except httpx.HTTPError:
            return
        except KeyboardInterrupt:  # Ctrl-C at the console that reads this answer
            os.kill(os.getpid(), signal.SIGINT)
            self.rfile.read(1)

    def send(self, response: httpx.Response) -> None:
        self.send_response(response.status_code)
        for name, value in response.headers.items():
            if name not in ("content-length", "transfer-encoding"):
                self.send_header(name, value)
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for part in response.iter_bytes():
            self.wfile.write(b"%x\r\n%b\r\n" % (len(part), part))
        self.wfile.write(b"0\r\n\r\n")

    def chunks(self) -> Iterator[bytes]:
        if self.headers.get("transfer-encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Nobody reads it."""


def serve(answer: Answer) -> str:
    """Return the URL of a server that gives `answer` each request, until the test ends (tests/unit/conftest.py)."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Answering", (Handler,), {"answer": staticmethod(answer)}))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    _running.append(server)
    return f"http://127.0.0.1:{server.server_port}"


def close_all() -> None:
    """Stop every server that `serve` started."""
    while _running:
        server = _running.pop()
        server.shutdown()
        server.server_close()
