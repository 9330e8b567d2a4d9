"""A protocol-true double of ComfyUI's server, with faults on request. It works on one prompt at a time, as the real one does."""

from __future__ import annotations

import asyncio
import contextlib
import json
import struct
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from io import BytesIO
from typing import Any, Self

from aiohttp import WSMsgType, web
from PIL import Image

from tests.servers import here

Graph = dict[str, dict[str, Any]]

SAMPLERS = {"KSampler", "SamplerCustomAdvanced"}
OUTPUTS = {"SaveImage": "output", "PreviewImage": "temp"}
REQUIRED = {
    "KSampler": ("model", "seed", "steps", "cfg", "sampler_name", "scheduler", "positive", "negative", "latent_image"),
    "CheckpointLoaderSimple": ("ckpt_name",),
    "CLIPTextEncode": ("text", "clip"),
    "EmptyLatentImage": ("width", "height", "batch_size"),
    "SaveImage": ("images",),
    "LoadImage": ("image",),
}
RANGES = {"width": (16, 4096), "height": (16, 4096), "batch_size": (1, 64), "steps": (1, 10000), "cfg": (0.0, 100.0)}
OTHERS = {
    *("VAEDecode", "VAEEncode", "PreviewImage", "LoadImageMask", "SetLatentNoiseMask", "ImageScale", "FluxGuidance"),
    *("SamplerCustomAdvanced", "BasicGuider", "RandomNoise", "BasicScheduler", "KSamplerSelect", "EmptySD3LatentImage"),
}


@dataclass
class Behavior:
    """How the server is from now on."""

    step_s: float = 0.0
    load_s: float = 0.0
    error: dict[str, str] | None = None
    """`exception_type` and `exception_message` of a failure after the last step."""
    drop_socket_at: int | None = None
    """At this step every websocket is cut."""
    no_sockets: bool = False
    """Websockets are refused."""
    silent: bool = False
    """Websockets are taken, and nothing is said."""
    status: bool = True
    """Older servers say nothing of it in their history."""
    previews: bool = False
    tells_classes: bool = True
    """Older servers say nothing of a single class of nodes."""
    new_nodes: bool = False
    answer_s: float = 0.0
    """How long it takes to say how its queue is, as a server does whose interpreter is busy sampling."""
    forgets: int = 0
    """So many interrupts are forgotten."""
    never_uploads: bool = False
    """Uploads are read, and not answered."""
    never_shows: bool = False
    """Pictures are asked for, and not sent."""
    never_takes: bool = False
    """Prompts are read, and not answered for long: they are checked."""


@dataclass
class Prompt:
    """A prompt, queued or running."""

    number: int
    id: str
    graph: Graph
    extra: dict[str, Any]
    messages: list[Any] = field(default_factory=list)

    def item(self) -> list[Any]:
        return [self.number, self.id, self.graph, self.extra, []]


class Interrupted(Exception):
    pass


