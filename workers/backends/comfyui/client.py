"""A client of ComfyUI's server: HTTP for everything that must not be lost, a websocket for progress."""

from __future__ import annotations

import asyncio
import re
import struct
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode
from uuid import uuid4

import orjson

from schemas.installation import install_hint
from workers.adapter_kit.error_mapping import error_from_response
from workers.adapter_kit.http_client import BackendResponse, HttpClient
from workers.adapter_kit.images.responses import authorization_header
from workers.adapter_kit.multipart import FilePart, encode_multipart
from workers.backends.base import BackendError, BackendRefused, BackendUnavailable

if TYPE_CHECKING:
    import aiohttp

JSON = dict[str, Any]

BODY_LIMIT = 64 * 1024 * 1024
IMAGE_LIMIT = 256 * 1024 * 1024
SILENCE_LIMIT_S = 5.0
"""The queue is polled after so long without an event: events may be lost, and long nodes send none."""
POLL_INTERVAL_S = 0.5
"""How often the queue is polled while the websocket is not connected."""
STOP_POLL_INTERVAL_S = 0.1
STOP_TRIES = 5
"""Polls without an answer after which the server counts as down."""
HEARTBEAT_S = 30.0
VERSION = re.compile(r"v?(\d+)\.(\d+)\.(\d+)")
TARGETED_INTERRUPTS_SINCE = (0, 3, 60)
"""The first version that is known to read the `prompt_id` of an interrupt (September 2025)."""
PREVIEW, PREVIEW_WITH_METADATA = 1, 4
"""Types of binary events."""
FINAL_EVENTS = frozenset({"execution_success", "execution_error", "execution_interrupted"})
FOLDER = "nexus"
NO_HEADERS: Mapping[str, str] = {}


class PromptState(StrEnum):
    """The state of a prompt."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    UNKNOWN = "unknown"
    """ComfyUI does not know the prompt."""


@dataclass(frozen=True, slots=True)
class PromptStatus:
    """The state of a prompt, by ComfyUI's queue and history."""

    state: PromptState
    before: int = 0
    """Prompts before it in the queue."""
    entry: JSON = field(default_factory=dict)
    """The history entry of a prompt that is done."""


@dataclass(frozen=True, slots=True)
class ComfyUIEvent:
    """An event of ComfyUI's websocket. A preview has an image."""

    kind: str
    data: JSON = field(default_factory=dict)
    image: bytes = b""

    def ends(self, prompt_id: str) -> bool:
        """Return whether the event ends the prompt."""
        over = self.kind in FINAL_EVENTS or (self.kind == "executing" and self.data.get("node") is None)
        return over and self.data.get("prompt_id") == prompt_id


