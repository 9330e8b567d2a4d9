"""What ComfyUI's server is asked and says: HTTP for what must not be lost, a websocket for how far the work is."""

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
PICTURE_LIMIT = 256 * 1024 * 1024
LOOK_S = 5.0
"""After this much silence on the websocket the queue is looked at: events may be lost, and long nodes say nothing."""
POLL_S = 0.5
"""How often the queue is looked at while there is no websocket."""
STOP_POLL_S = 0.1
STOP_TRIES = 5
"""Questions without an answer after which a server is taken for dead."""
HEARTBEAT_S = 30.0
VERSION = re.compile(r"v?(\d+)\.(\d+)\.(\d+)")
TARGETS_SINCE = (0, 3, 60)
"""The first version that surely heeds an interrupt's `prompt_id` (September 2025)."""
PREVIEW, PREVIEW_WITH_METADATA = 1, 4
"""Kinds of binary events."""
ENDS = frozenset({"execution_success", "execution_error", "execution_interrupted"})
FOLDER = "nexus"
NO_HEADERS: Mapping[str, str] = {}


class PromptState(StrEnum):
    """Where a prompt stands."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    GONE = "gone"
    """ComfyUI does not know it."""


@dataclass(frozen=True, slots=True)
class PromptStatus:
    """What the queue and the history say of a prompt."""

    where: PromptState
    before: int = 0
    """Prompts that come first."""
    entry: JSON = field(default_factory=dict)
    """Its history, once it is done."""


@dataclass(frozen=True, slots=True)
class ComfyUIEvent:
    """Something ComfyUI said unasked. A preview has a picture."""

    kind: str
    data: JSON = field(default_factory=dict)
    picture: bytes = b""

    def ends(self, prompt_id: str) -> bool:
        """Whether it says that the prompt is over."""
        over = self.kind in ENDS or (self.kind == "executing" and self.data.get("node") is None)
        return over and self.data.get("prompt_id") == prompt_id


class ComfyUIClient:
    """One ComfyUI."""

    def __init__(self, url: str, api_key: str) -> None:
        self._headers = authorization_header(api_key)
        self._url = url.rstrip("/")
        self._client = HttpClient(url, headers=self._headers)
        self.targets_interrupts = False
        """An interrupt ends the named prompt only, whatever the server is at."""

    async def close(self) -> None:
        await self._client.close()

    async def ask(self, path: str) -> Any:
        """What `GET path` says. Raises BackendUnavailable when there is no answer."""
        try:
            status, body = await self._exchange("GET", path)
        except BackendError as error:
            raise (BackendUnavailable(str(error)) if error.transient else error) from error
        return _value(path, status, body)

    async def node_class(self, kind: str) -> JSON | None:
        """What the server says of a class of nodes; None: it lacks it. Raises NodeClassUnavailable where it does not say."""
        if "/" in kind or "%" in kind:  # names that a proxy may take for something else
            raise NodeClassUnavailable(kind)
        try:
            answer = await self.ask(f"/object_info/{quote(kind)}")
        except BackendUnavailable:
            raise
        except BackendError as error:
            raise NodeClassUnavailable(kind) from error
        if not isinstance(answer, dict) or not isinstance(answer.get(kind, {}), dict):
            raise NodeClassUnavailable(kind)
        return answer.get(kind)

    async def submit(self, graph: JSON, client_id: str, *, previews: bool) -> str:
        """Queue a graph. Returns its prompt's id. Raises InvalidGraph."""
        body: JSON = {"prompt": graph, "client_id": client_id}
        if previews:  # otherwise the server's own setting counts, which by default is none
            body["extra_data"] = {"preview_method": "auto"}
        data = orjson.dumps(body)
        # As a stream, which is never sent twice: on a kept connection that breaks in silence it would be.
        response = await self._client.request("POST", "/prompt", pieces=_pieces(data), length=len(data))
        status, answer = response.status, await _whole(response, BODY_LIMIT)
        if status == 400:
            raise InvalidGraph(_value("/prompt", 200, answer))
        if status >= 500 and status not in (502, 503, 504):
            raise BackendError(f"ComfyUI failed to check the workflow ({status}); its log says why")
        prompt_id = _value("/prompt", status, answer, response.headers).get("prompt_id")
        if not isinstance(prompt_id, str):
            raise BackendError("ComfyUI took the workflow without saying under which id")
        return prompt_id

    async def upload(self, part: FilePart, *, temporary: bool) -> str:
        """Hand over a file. Returns the name for a loading node. A temporary one is deleted when ComfyUI starts again."""
        form = encode_multipart([("subfolder", FOLDER), ("type", "temp" if temporary else "input")], [part])
        response = await self._client.request(
            "POST", "/upload/image", content_type=form.content_type, pieces=form.pieces(), length=form.length
        )
        answer = _value("/upload/image", response.status, await _whole(response, BODY_LIMIT), response.headers)
        name = f"{answer['subfolder']}/{answer['name']}" if answer.get("subfolder") else str(answer["name"])
        return f"{name} [temp]" if temporary else name

    async def view(self, file: JSON) -> bytes:
        """A picture that a node has saved."""
        query = {name: str(file.get(name, "")) for name in ("filename", "subfolder", "type")}
        response = await self._client.request("GET", f"/view?{urlencode(query)}")
        data = await _whole(response, PICTURE_LIMIT)
        if response.status != 200:
            raise BackendError(f"ComfyUI no longer has the picture {query['filename']} ({response.status})")
        return data

    async def look(self, prompt_id: str) -> PromptStatus:
        """Where a prompt stands. The queue comes first: what leaves it is in the history."""
        queue = await self.ask("/queue")
        if any(item[1] == prompt_id for item in queue.get("queue_running", ())):
            return PromptStatus(PromptState.RUNNING)
        waiting = {item[1]: item[0] for item in queue.get("queue_pending", ())}
        if prompt_id in waiting:
            before = sum(number < waiting[prompt_id] for number in waiting.values())
            return PromptStatus(PromptState.QUEUED, before + len(queue.get("queue_running", ())))
        entry = (await self.ask(f"/history/{prompt_id}")).get(prompt_id)
        return PromptStatus(PromptState.DONE, entry=entry) if entry else PromptStatus(PromptState.GONE)

    async def learn_version(self) -> None:
        """Ask which ComfyUI it is. Raises BackendUnavailable when there is no answer."""
        self.targets_interrupts = False
        try:
            answer = await self.ask("/system_stats")
        except BackendUnavailable:
            raise
        except BackendError:
            return
        system = answer.get("system") if isinstance(answer, dict) else None
        version = str(system.get("comfyui_version") or "") if isinstance(system, dict) else ""
        match = VERSION.match(version)
        self.targets_interrupts = match is not None and tuple(map(int, match.groups())) >= TARGETS_SINCE

    async def stop(self, prompt_id: str, *, running: bool) -> None:
        """Take a prompt out of the queue and interrupt it; return when it has ended, or when the server does not answer.

        Both are asked for at once, before the queue is looked at: a server that samples may take seconds to say how it is. An older
        one interrupts whatever it is at, so it is asked only while it is known to be at this prompt: `running`, then what looks say.
        """
        silent = 0
        while silent < STOP_TRIES:
            calls = [self._urge("/queue", {"delete": [prompt_id]})]
            if running or self.targets_interrupts:
                calls.append(self._urge("/interrupt", {"prompt_id": prompt_id}))
            looked, *_ = await asyncio.gather(self._where(prompt_id), *calls)
            if looked in (PromptState.DONE, PromptState.GONE):
                return
            silent = silent + 1 if looked is None else 0
            running = looked is PromptState.RUNNING
            await asyncio.sleep(STOP_POLL_S)

    async def _urge(self, path: str, value: JSON) -> None:
        """Ask for an end. The answer says little: whether it has come, the queue says."""
        with suppress(BackendError):
            await self._exchange("POST", path, orjson.dumps(value))

    async def _where(self, prompt_id: str) -> PromptState | None:
        """Where a prompt stands; None when the server does not say."""
        try:
            return (await self.look(prompt_id)).where
        except BackendError:
            return None

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[ComfyUIListener]:
        """A websocket for the events of the prompts that are submitted with its `client_id`."""
        try:
            import aiohttp
        except ImportError as error:
            raise BackendError(
                f"ComfyUI needs aiohttp beside the worker; its operator can add it with: {install_hint('images')}"
            ) from error
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5.0)
        async with aiohttp.ClientSession(headers=self._headers, timeout=timeout) as session:
            listener = ComfyUIListener(session, self._url)
            await listener.connect()
            yield listener

    async def _exchange(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        response = await self._client.request(method, path, body)
        return response.status, await _whole(response, BODY_LIMIT)


class ComfyUIListener:
    """ComfyUI's events. A websocket that breaks is connected again; meanwhile there are only looks."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self.client_id = uuid4().hex
        self._session = session
        self._url = f"{url}/ws?clientId={self.client_id}"
        self._socket: aiohttp.ClientWebSocketResponse | None = None

    async def connect(self) -> None:
        """Connect, if that works."""
        import aiohttp

        try:
            self._socket = await self._session.ws_connect(self._url, heartbeat=HEARTBEAT_S, max_msg_size=BODY_LIMIT)
        except (aiohttp.ClientError, OSError, TimeoutError):
            self._socket = None

    async def next(self) -> ComfyUIEvent | None:
        """The next event; None when it is time to look how the prompt stands."""
        import aiohttp

        if self._socket is None:
            await asyncio.sleep(POLL_S)
            await self.connect()
            return None
        try:
            message = await self._socket.receive(timeout=LOOK_S)
        except TimeoutError:
            return None
        if message.type is aiohttp.WSMsgType.TEXT:
            return _event(message.data)
        if message.type is aiohttp.WSMsgType.BINARY:
            return _binary_event(message.data)
        await self._socket.close()
        await self.connect()
        return None


class NodeClassUnavailable(Exception):
    """The server does not say whether it has a class of nodes."""


class InvalidGraph(BackendRefused):
    """ComfyUI refused a workflow."""

    def __init__(self, answer: Any) -> None:
        answer = answer if isinstance(answer, dict) else {}
        error = answer.get("error")
        error = error if isinstance(error, dict) else {"message": str(error or "no reason given")}
        self.faults: list[tuple[str, str, str, str]] = []
        """Node, its class, input, what is wrong with it."""
        for node, complaint in (answer.get("node_errors") or {}).items():
            for fault in complaint.get("errors", ()):
                name = str((fault.get("extra_info") or {}).get("input_name", ""))
                text = f"{fault.get('message', '')}: {fault.get('details', '')}".strip(": ")
                self.faults.append((str(node), str(complaint.get("class_type", "")), name, text))
        where = "; ".join(f"{kind} (node {node}): {text}" for node, kind, _, text in self.faults)
        said = f"{error.get('message', '')} {error.get('details', '')}".strip()
        super().__init__(f"ComfyUI refused the workflow: {where or said}")


def _event(text: str) -> ComfyUIEvent:
    try:
        value = orjson.loads(text)
        return ComfyUIEvent(str(value["type"]), value.get("data") or {})
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
        return ComfyUIEvent("")


def _binary_event(data: bytes) -> ComfyUIEvent:
    """A preview: its kind, then either the picture's type or the length of its metadata, then the picture."""
    if len(data) < 8:
        return ComfyUIEvent("")
    kind, number = struct.unpack(">II", data[:8])
    if kind == PREVIEW:
        return ComfyUIEvent("preview", picture=data[8:])
    if kind == PREVIEW_WITH_METADATA:
        return ComfyUIEvent("preview", picture=data[8 + number :])
    return ComfyUIEvent("")


def _value(path: str, status: int, body: bytes, headers: Mapping[str, str] = NO_HEADERS) -> Any:
    if status != 200:
        raise error_from_response(status, headers, body)
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BackendError(f"this is no ComfyUI: {path} answers something that is not JSON") from error


async def _pieces(data: bytes) -> AsyncIterator[bytes]:
    yield data


async def _whole(response: BackendResponse, limit: int) -> bytes:
    try:
        return await response.read_all(limit)
    finally:
        response.close()
