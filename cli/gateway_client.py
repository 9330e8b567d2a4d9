"""The console's way to a gateway: where it is, which key opens it, and what to say when it does not answer.

| | looked for in this order |
|---|---|
| URL | `--url`, `NEXUS_URL`, the stack running on the data directory, `http://127.0.0.1:8800` |
| key | `--key-file` or `--key`, `NEXUS_API_KEY`, `NEXUS_API_KEY_FILE`, `GATEWAY_BEARER_TOKEN`, `GATEWAY_BEARER_TOKEN_FILE`, the running stack's, for its own URL |
"""

from __future__ import annotations

import json
import os
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from cli import http_client
from cli.errors import ConsoleError, GatewayError, GatewayUnreachable
from cli.stack.data_dir import DataDir

DEFAULT_URL = "http://127.0.0.1:8800"
KEY_FILE_VARIABLE = "GATEWAY_BEARER_TOKEN_FILE"
API_KEY_FILE_VARIABLE = "NEXUS_API_KEY_FILE"
READ_S = 30.0
STREAM_READ_S = 300.0
"""Between two bytes of a stream: a queued request is told its position far more often than that."""
EVENTS_READ_S = 60.0
"""The same of a job's events, which can be asked for again."""


@dataclass(frozen=True, slots=True)
class GatewayTarget:
    """A gateway, and the key for it."""

    url: str
    key: str = field(default="", repr=False)
    key_source: str = ""
    """Where the key is from, for messages: the key itself is never shown."""
    searched: str = field(default="", compare=False)
    """The data directory on which no stack runs, where the URL is the default for want of one."""


def find_target(url: str | None, key: str | None, data_dir: DataDir) -> GatewayTarget:
    """The gateway that the user means."""
    state = data_dir.running()
    chosen = (
        (url or os.environ.get("NEXUS_URL") or (state.url if state else DEFAULT_URL)).rstrip("/").removesuffix("/v1")
    )
    if "://" not in chosen:
        chosen = f"http://{chosen}"
    if key:
        return GatewayTarget(chosen, key, "--key or --key-file")
    if os.environ.get("NEXUS_API_KEY"):
        return GatewayTarget(chosen, os.environ["NEXUS_API_KEY"], "the environment variable NEXUS_API_KEY")
    if file := os.environ.get(API_KEY_FILE_VARIABLE):
        return GatewayTarget(chosen, _named_key(file), f"the file {file}")
    if os.environ.get("GATEWAY_BEARER_TOKEN"):
        return GatewayTarget(
            chosen, os.environ["GATEWAY_BEARER_TOKEN"], "the environment variable GATEWAY_BEARER_TOKEN"
        )
    if kept := _kept_key():
        return GatewayTarget(chosen, kept, f"the file {os.environ[KEY_FILE_VARIABLE]}")
    if state and state.url == chosen:
        return GatewayTarget(chosen, state.key, str(data_dir.state_file))
    return GatewayTarget(chosen, searched="" if state else str(data_dir.root))


def _named_key(file: str) -> str:
    try:
        return Path(file).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConsoleError(f"{API_KEY_FILE_VARIABLE}: the key cannot be read from {file}") from error


def _kept_key() -> str:
    """What a gateway beside this console, in the same container or environment, has for a key."""
    with suppress(OSError, UnicodeDecodeError):
        return Path(os.environ.get(KEY_FILE_VARIABLE) or os.devnull).read_text().strip()
    return ""


class ServerSentEvent(NamedTuple):
    """One event of a stream."""

    id: str
    event: str
    data: str


