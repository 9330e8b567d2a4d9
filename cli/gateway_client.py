"""Calls to a gateway: find its URL and its key, send requests, and turn failures into messages for the user.

| | searched in this order |
|---|---|
| URL | `--url`, `NEXUS_URL`, the stack running on the data directory, `http://127.0.0.1:8800` |
| key | `--key-file` or `--key`, `NEXUS_API_KEY`, `NEXUS_API_KEY_FILE`, `GATEWAY_BEARER_TOKEN`, `GATEWAY_BEARER_TOKEN_FILE`, the key of the running stack, for its own URL |
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
READ_TIMEOUT_S = 30.0
STREAM_READ_TIMEOUT_S = 300.0
"""Between two reads of a stream: a queued request gets its position far more often than that."""
EVENTS_READ_TIMEOUT_S = 60.0
"""Between two reads of a job's events, which can be requested again."""


@dataclass(frozen=True, slots=True)
class GatewayTarget:
    """The URL of a gateway, and the key for it."""

    url: str
    key: str = field(default="", repr=False)
    key_source: str = ""
    """Where the key was found, for messages: the key itself is never shown."""
    searched: str = field(default="", compare=False)
    """The data directory that was searched for a running stack, if none was found."""


def find_target(url: str | None, key: str | None, data_dir: DataDir) -> GatewayTarget:
    """Return the gateway that the options, the environment and the data directory name. Raises ConsoleError."""
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
        return GatewayTarget(chosen, _read_key_file(file), f"the file {file}")
    if os.environ.get("GATEWAY_BEARER_TOKEN"):
        return GatewayTarget(
            chosen, os.environ["GATEWAY_BEARER_TOKEN"], "the environment variable GATEWAY_BEARER_TOKEN"
        )
    if bootstrap_key := _bootstrap_key():
        return GatewayTarget(chosen, bootstrap_key, f"the file {os.environ[KEY_FILE_VARIABLE]}")
    if state and state.url == chosen:
        return GatewayTarget(chosen, state.key, str(data_dir.state_file))
    return GatewayTarget(chosen, searched="" if state else str(data_dir.root))


def _read_key_file(file: str) -> str:
    try:
        return Path(file).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConsoleError(f"{API_KEY_FILE_VARIABLE}: the key cannot be read from {file}") from error


def _bootstrap_key() -> str:
    """Return the key of a gateway in the same container or environment; empty if there is none."""
    with suppress(OSError, UnicodeDecodeError):
        return Path(os.environ.get(KEY_FILE_VARIABLE) or os.devnull).read_text().strip()
    return ""


class ServerSentEvent(NamedTuple):
    """One event of a stream."""

    id: str
    event: str
    data: str