class ComfyUIClient:
    """HTTP requests to one ComfyUI server."""

    def __init__(self, url: str, api_key: str) -> None:
        self._headers = authorization_header(api_key)
        self._url = url.rstrip("/")
        self._client = HttpClient(url, headers=self._headers)
        self.targets_interrupts = False
        """Whether an interrupt ends only the prompt that it names."""

    async def close(self) -> None:
        await self._client.close()

    async def get(self, path: str) -> Any:
        """Return the JSON that `GET path` answers. Raises BackendUnavailable when there is no answer."""
        try:
            status, body = await self._exchange("GET", path)
        except BackendError as error:
            raise (BackendUnavailable(str(error)) if error.transient else error) from error
        return _parse_response(path, status, body)

    async def node_class(self, kind: str) -> JSON | None:
        """Return the description of a node class; None where the server lacks it. Raises NodeClassUnavailable where the server does not tell."""
        if "/" in kind or "%" in kind:  # a proxy may rewrite such a path
            raise NodeClassUnavailable(kind)
        try:
            answer = await self.get(f"/object_info/{quote(kind)}")
        except BackendUnavailable:
            raise
        except BackendError as error:
            raise NodeClassUnavailable(kind) from error
        if not isinstance(answer, dict) or not isinstance(answer.get(kind, {}), dict):
            raise NodeClassUnavailable(kind)
        return answer.get(kind)

    async def submit(self, graph: JSON, client_id: str, *, previews: bool) -> str:
        """Queue a graph, and return its prompt id. Raises InvalidGraph."""
        body: JSON = {"prompt": graph, "client_id": client_id}
        if previews:  # the server's default is to send none
            body["extra_data"] = {"preview_method": "auto"}
        data = orjson.dumps(body)
        # A body that is streamed is never sent a second time, when an idle connection proves to be closed.
        response = await self._client.request("POST", "/prompt", pieces=_stream_once(data), length=len(data))
        status, answer = response.status, await _read_and_close(response, BODY_LIMIT)
        if status == 400:
            raise InvalidGraph(_parse_response("/prompt", 200, answer))
        if status >= 500 and status not in (502, 503, 504):
            raise BackendError(f"ComfyUI failed to check the workflow ({status}); its log says why")
        prompt_id = _parse_response("/prompt", status, answer, response.headers).get("prompt_id")
        if not isinstance(prompt_id, str):
            raise BackendError("ComfyUI queued the workflow without a prompt id")
        return prompt_id

    async def upload(self, part: FilePart, *, temporary: bool) -> str:
        """Upload a file, and return its name for a loading node. ComfyUI deletes temporary files when it restarts."""
        form = encode_multipart([("subfolder", FOLDER), ("type", "temp" if temporary else "input")], [part])
        response = await self._client.request(
            "POST", "/upload/image", content_type=form.content_type, pieces=form.pieces(), length=form.length
        )
        answer = _parse_response(
            "/upload/image", response.status, await _read_and_close(response, BODY_LIMIT), response.headers
        )
        name = f"{answer['subfolder']}/{answer['name']}" if answer.get("subfolder") else str(answer["name"])
        return f"{name} [temp]" if temporary else name

    async def view(self, file: JSON) -> bytes:
        """Return an image that a node saved."""
        query = {name: str(file.get(name, "")) for name in ("filename", "subfolder", "type")}
        response = await self._client.request("GET", f"/view?{urlencode(query)}")
        data = await _read_and_close(response, IMAGE_LIMIT)
        if response.status != 200:
            raise BackendError(f"ComfyUI no longer has the image {query['filename']} ({response.status})")
        return data

    async def prompt_status(self, prompt_id: str) -> PromptStatus:
        """Return the status of a prompt. The queue is read first: a prompt that leaves it is in the history."""
        queue = await self.get("/queue")
        if any(item[1] == prompt_id for item in queue.get("queue_running", ())):
            return PromptStatus(PromptState.RUNNING)
        waiting = {item[1]: item[0] for item in queue.get("queue_pending", ())}
        if prompt_id in waiting:
            before = sum(number < waiting[prompt_id] for number in waiting.values())
            return PromptStatus(PromptState.QUEUED, before + len(queue.get("queue_running", ())))
        entry = (await self.get(f"/history/{prompt_id}")).get(prompt_id)
        return PromptStatus(PromptState.DONE, entry=entry) if entry else PromptStatus(PromptState.UNKNOWN)

    async def learn_version(self) -> None:
        """Read ComfyUI's version. Raises BackendUnavailable when there is no answer."""
        self.targets_interrupts = False
        try:
            answer = await self.get("/system_stats")
        except BackendUnavailable:
            raise
        except BackendError:
            return
        system = answer.get("system") if isinstance(answer, dict) else None
        version = str(system.get("comfyui_version") or "") if isinstance(system, dict) else ""
        match = VERSION.match(version)
        self.targets_interrupts = match is not None and tuple(map(int, match.groups())) >= TARGETED_INTERRUPTS_SINCE

    async def stop(self, prompt_id: str, *, running: bool) -> None:
        """Take a prompt out of the queue and interrupt it. Returns when it has ended, or when the server does not answer.

        Both requests are sent before the queue is polled: a server that samples may take seconds to answer. An older server interrupts
        any prompt that it runs, so it gets an interrupt only while it is known to run this one: by `running`, then by the polls.
        """
        unanswered = 0
        while unanswered < STOP_TRIES:
            calls = [self._post_ignoring_errors("/queue", {"delete": [prompt_id]})]
            if running or self.targets_interrupts:
                calls.append(self._post_ignoring_errors("/interrupt", {"prompt_id": prompt_id}))
            state, *_ = await asyncio.gather(self._state_or_none(prompt_id), *calls)
            if state in (PromptState.DONE, PromptState.UNKNOWN):
                return
            unanswered = unanswered + 1 if state is None else 0
            running = state is PromptState.RUNNING
            await asyncio.sleep(STOP_POLL_INTERVAL_S)

    async def _post_ignoring_errors(self, path: str, value: JSON) -> None:
        """Send a request whose answer does not matter: the queue shows its effect."""
        with suppress(BackendError):
            await self._exchange("POST", path, orjson.dumps(value))

    async def _state_or_none(self, prompt_id: str) -> PromptState | None:
        """Return the state of a prompt; None when the server does not answer."""
        try:
            return (await self.prompt_status(prompt_id)).state
        except BackendError:
            return None

    @asynccontextmanager
    async def open_listener(self) -> AsyncIterator[ComfyUIListener]:
        """Open a websocket for the events of prompts that are submitted with its `client_id`."""
        try:
            import aiohttp
        except ImportError as error:
            raise BackendError(
                f"aiohttp is not installed; the worker needs it for ComfyUI's websocket. Install it with: {install_hint('images')}"
            ) from error
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5.0)
        async with aiohttp.ClientSession(headers=self._headers, timeout=timeout) as session:
            listener = ComfyUIListener(session, self._url)
            await listener.connect()
            yield listener

    async def _exchange(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        response = await self._client.request(method, path, body)
        return response.status, await _read_and_close(response, BODY_LIMIT)


class ComfyUIListener:
    """A websocket of ComfyUI's events. It reconnects when it breaks; meanwhile the queue is polled."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self.client_id = uuid4().hex
        self._session = session
        self._url = f"{url}/ws?clientId={self.client_id}"
        self._socket: aiohttp.ClientWebSocketResponse | None = None

    async def connect(self) -> None:
        """Try to connect."""
        import aiohttp

        try:
            self._socket = await self._session.ws_connect(self._url, heartbeat=HEARTBEAT_S, max_msg_size=BODY_LIMIT)
        except (aiohttp.ClientError, OSError, TimeoutError):
            self._socket = None

    async def next(self) -> ComfyUIEvent | None:
        """Return the next event; None when it is time to poll the queue."""
        import aiohttp

        if self._socket is None:
            await asyncio.sleep(POLL_INTERVAL_S)
            await self.connect()
            return None
        try:
            message = await self._socket.receive(timeout=SILENCE_LIMIT_S)
        except TimeoutError:
            return None
        if message.type is aiohttp.WSMsgType.TEXT:
            return _parse_event(message.data)
        if message.type is aiohttp.WSMsgType.BINARY:
            return _parse_binary_event(message.data)
        await self._socket.close()
        await self.connect()
        return None


class NodeClassUnavailable(Exception):
    """The server does not tell whether it has a node class."""


class InvalidGraph(BackendRefused):
    """ComfyUI refused a workflow."""

    def __init__(self, answer: Any) -> None:
        answer = answer if isinstance(answer, dict) else {}
        error = answer.get("error")
        error = error if isinstance(error, dict) else {"message": str(error or "no reason given")}
        self.faults: list[tuple[str, str, str, str]] = []
        """Node, its class, its input, and the fault."""
        for node, complaint in (answer.get("node_errors") or {}).items():
            for fault in complaint.get("errors", ()):
                name = str((fault.get("extra_info") or {}).get("input_name", ""))
                text = f"{fault.get('message', '')}: {fault.get('details', '')}".strip(": ")
                self.faults.append((str(node), str(complaint.get("class_type", "")), name, text))
        details = "; ".join(f"{kind} (node {node}): {text}" for node, kind, _, text in self.faults)
        summary = f"{error.get('message', '')} {error.get('details', '')}".strip()
        super().__init__(f"ComfyUI refused the workflow: {details or summary}")


def _parse_event(text: str) -> ComfyUIEvent:
    try:
        value = orjson.loads(text)
        return ComfyUIEvent(str(value["type"]), value.get("data") or {})
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
        return ComfyUIEvent("")


def _parse_binary_event(data: bytes) -> ComfyUIEvent:
    """Parse a preview: its type, then the image's format or the length of its metadata, then the image."""
    if len(data) < 8:
        return ComfyUIEvent("")
    kind, number = struct.unpack(">II", data[:8])
    if kind == PREVIEW:
        return ComfyUIEvent("preview", image=data[8:])
    if kind == PREVIEW_WITH_METADATA:
        return ComfyUIEvent("preview", image=data[8 + number :])
    return ComfyUIEvent("")


def _parse_response(path: str, status: int, body: bytes, headers: Mapping[str, str] = NO_HEADERS) -> Any:
    if status != 200:
        raise error_from_response(status, headers, body)
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BackendError(f"ComfyUI's answer to {path} is not JSON; check the worker's URL") from error


async def _stream_once(data: bytes) -> AsyncIterator[bytes]:
    yield data


async def _read_and_close(response: BackendResponse, limit: int) -> bytes:
    try:
        return await response.read_all(limit)
    finally:
        response.close()