class ApiClient:
    """HTTP calls to one gateway. Whatever goes wrong is a ConsoleError that says what to do."""

    def __init__(self, target: GatewayTarget) -> None:
        self.target = target
        self._http = http_client.ConsoleHttpClient(
            target.url, {"authorization": f"Bearer {target.key}"} if target.key else {}
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Each request has closed its own connection."""

    def get(self, path: str, *, accept: tuple[int, ...] = (), read_s: float = READ_S) -> Any:
        """The JSON at `path`; statuses in `accept` count as success."""
        return self._call("GET", path, accept=accept, read_s=read_s)

    def post(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON answer to `body`."""
        return self._call("POST", path, body, read_s=STREAM_READ_S)

    def post_form(self, path: str, fields: Mapping[str, Any], files: http_client.Files, **headers: str) -> Any:
        """The JSON answer to a form; files are read as they are sent."""
        body, described = http_client.form(fields, files)
        with self._answer("POST", path, body=body, headers={**headers, **described}, read_s=STREAM_READ_S) as response:
            return _json(response, self.target.url)

    def put(self, path: str, body: dict[str, Any]) -> Any:
        """The JSON answer to `body`."""
        return self._call("PUT", path, body)

    def delete(self, path: str) -> Any:
        """The JSON answer."""
        return self._call("DELETE", path)

    def _call(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        accept: tuple[int, ...] = (),
        read_s: float = READ_S,
    ) -> Any:
        sent = None if body is None else json.dumps(body).encode()
        with self._answer(method, path, body=sent, accept=accept, read_s=read_s) as response:
            return _json(response, self.target.url)

    def stream(self, path: str, body: dict[str, Any]) -> Generator[dict[str, Any]]:
        """The `data:` frames of a stream, until `[DONE]`. A stream that ends without it is an error."""
        with self._answer("POST", path, body=json.dumps(body).encode(), read_s=STREAM_READ_S) as response:
            for line in _lines(response):
                if line.startswith("data:"):
                    data = line[5:].strip()
                    if data == "[DONE]":
                        return
                    yield _frame(data)
        raise ConsoleError("the answer broke off before its end; try again")

    def events(self, path: str, after: str = "") -> Generator[ServerSentEvent]:
        """The events of a stream behind the one with id `after`, until it ends or breaks off."""
        headers = {"accept": "text/event-stream"} | ({"last-event-id": after} if after else {})
        with self._answer("GET", path, headers=headers, read_s=EVENTS_READ_S) as response:
            yield from _events(_lines(response))

    @contextmanager
    def download(self, path: str) -> Iterator[http_client.Response]:
        """What is at `path`, to be read as it comes."""
        with self._answer("GET", path, read_s=STREAM_READ_S) as response:
            yield response

    @contextmanager
    def _answer(
        self,
        method: str,
        path: str,
        *,
        read_s: float,
        body: bytes | Iterable[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
        accept: tuple[int, ...] = (),
    ) -> Iterator[http_client.Response]:
        """Send a request, and give its answer unless that is an error, which is a ConsoleError."""
        kind = {"content-type": "application/json"} if isinstance(body, bytes) else {}
        with self._translated():
            response = self._http.send(method, path, read_s=read_s, body=body, headers={**kind, **(headers or {})})
            with closing(response):
                if not 200 <= response.status < 300 and response.status not in accept:
                    raise GatewayError(self._refusal(response), status=response.status, code=_error_code(response))
                yield response

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Turn exceptions of HTTP into words."""
        url = self.target.url
        try:
            yield
        except http_client.UntrustedCertificate as error:
            raise ConsoleError(
                f"{url} has a certificate that this machine does not trust ({error}). "
                "Name the file of its authority with SSL_CERT_FILE."
            ) from error
        except http_client.NoConnection as error:
            raise GatewayUnreachable(
                f"no gateway answers at {url}{self._searched()}. Is it up? Start one with `nexus up`, "
                "or name another with --url or NEXUS_URL, or the folder of a `nexus up` with --data-dir."
            ) from error
        except http_client.InvalidUrl as error:
            raise ConsoleError(f"{url} is not a URL like {DEFAULT_URL}: {error}") from error
        except http_client.TimedOut as error:
            raise GatewayUnreachable(f"the gateway at {url} did not answer in time") from error
        except http_client.HttpError as error:
            raise GatewayUnreachable(f"the connection to {url} broke: {error}") from error

    def _searched(self) -> str:
        return f", and no `nexus up` runs on {self.target.searched}" if self.target.searched else ""

    def _refusal(self, response: http_client.Response) -> str:
        """What an error status means to the user."""
        said = error_message(response)
        if response.status == HTTPStatus.UNAUTHORIZED:
            if not self.target.key:
                return (
                    f"{self.target.url} wants a key, and none was given{self._searched()}: pass --key-file, set "
                    "NEXUS_API_KEY (`nexus up` prints its key), or name the folder of `nexus up` with --data-dir."
                )
            return f"{self.target.url} does not know the key from {self.target.key_source}: {said}"
        if response.status == HTTPStatus.FORBIDDEN:
            return f"the key from {self.target.key_source or 'nowhere'} may not do that: {said}"
        request_id = response.headers.get("x-request-id")
        return f"{said} (status {response.status}{f', request {request_id}' if request_id else ''})"


def error_message(response: http_client.Response) -> str:
    """The message of OpenAI's error object, or the beginning of whatever came instead."""
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return response.read().decode(errors="replace")[:200].strip() or response.reason or "no reason given"


def _error_code(response: http_client.Response) -> str:
    try:
        return str(response.json()["error"]["code"] or "")
    except (ValueError, KeyError, TypeError):
        return ""


def _lines(response: http_client.Response) -> Iterator[str]:
    """Lines as server-sent events have them: str.splitlines also ends at characters like U+2028, which JSON may hold."""
    left = b""
    for part in response.parts():
        *whole, left = (left + part).split(b"\n")
        for line in whole:
            yield line.removesuffix(b"\r").decode(errors="replace")
    if left:
        yield left.decode(errors="replace")


def _events(lines: Iterator[str]) -> Iterator[ServerSentEvent]:
    """One that is cut off before its blank line is none."""
    found = {"id": "", "event": "", "data": ""}
    for line in lines:
        name, _, value = line.partition(":")
        if not line:
            if found["event"] or found["data"]:
                yield ServerSentEvent(found["id"], found["event"], found["data"].removesuffix("\n"))
            found |= {"event": "", "data": ""}
        elif name == "data":
            found["data"] += value.removeprefix(" ") + "\n"
        elif name in found:
            found[name] = value.removeprefix(" ")


def _json(response: http_client.Response, url: str) -> Any:
    try:
        return response.json()
    except ValueError as error:
        raise ConsoleError(f"{url} does not answer JSON: is it a Nexus gateway?") from error


def _frame(data: str) -> dict[str, Any]:
    try:
        frame = json.loads(data)
    except ValueError as error:
        raise ConsoleError(f"the gateway sent a frame that is not JSON: {data[:100]}") from error
    if not isinstance(frame, dict):
        raise ConsoleError(f"the gateway sent a frame that is not an object: {data[:100]}")
    if frame.get("error"):
        raise ConsoleError(str(frame["error"].get("message", frame["error"])))
    return frame