class ApiClient:
    """HTTP calls to one gateway. Each failure is a ConsoleError that says what to do."""

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
        """Do nothing: each request closes its own connection."""

    def get(self, path: str, *, accept: tuple[int, ...] = (), read_s: float = READ_TIMEOUT_S) -> Any:
        """Return the JSON at `path`. Statuses in `accept` count as success."""
        return self._call("GET", path, accept=accept, read_s=read_s)

    def post(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """Return the JSON answer to `body`."""
        return self._call("POST", path, body, read_s=STREAM_READ_TIMEOUT_S)

    def post_form(self, path: str, fields: Mapping[str, Any], files: http_client.Files, **headers: str) -> Any:
        """Return the JSON answer to a form. Files are read while they are sent."""
        body, described = http_client.encode_form(fields, files)
        with self._request(
            "POST", path, body=body, headers={**headers, **described}, read_s=STREAM_READ_TIMEOUT_S
        ) as response:
            return _json(response, self.target.url)

    def put(self, path: str, body: dict[str, Any]) -> Any:
        """Return the JSON answer to `body`."""
        return self._call("PUT", path, body)

    def patch(self, path: str, body: dict[str, Any]) -> Any:
        """Return the JSON answer to `body`."""
        return self._call("PATCH", path, body)

    def delete(self, path: str) -> Any:
        """Return the JSON answer."""
        return self._call("DELETE", path)

    def _call(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        accept: tuple[int, ...] = (),
        read_s: float = READ_TIMEOUT_S,
    ) -> Any:
        sent = None if body is None else json.dumps(body).encode()
        with self._request(method, path, body=sent, accept=accept, read_s=read_s) as response:
            return _json(response, self.target.url)

    def stream(self, path: str, body: dict[str, Any]) -> Generator[dict[str, Any]]:
        """Yield the `data:` frames of a stream until `[DONE]`. A stream that ends without it is an error."""
        with self._request("POST", path, body=json.dumps(body).encode(), read_s=STREAM_READ_TIMEOUT_S) as response:
            for line in _lines(response):
                if line.startswith("data:"):
                    data = line[5:].strip()
                    if data == "[DONE]":
                        return
                    yield _frame(data)
        raise ConsoleError("The answer broke off before its end. Try again.")

    def events(self, path: str, after: str = "") -> Generator[ServerSentEvent]:
        """Yield the events of a stream that follow the event with id `after`, until the stream ends or breaks off."""
        headers = {"accept": "text/event-stream"} | ({"last-event-id": after} if after else {})
        with self._request("GET", path, headers=headers, read_s=EVENTS_READ_TIMEOUT_S) as response:
            yield from _events(_lines(response))

    @contextmanager
    def download(self, path: str) -> Iterator[http_client.StreamedResponse]:
        """Open the response at `path`, to be read as it arrives."""
        with self._request("GET", path, read_s=STREAM_READ_TIMEOUT_S) as response:
            yield response

    @contextmanager
    def _request(
        self,
        method: str,
        path: str,
        *,
        read_s: float,
        body: bytes | Iterable[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
        accept: tuple[int, ...] = (),
    ) -> Iterator[http_client.StreamedResponse]:
        """Send a request and open its response. Raises ConsoleError, GatewayError for an error status."""
        kind = {"content-type": "application/json"} if isinstance(body, bytes) else {}
        with self._translate_errors():
            response = self._http.send(method, path, read_s=read_s, body=body, headers={**kind, **(headers or {})})
            with closing(response):
                if not 200 <= response.status < 300 and response.status not in accept:
                    raise GatewayError(
                        self._describe_error(response), status=response.status, code=_error_code(response)
                    )
                yield response

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        """Raise the errors of the HTTP client as messages for the user."""
        url = self.target.url
        try:
            yield
        except http_client.UntrustedCertificate as error:
            raise ConsoleError(
                f"This machine does not trust the certificate of {url} ({error}). "
                "Set SSL_CERT_FILE to the file with the certificate of its authority."
            ) from error
        except http_client.NoConnection as error:
            raise GatewayUnreachable(
                f"No gateway answers at {url}{self._searched()}. Start one with `nexus up`, or name another one with "
                "--url or NEXUS_URL, or the data directory of a running `nexus up` with --data-dir."
            ) from error
        except http_client.InvalidUrl as error:
            raise ConsoleError(f"{url} is not a URL like {DEFAULT_URL}: {error}") from error
        except http_client.HttpTimeout as error:
            raise GatewayUnreachable(f"The gateway at {url} did not answer in time.") from error
        except http_client.HttpError as error:
            raise GatewayUnreachable(f"The connection to {url} broke: {error}.") from error

    def _searched(self) -> str:
        return f", and no `nexus up` runs on {self.target.searched}" if self.target.searched else ""

    def _describe_error(self, response: http_client.StreamedResponse) -> str:
        """Return the message for an error status."""
        message = error_message(response)
        if response.status == HTTPStatus.UNAUTHORIZED:
            if not self.target.key:
                return (
                    f"{self.target.url} requires a key, and none was given{self._searched()}. Pass --key-file, set "
                    "NEXUS_API_KEY (`nexus up` prints its key), or name the data directory of `nexus up` with --data-dir."
                )
            return f"{self.target.url} rejects the key from {self.target.key_source}: {message}"
        if response.status == HTTPStatus.FORBIDDEN:
            return (
                f"The key from {self.target.key_source} has no permission for that: {message}"
                if self.target.key
                else message
            )
        request_id = response.headers.get("x-request-id")
        return f"{message} (status {response.status}{f', request {request_id}' if request_id else ''})"


def error_message(response: http_client.StreamedResponse) -> str:
    """Return the message of OpenAI's error object, or the beginning of another body."""
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return response.read().decode(errors="replace")[:200].strip() or response.reason or "no reason given"


def _error_code(response: http_client.StreamedResponse) -> str:
    try:
        return str(response.json()["error"]["code"] or "")
    except (ValueError, KeyError, TypeError):
        return ""


def _lines(response: http_client.StreamedResponse) -> Iterator[str]:
    """Yield the lines of a response. Not by str.splitlines, which also splits at characters like U+2028 within JSON."""
    left = b""
    for part in response.parts():
        *whole, left = (left + part).split(b"\n")
        for line in whole:
            yield line.removesuffix(b"\r").decode(errors="replace")
    if left:
        yield left.decode(errors="replace")


def _events(lines: Iterator[str]) -> Iterator[ServerSentEvent]:
    """Yield the server-sent events in `lines`. An event without its closing blank line is dropped."""
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


def _json(response: http_client.StreamedResponse, url: str) -> Any:
    try:
        return response.json()
    except ValueError as error:
        raise ConsoleError(f"{url} did not answer with JSON. Is it a Nexus gateway?") from error


def _frame(data: str) -> dict[str, Any]:
    try:
        frame = json.loads(data)
    except ValueError as error:
        raise ConsoleError(f"The gateway sent a frame that is not JSON: {data[:100]}") from error
    if not isinstance(frame, dict):
        raise ConsoleError(f"The gateway sent a frame that is not an object: {data[:100]}")
    if frame.get("error"):
        raise ConsoleError(str(frame["error"].get("message", frame["error"])))
    return frame
