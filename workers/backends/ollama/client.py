"""A client of Ollama's native API: lines of JSON, and errors as `{"error": "text"}`, as an answer or as a line of one."""

from __future__ import annotations

import re
from typing import Any

import orjson

from schemas.errors import ErrorInfo
from workers.adapter_kit.error_mapping import LOADING_PAUSE_S, error_from_response, parse_error_body
from workers.adapter_kit.http_client import BackendResponse, HttpClient
from workers.adapter_kit.sse import BYTE_ORDER_MARK, is_done_marker
from workers.adapter_kit.text import unicode_repair
from workers.backends.base import BackendError, BackendRefused, BackendUnavailable, ModelNotServed

JSON = dict[str, Any]

BODY_LIMIT = 64 * 1024 * 1024
"""Bytes of an answer in one piece, such as a batch of embeddings or a model's description."""
LINE_LIMIT = 16 * 1024 * 1024
LOAD_CANCELED_STATUS = 499
"""Ollama's status for a canceled load."""
CONTEXT_ERROR = re.compile(r"context (length|size|window)|prompt is longer", re.IGNORECASE)
# Ollama's errors for invalid requests, with status 500 or in a line.
BAD_INPUT_ERROR = re.compile(
    r"context length|does not support|image input|only supports one image|image: unknown format|decode image"
    r"|invalid image|grammar|json schema|invalid format|template: |template error|must be of type|illegal base64"
    r"|cannot unmarshal|missing data required|unsupported type|invalid model name|invalid duration",
    re.IGNORECASE,
)
LOADING_ERROR = re.compile(r"server loading model", re.IGNORECASE)
"""Ollama's error, with status 500, while a model loads."""
MISSING_MODEL_ERROR = re.compile(
    r"model ['\"].*not found|manifest: file does not exist|model does not exist", re.IGNORECASE
)


class LineSplitter:
    """Split a byte stream into JSON objects, one a line. Raises BackendError for a line that reports an error or is not an object.

    Characters that are cut between two lines are joined.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._joiner = unicode_repair.CharacterJoiner(lists=False)  # a tool call is never split between lines

    def feed(self, data: bytes) -> list[JSON]:
        r"""Return the lines that `data` completes; b"" is the end, which completes a last line without `\n`."""
        *whole, self._rest = (self._rest + data).split(b"\n") if data else (self._rest, b"")
        if len(self._rest) > LINE_LIMIT:
            raise BackendError(f"the backend sent a line of more than {LINE_LIMIT} bytes")
        return [read_line(line, self._joiner) for line in whole if line.strip()]


def read_line(line: bytes, joiner: unicode_repair.CharacterJoiner | None = None) -> JSON:
    """Return the object of a line, with whole characters. Raises BackendError for an error, and for a line that is not an object."""
    line = line.removeprefix(BYTE_ORDER_MARK).strip()
    if line.startswith(b"data:"):  # behind a proxy that makes SSE events of the lines
        line = line[5:].strip()
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError:
        value = _repair_characters(_read_broken(line), joiner or unicode_repair.CharacterJoiner())
    else:
        if joiner is not None and joiner.open:
            value = _repair_characters(value, joiner)
    if not isinstance(value, dict):
        raise BackendError("the backend sent a line that is not an object")
    if value.get("error"):
        raise error_from_line(parse_error_body(value).message or "the backend reported an error without a message")
    return value


def _read_broken(line: bytes) -> Any:
    if is_done_marker(line):
        return {}
    try:
        return unicode_repair.parse_broken_json(line)
    except (ValueError, RecursionError) as error:
        raise BackendError(f"the backend sent a line that is not JSON: {error}", transient=True) from error


def _repair_characters(value: Any, joiner: unicode_repair.CharacterJoiner) -> Any:
    """Return the line with whole characters; the last line gets the replacement of a character that stayed incomplete."""
    value = joiner.repair(value)
    if isinstance(value, dict) and value.get("done"):
        for path in [path for path in joiner.open if all(isinstance(key, str) for key in path)]:
            _add_text(value, path, joiner.rest(path))
    return value


def _add_text(line: JSON, path: unicode_repair.Path, text: str) -> None:
    holder = line
    for key in path[:-1]:
        inner = holder.get(str(key))
        holder = inner if isinstance(inner, dict) else holder.setdefault(str(key), {})
    name = str(path[-1])
    holder[name] = f"{holder.get(name) or ''}{text}"


def error_from_line(text: str) -> BackendError:
    """Return the error that a line of a stream reports."""
    return _request_error(text) or BackendError(text, transient=True)


def error_from_answer(status: int, headers: dict[str, str], body: bytes) -> BackendError:
    """Return the error of an answer whose status is not 200."""
    error = error_from_response(status, headers, body)
    if status == 500 and LOADING_ERROR.search(error.info.message):
        return BackendUnavailable(error.info.message, retry_after_s=LOADING_PAUSE_S, pause_s=LOADING_PAUSE_S)
    if status == LOAD_CANCELED_STATUS:
        return BackendError(error.info.message, transient=True)
    if status == 400 or status >= 500:
        return (None if status == 503 else _request_error(error.info.message)) or error
    return error


def _request_error(text: str) -> BackendError | None:
    """Return a refusal if the message is about the request; else None."""
    if MISSING_MODEL_ERROR.search(text):
        return ModelNotServed(text, param="model")
    if CONTEXT_ERROR.search(text):
        kind, code = BackendRefused.type, "context_length_exceeded"
        return BackendRefused(info=ErrorInfo(status=400, type=kind, code=code, message=text))
    return BackendRefused(text) if BAD_INPUT_ERROR.search(text) else None


class OllamaClient:
    """HTTP requests to one Ollama server. Closing a response, or cancelling a call, ends the server's work."""

    def __init__(self, url: str, api_key: str) -> None:
        """Raise ValueError when `url` is invalid."""
        self._http = HttpClient(url, headers={"authorization": f"Bearer {api_key}"} if api_key else {})

    async def close(self) -> None:
        """Close every connection."""
        await self._http.close()

    async def get(self, path: str) -> JSON:
        """Return the JSON that `GET path` answers. Raises BackendUnavailable when the server does not answer."""
        try:
            return await self._read_and_close(await self._http.request("GET", path))
        except BackendError as error:
            if error.transient and not isinstance(error, BackendUnavailable):
                raise BackendUnavailable(str(error)) from error
            raise

    async def post(self, path: str, body: JSON) -> JSON:
        """Return the whole answer of a `POST`. Raises BackendError."""
        return await self._read_and_close(await self._http.request("POST", path, orjson.dumps(body)))

    async def stream(self, path: str, body: JSON) -> BackendResponse:
        """Return the response of a `POST`, which the caller reads and closes. Raises BackendError."""
        response = await self._http.request("POST", path, orjson.dumps(body))
        if response.status != 200:
            await self._read_and_close(response)
        return response

    async def _read_and_close(self, response: BackendResponse) -> JSON:
        try:
            body = await response.read_all(BODY_LIMIT)
        finally:
            response.close()
        if response.status != 200:
            raise error_from_answer(response.status, response.headers, body)
        return read_line(body)