class ComfyDouble:
    """`async with ComfyDouble() as double`: `double.url`; `double.behave(...)`."""

    def __init__(self) -> None:
        self.checkpoints = ["sd15.safetensors", "sdxl.safetensors"]
        self.custom_classes: set[str] = set()
        self.asked_classes: list[str] = []
        self.version = "0.3.75"
        """Before 0.3.60 an interrupt ends whatever runs."""
        self.behavior = Behavior()
        self.port = 0
        self.submitted: list[Graph] = []
        self.extras: list[dict[str, Any]] = []
        self.uploads: dict[str, bytes] = {}
        self.interrupts: list[Any] = []
        self.interrupted: list[str] = []
        """What interrupts have ended."""
        self.stopped = asyncio.Event()
        """Somebody has asked for an end: an interrupt, or a deletion from the queue."""
        self.uploading, self.showing, self.taking = asyncio.Event(), asyncio.Event(), asyncio.Event()
        """Such a request has come."""
        self.left = asyncio.Event()
        """A request that was not answered has been given up."""
        self.hold = asyncio.Event()
        """Ends `never_takes`."""
        self.deleted: list[str] = []
        self.sockets_made = 0
        self._runner: web.AppRunner | None = None
        self._starting: asyncio.Task[None] | None = None
        self._worker: asyncio.Task[None] | None = None
        self._clear()

    def _clear(self) -> None:
        self.queue: list[Prompt] = []
        self.running: Prompt | None = None
        self.history: dict[str, Any] = {}
        self.files: dict[str, bytes] = {}
        self._sockets: dict[str, web.WebSocketResponse] = {}
        self._wake = asyncio.Event()
        self._interrupt = False
        self._other: Prompt | None = None
        self._other_over = asyncio.Event()
        self.steps_made = 0

    @property
    def url(self) -> str:
        return f"http://{here()}:{self.port}"

    async def idle(self) -> bool:
        return self.running is None and not self.queue

    def behave(self, **changes: Any) -> None:
        self.behavior = replace(Behavior(), **changes)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.kill()

    async def start(self) -> None:
        """Listen; again on the same port after `kill`, with nothing remembered."""
        self._clear()
        app = web.Application(client_max_size=64 * 1024 * 1024)
        app.add_routes(
            [
                web.get("/ws", self._socket),
                web.get("/prompt", self._queue_info),
                web.get("/system_stats", self._get_stats),
                web.post("/prompt", self._post_prompt),
                web.get("/queue", self._get_queue),
                web.post("/queue", self._post_queue),
                web.post("/interrupt", self._post_interrupt),
                web.get("/history/{id}", self._get_history),
                web.get("/view", self._view),
                web.post("/upload/image", self._upload),
                web.get("/models/checkpoints", self._get_checkpoints),
                web.get("/object_info/{kind}", self._get_class),
            ]
        )
        self._runner = web.AppRunner(app, shutdown_timeout=0.01, handler_cancellation=True)
        await self._runner.setup()
        site = web.TCPSite(self._runner, here(), self.port, reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[0][1]
        self._worker = asyncio.create_task(self._work())

    async def start_slowly(self) -> None:
        """Listen in a while, as a server does that is still loading; returns at once."""

        async def later() -> None:
            await asyncio.sleep(0.2)
            await self.start()

        self._starting = asyncio.create_task(later())

    async def kill(self) -> None:
        """Die: every connection is cut."""
        if self._starting is not None:
            await self._starting
            self._starting = None
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)
        for socket in list(self._sockets.values()):
            self._cut(socket)
        if self._runner is not None:
            await self._runner.cleanup()
        self._runner = None
        self.running, self.queue = None, []

    def enqueue_another(self) -> None:
        """Somebody else's prompt, which runs until `end_another`."""
        self._other = Prompt(0, "another", {}, {"client_id": None})
        self.queue.append(self._other)
        self._wake.set()

    def end_another(self) -> None:
        """End it."""
        self._other_over.set()

    # Routes

    async def _socket(self, request: web.Request) -> web.StreamResponse:
        if self.behavior.no_sockets:
            return web.Response(status=403)
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        client = request.query.get("clientId") or uuid.uuid4().hex
        self._sockets[client] = socket
        self.sockets_made += 1
        await self._say("status", {"status": self._info(), "sid": client}, client)
        async for message in socket:
            if message.type is WSMsgType.ERROR:
                break
        if self._sockets.get(client) is socket:
            del self._sockets[client]
        return socket

    def _info(self) -> dict[str, Any]:
        return {"exec_info": {"queue_remaining": len(self.queue) + (self.running is not None)}}

    async def _get_stats(self, _: web.Request) -> web.Response:
        system = {"comfyui_version": self.version} if self.version else {}
        return web.json_response({"system": system, "devices": []})

    async def _queue_info(self, _: web.Request) -> web.Response:
        return web.json_response(self._info())

    async def _get_checkpoints(self, _: web.Request) -> web.Response:
        return web.json_response(self.checkpoints)

    async def _get_class(self, request: web.Request) -> web.Response:
        kind = request.match_info["kind"]
        self.asked_classes.append(kind)
        if not self.behavior.tells_classes:
            return web.Response(status=404)
        if kind not in REQUIRED and kind not in OTHERS and kind not in self.custom_classes:
            return web.json_response({})
        required: dict[str, Any] = {name: ["STRING", {}] for name in REQUIRED.get(kind, ())}
        if "ckpt_name" in required:
            # The two forms in which ComfyUI lists values, by whether a node is of its newer kind.
            new = ["COMBO", {"multiselect": False, "options": self.checkpoints}]
            required["ckpt_name"] = new if self.behavior.new_nodes else [self.checkpoints, {"tooltip": "a model"}]
        if kind == "LoadImage":
            required["image"] = [sorted(self.uploads), {"image_upload": True}]
        info = {"input": {"required": required}, "name": kind, "output_node": kind in OUTPUTS}
        return web.json_response({kind: info})

    async def _post_prompt(self, request: web.Request) -> web.Response:
        body = await request.json()
        if self.behavior.never_takes:
            self.taking.set()
            await self.hold.wait()
        error, node_errors = self._faults(body["prompt"])
        if error:
            return web.json_response({"error": error, "node_errors": node_errors}, status=400)
        self.submitted.append(body["prompt"])
        extra = body.get("extra_data", {}) | {"client_id": body.get("client_id")}
        self.extras.append(extra)
        prompt = Prompt(len(self.submitted), uuid.uuid4().hex, body["prompt"], extra)
        self.queue.append(prompt)
        await self._moved()
        return web.json_response({"prompt_id": prompt.id, "number": prompt.number, "node_errors": {}})

    async def _get_queue(self, _: web.Request) -> web.Response:
        await asyncio.sleep(self.behavior.answer_s)
        running = [self.running.item()] if self.running else []
        return web.json_response({"queue_running": running, "queue_pending": [one.item() for one in self.queue]})

    async def _never(self, begun: asyncio.Event) -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.left.set()

    async def _post_queue(self, request: web.Request) -> web.Response:
        self.stopped.set()
        for prompt_id in (await request.json()).get("delete", ()):
            self.deleted += [one.id for one in self.queue if one.id == prompt_id]
            self.queue = [one for one in self.queue if one.id != prompt_id]
        await self._moved()
        return web.Response()

    async def _post_interrupt(self, request: web.Request) -> web.Response:
        prompt_id = (await request.json()).get("prompt_id")
        self.interrupts.append(prompt_id)
        self.stopped.set()
        if len(self.interrupts) <= self.behavior.forgets:
            return web.Response()
        targeted = self.version and tuple(map(int, self.version.split("."))) >= (0, 3, 60)
        if self.running is not None and (not targeted or prompt_id in (None, self.running.id)):
            self.interrupted.append(self.running.id)
            self._interrupt = True
        return web.Response()

    async def _get_history(self, request: web.Request) -> web.Response:
        prompt_id = request.match_info["id"]
        return web.json_response({prompt_id: self.history[prompt_id]} if prompt_id in self.history else {})

    async def _view(self, request: web.Request) -> web.Response:
        if self.behavior.never_shows:
            await self._never(self.showing)
        data = self.files.get(request.query["filename"])
        return web.Response(body=data, content_type="image/png") if data else web.Response(status=404)

    async def _upload(self, request: web.Request) -> web.Response:
        form = await request.post()
        file = form["image"]
        assert isinstance(file, web.FileField)
        subfolder, kind = str(form.get("subfolder", "")), str(form.get("type", "input"))
        name = f"{subfolder}/{file.filename}" + (" [temp]" if kind == "temp" else "")
        self.uploads[name] = file.file.read()
        if self.behavior.never_uploads:
            await self._never(self.uploading)
        return web.json_response({"name": file.filename, "subfolder": subfolder, "type": kind})

    # Validation

    def _faults(self, graph: Graph) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        for key, node in graph.items():
            if node["class_type"] not in {*REQUIRED, *OTHERS, *self.custom_classes}:
                text = f"Cannot execute because node {node['class_type']} does not exist."
                return _error("invalid_prompt", text, f"Node ID '#{key}'"), {}
        if not any(node["class_type"] in OUTPUTS for node in graph.values()):
            return _error("prompt_no_outputs", "Prompt has no outputs", ""), {}
        node_errors = {
            key: {"errors": faults, "dependent_outputs": ["9"], "class_type": node["class_type"]}
            for key, node in graph.items()
            if (faults := list(self._node_faults(node)))
        }
        if node_errors:
            return _error("prompt_outputs_failed_validation", "Prompt outputs failed validation", ""), node_errors
        return None, {}

    def _node_faults(self, node: dict[str, Any]) -> Iterator[dict[str, Any]]:
        inputs = node["inputs"]
        for name in REQUIRED.get(node["class_type"], ()):
            if name not in inputs:
                yield _error("required_input_missing", "Required input is missing", name, name)
        for name, value in inputs.items():
            if name in RANGES and not isinstance(value, list):
                least, most = RANGES[name]
                if value < least:
                    yield _error("value_smaller_than_min", f"Value {value} smaller than min of {least}", name, name)
                if value > most:
                    yield _error("value_bigger_than_max", f"Value {value} bigger than max of {most}", name, name)
        if "ckpt_name" in inputs and inputs["ckpt_name"] not in self.checkpoints:
            details = f"ckpt_name: '{inputs['ckpt_name']}' not in {self.checkpoints}"
            yield _error("value_not_in_list", "Value not in list", details, "ckpt_name")
        if node["class_type"].startswith("LoadImage") and inputs["image"] not in self.uploads:
            details = f"image - Invalid image file: {inputs['image']}"
            yield _error("custom_validation_failed", "Custom validation failed for node", details, "image")

    # Work

    async def _work(self) -> None:
        while True:
            while not self.queue:
                self._wake.clear()
                await self._wake.wait()
            self.running = prompt = self.queue.pop(0)
            self._interrupt = False
            await self._moved()
            if prompt is self._other:
                await self._other_over.wait()
            outputs = await self._execute(prompt)
            failed = any(kind in ("execution_error", "execution_interrupted") for kind, _ in prompt.messages)
            status = {"status_str": "error" if failed else "success", "completed": not failed}
            self.history[prompt.id] = {"prompt": prompt.item(), "outputs": outputs, "meta": {}} | (
                {"status": status | {"messages": prompt.messages}} if self.behavior.status else {"status": None}
            )
            self.running = None
            await self._moved()
            await self._tell(prompt, "executing", {"node": None})

    async def _execute(self, prompt: Prompt) -> dict[str, Any]:
        await self._note(prompt, "execution_start", {})
        await self._note(prompt, "execution_cached", {"nodes": []})
        outputs: dict[str, Any] = {}
        node = ""
        try:
            for node, content in sorted(prompt.graph.items(), key=lambda item: _turn(item[1]["class_type"])):
                await self._tell(prompt, "executing", {"node": node, "display_node": node})
                kind = content["class_type"]
                if kind == "CheckpointLoaderSimple":
                    await self._pause(self.behavior.load_s)
                if kind in SAMPLERS:
                    await self._sample(prompt, node)
                if kind in OUTPUTS:
                    output = {"images": self._save(prompt.graph, OUTPUTS[kind])}
                    outputs[node] = output
                    await self._tell(prompt, "executed", {"node": node, "display_node": node, "output": output})
        except Interrupted:
            await self._note(prompt, "execution_interrupted", {"node_id": node, "executed": []})
        except RuntimeError:
            data = {"node_id": node, "node_type": prompt.graph[node]["class_type"], "traceback": [], "executed": []}
            await self._note(prompt, "execution_error", data | (self.behavior.error or {}))
        else:
            await self._note(prompt, "execution_success", {})
        return outputs

    async def _sample(self, prompt: Prompt, node: str) -> None:
        behavior = self.behavior
        steps = _steps(prompt.graph, node)
        for step in range(1, steps + 1):
            await self._pause(behavior.step_s)
            self.steps_made += 1
            if step == behavior.drop_socket_at:
                for socket in list(self._sockets.values()):
                    self._cut(socket)
            state = {"value": step, "max": steps, "state": "running", "node_id": node, "prompt_id": prompt.id}
            await self._tell(prompt, "progress_state", {"nodes": {node: state}})
            await self._tell(prompt, "progress", {"value": step, "max": steps, "node": node})
            if behavior.previews or prompt.extra.get("preview_method") == "auto":
                await self._preview(prompt, step)
        if behavior.error is not None:
            raise RuntimeError

    async def _pause(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        if self._interrupt:
            self._interrupt = False
            raise Interrupted

    def _save(self, graph: Graph, kind: str) -> list[dict[str, str]]:
        latents = [node["inputs"] for node in graph.values() if node["class_type"].startswith("Empty")]
        size = latents[0] if latents else {"width": 32, "height": 32, "batch_size": 1}
        saved = []
        for _ in range(size["batch_size"]):
            name = f"ComfyUI_{len(self.files):05}_.png"
            self.files[name] = png(size["width"], size["height"])
            saved.append({"filename": name, "subfolder": "", "type": kind})
        return saved

    # News

    async def _note(self, prompt: Prompt, kind: str, data: dict[str, Any]) -> None:
        prompt.messages.append([kind, data | {"prompt_id": prompt.id, "timestamp": 1}])
        await self._tell(prompt, kind, data)

    async def _tell(self, prompt: Prompt, kind: str, data: dict[str, Any]) -> None:
        await self._say(kind, data | {"prompt_id": prompt.id}, prompt.extra["client_id"])

    async def _moved(self) -> None:
        self._wake.set()
        for client in list(self._sockets):
            await self._say("status", {"status": self._info()}, client)

    async def _say(self, kind: str, data: dict[str, Any], client: str) -> None:
        socket = self._sockets.get(client)
        if socket is not None and not self.behavior.silent:
            with contextlib.suppress(ConnectionError, RuntimeError):
                await socket.send_str(json.dumps({"type": kind, "data": data}))

    async def _preview(self, prompt: Prompt, step: int) -> None:
        socket = self._sockets.get(prompt.extra["client_id"])
        if socket is not None:
            with contextlib.suppress(ConnectionError, RuntimeError):
                await socket.send_bytes(struct.pack(">II", 1, 2) + png(8, 8, step))

    def _cut(self, socket: web.WebSocketResponse) -> None:
        self._sockets = {client: one for client, one in self._sockets.items() if one is not socket}
        transport = socket._req.transport if socket._req is not None else None
        if transport is not None:
            transport.abort()


def png(width: int, height: int, shade: int = 0) -> bytes:
    out = BytesIO()
    Image.new("RGB", (width, height), (shade % 256, 100, 200)).save(out, "PNG")
    return out.getvalue()


def _turn(kind: str) -> int:
    """Loaders first, then what is between, then samplers, then what saves."""
    if kind in OUTPUTS:
        return 3
    return 2 if kind in SAMPLERS else 0 if "Loader" in kind else 1


def _steps(graph: Graph, node: str) -> int:
    inputs = graph[node]["inputs"]
    if "sigmas" in inputs:
        inputs = graph[inputs["sigmas"][0]]["inputs"]
    return int(inputs["steps"])


def _error(kind: str, message: str, details: str, name: str = "") -> dict[str, Any]:
    return {"type": kind, "message": message, "details": details, "extra_info": {"input_name": name} if name else {}}
