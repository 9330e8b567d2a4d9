"""A protocol-true double of InvokeAI 6.14: its queue over HTTP, its events over Socket.IO, with faults on request.

It runs graphs node by node as InvokeAI does, one item at a time, and as slowly as it is told. A cancelled item counts as ended at
once, and is worked on until the step it is at is over.
"""

from __future__ import annotations

import asyncio
import base64
import io
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Self

import socketio
from aiohttp import web
from PIL import Image

from tests.servers import here

JSON = dict[str, Any]

LOADERS = {"main_model_loader", "sdxl_model_loader", "flux_model_loader"}
DENOISERS = {"denoise_latents": "steps", "flux_denoise": "num_steps"}
PICTURES = {"l2i", "flux_vae_decode", "img_resize", "img_lerp", "expand_mask_with_fade", "img_paste", "blank_image"}
OTHERS = {"noise", "compel", "sdxl_compel_prompt", "flux_text_encoder", "flux_kontext"}
OTHERS |= {"i2l", "flux_vae_encode", "create_gradient_mask"}
MULTIPLES = {"noise": 8, "flux_denoise": 16}
MODELS = (
    {"key": "key-sd", "name": "dream", "base": "sd-1", "variant": "normal", "format": "diffusers"},
    {"key": "key-xl", "name": "dream-xl", "base": "sdxl", "variant": "normal", "format": "checkpoint"},
    {"key": "key-dev", "name": "flux-dev", "base": "flux", "variant": "dev", "format": "checkpoint"},
    {"key": "key-schnell", "name": "flux-schnell", "base": "flux", "variant": "schnell", "format": "checkpoint"},
    {"key": "key-fill", "name": "flux-fill", "base": "flux", "variant": "dev_fill", "format": "checkpoint"},
    {"key": "key-z", "name": "z-image", "base": "z-image", "variant": "turbo", "format": "diffusers"},
)
PARTS = (
    {"key": "key-t5", "name": "t5", "base": "any", "type": "t5_encoder"},
    {"key": "key-clip", "name": "clip", "base": "any", "type": "clip_embed", "variant": "large"},
    {"key": "key-vae", "name": "flux-vae", "base": "flux", "type": "vae"},
)


def jpeg() -> str:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), "teal").save(out, "JPEG")
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


def png(width: int, height: int, seed: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height), (seed % 256, seed // 256 % 256, 77)).save(out, "PNG")
    return out.getvalue()


@dataclass
class Item:
    """An item of the queue."""

    id: int
    batch: str
    graph: JSON
    status: str = "pending"
    started: bool = False
    error: tuple[str, str] | None = None
    results: JSON = field(default_factory=dict)
    """By prepared node."""
    prepared: dict[str, list[str]] = field(default_factory=dict)

    def describe(self) -> JSON:
        """As `GET` answers: what is null is left out."""
        session = {"id": "s", "results": self.results, "errors": {}, "source_prepared_mapping": self.prepared}
        state = {"item_id": self.id, "status": self.status, "batch_id": self.batch, "session": session}
        if self.started:
            state["started_at"] = "2026-11-23 23:56:53.594"
        if self.error:
            state["error_type"], state["error_message"] = self.error
        return state


class InvokeAIDouble:
    """`async with InvokeAIDouble() as double`: `double.url`. `kill()` and `start()` as the process would."""

    def __init__(self) -> None:
        self.port = 0
        self.step_s = 0.002
        """Seconds of a step."""
        self.models: list[JSON] = [{"type": "main", "hash": "h", "default_settings": None} | m for m in MODELS]
        self.models += [{"hash": "h"} | part for part in PARTS]
        self.fails: tuple[str, str] | None = None
        """`error_type` and `error_message` of what denoises from now on."""
        self.full = False
        """The queue takes nothing."""
        self.deaf = False
        """There is no Socket.IO."""
        self.hangs_up_at: int | None = None
        """The step at which it closes every Socket.IO connection."""
        self.silent = False
        """No events, though connections stay."""
        self.token = ""
        """Wanted of everybody, where it is not empty: multi-user mode."""
        self.working = False
        self.items: dict[int, Item] = {}
        self.images: dict[str, bytes] = {}
        self.intermediate: dict[str, bool] = {}
        self.batches: list[JSON] = []
        """Every batch that came."""
        self.uploads: list[str] = []
        self.listeners = 0
        """Subscribed to the queue."""
        self.enqueuing = asyncio.Event()
        """A batch is coming in."""
        self.enqueue_gate: asyncio.Event | None = None
        """Batches are taken, and answered, when this is set."""
        self._more = asyncio.Event()

    @property
    def url(self) -> str:
        return f"http://{here()}:{self.port}"

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.kill()

    async def start(self) -> None:
        """Serve; what was in progress when it died is cancelled, as InvokeAI does."""
        for item in self.items.values():
            item.status = "canceled" if item.status == "in_progress" else item.status
        self.sio = socketio.AsyncServer(async_mode="aiohttp")
        self.sio.on("connect", self._on_connect)
        self.sio.on("subscribe_queue", self._on_subscribe)
        app = web.Application(middlewares=[self._allowed], client_max_size=2**26)
        if not self.deaf:
            self.sio.attach(app, "/ws/socket.io")
        app.add_routes(self._routes())
        self._runner = web.AppRunner(app, shutdown_timeout=0.01)
        await self._runner.setup()
        await web.TCPSite(self._runner, here(), self.port).start()
        self.port = self._runner.addresses[0][1]
        self._worker = asyncio.create_task(self._work())

    async def kill(self) -> None:
        """End as `kill -9` does."""
        self._worker.cancel()
        await asyncio.gather(self._worker, return_exceptions=True)
        self.working = False
        self.listeners = 0
        for connection in self._runner.server.connections if self._runner.server else ():
            if connection.transport:
                connection.transport.abort()
        if self.sio.eio.service_task_handle is not None:
            await self.sio.shutdown()
            self.sio.eio.service_task_handle = None
        await self._runner.cleanup()

    # Socket.IO

    async def _on_connect(self, _sid: str, _environ: JSON, auth: JSON | None) -> bool:
        return not self.token or (auth or {}).get("token") == self.token

    async def _on_subscribe(self, sid: str, data: JSON) -> None:
        await self.sio.enter_room(sid, data["queue_id"])
        self.listeners += 1

    async def _say(self, event: str, item: Item, **more: Any) -> None:
        if not self.silent:
            data = {"queue_id": "default", "item_id": item.id, "batch_id": item.batch, "origin": "nexus"} | more
            await self.sio.emit(event, data, room="default")

    async def _hang_up(self) -> None:
        for sid, _ in list(self.sio.manager.get_participants("/", "default")):
            await self.sio.disconnect(sid)

    # HTTP

    @web.middleware
    async def _allowed(self, request: web.Request, handler: Any) -> Any:
        given = request.headers.get("authorization", "")
        if self.token and given != f"Bearer {self.token}" and not request.path.startswith("/ws"):
            return web.json_response({"detail": "Missing authentication credentials"}, status=401)
        return await handler(request)

    def _routes(self) -> list[web.RouteDef]:
        queue, images = "/api/v1/queue/default", "/api/v1/images"
        return [
            web.get("/api/v1/app/version", self._version),
            web.get("/api/v2/models/", self._models),
            web.post(f"{queue}/enqueue_batch", self._enqueue),
            web.get(f"{queue}/status", self._status),
            web.get(queue + "/i/{id}", self._item),
            web.put(queue + "/i/{id}/cancel", self._cancel),
            web.post(f"{images}/upload", self._upload),
            web.get(images + "/i/{name}/full", self._full),
            web.post(f"{images}/delete", self._delete),
        ]

    async def _version(self, _request: web.Request) -> web.Response:
        return web.json_response({"version": "6.14.2"})

    async def _models(self, _request: web.Request) -> web.Response:
        return web.json_response({"models": self.models})

    async def _enqueue(self, request: web.Request) -> web.Response:
        batch = (await request.json())["batch"]
        self.enqueuing.set()
        if self.enqueue_gate is not None:
            await self.enqueue_gate.wait()
        self.batches.append(batch)
        complaint = _complaint(batch["graph"])
        if complaint:
            return web.json_response({"detail": [complaint]}, status=422)
        graphs = [] if self.full else list(_graphs(batch))
        new = [Item(len(self.items) + n, batch["batch_id"], graph) for n, graph in enumerate(graphs, 1)]
        self.items |= {item.id: item for item in new}
        self._more.set()
        ids = [item.id for item in reversed(new)]
        return web.json_response({"queue_id": "default", "enqueued": len(ids), "batch": batch, "item_ids": ids})

    async def _status(self, _request: web.Request) -> web.Response:
        states = [item.status for item in self.items.values()]
        queue = {state: states.count(state) for state in ("pending", "in_progress", "waiting", "canceled")}
        return web.json_response({"queue": queue, "processor": {"is_started": True, "is_processing": self.working}})

    async def _item(self, request: web.Request) -> web.Response:
        item = self.items.get(int(request.match_info["id"]))
        if item is None:
            return web.json_response({"detail": "Queue item with id 1 not found in queue default"}, status=404)
        return web.json_response(item.describe())

    async def _cancel(self, request: web.Request) -> web.Response:
        item = self.items.get(int(request.match_info["id"]))
        if item is None:
            return web.json_response({"detail": "Queue item with id 1 not found in queue default"}, status=404)
        if item.status in ("pending", "in_progress", "waiting"):
            await self.end(item, "canceled")
        return web.json_response(item.describe())

    async def _upload(self, request: web.Request) -> web.Response:
        part = (await request.post())["file"]
        assert isinstance(part, web.FileField)
        if not part.content_type.startswith("image"):
            return web.json_response({"detail": "Not an image"}, status=415)
        data = part.file.read()
        try:
            width, height = Image.open(io.BytesIO(data)).size
        except OSError:
            return web.json_response({"detail": "Failed to read image"}, status=415)
        name = self._keep(data, intermediate=request.query["is_intermediate"] == "true")
        self.uploads.append(name)
        return web.json_response({"image_name": name, "width": width, "height": height}, status=201)

    async def _full(self, request: web.Request) -> web.Response:
        data = self.images.get(request.match_info["name"])
        if data is None:
            return web.json_response({"detail": "Not Found"}, status=404)
        return web.Response(body=data, content_type="image/png")

    async def _delete(self, request: web.Request) -> web.Response:
        names = (await request.json())["image_names"]
        for name in names:
            self.images.pop(name, None)
        return web.json_response({"deleted_images": names, "failed_images": []})

    # Work

    async def end(self, item: Item, status: str, error: tuple[str, str] | None = None) -> None:
        """What somebody at InvokeAI's page may do too."""
        item.status, item.error = status, error
        await self._say("queue_item_status_changed", item, status=status)

    def _keep(self, data: bytes, *, intermediate: bool) -> str:
        name = f"{uuid.uuid4()}.png"
        self.images[name], self.intermediate[name] = data, intermediate
        return name

    async def _work(self) -> None:
        while True:
            item = next((item for item in self.items.values() if item.status == "pending"), None)
            if item is None:
                self._more.clear()
                await self._more.wait()
                continue
            self.working, item.started = True, True
            await self.end(item, "in_progress")
            try:
                await self._run(item)
            except (LookupError, ValueError) as error:
                kind, _, message = str(error.args[0]).partition(": ")
                await self.end(item, "failed", (kind, message))
            if item.status == "in_progress":
                await self.end(item, "completed")
            self.working = False

    async def _run(self, item: Item) -> None:
        for node in _in_order(item.graph):
            if item.status == "canceled":
                return
            await self._say("invocation_started", item, invocation_source_id=node["id"])
            prepared = str(uuid.uuid4())
            result = await self._invoke(item, node)
            item.prepared[node["id"]] = [prepared]
            item.results[prepared] = result
            await self._say("invocation_complete", item, invocation_source_id=node["id"], result=result)

    async def _invoke(self, item: Item, node: JSON) -> JSON:
        kind = node["type"]
        if kind in LOADERS:
            for model in (value for value in node.values() if isinstance(value, dict)):
                if all(model["key"] != known["key"] for known in self.models):
                    raise LookupError(f"Exception: Unknown model {model['key']}")
                await self._progress(item, f"Loading model {model['name']}")
        if kind in DENOISERS:
            await self._denoise(item, node[DENOISERS[kind]])
        if "image" in node and node["image"]["image_name"] not in self.images:
            raise LookupError("ImageRecordNotFoundException: Image record not found")
        if kind == "create_gradient_mask":
            return {"type": "gradient_mask_output", "expanded_mask_area": self._picture(item, node)}
        if kind in PICTURES:
            await self._progress(item, "Saving image")
            return {"type": "image_output", "image": self._picture(item, node)}
        return {"type": f"{kind}_output"}

    async def _denoise(self, item: Item, steps: int) -> None:
        for step in range(steps + 1):
            if item.status == "canceled":
                return
            if step == self.hangs_up_at:
                await self._hang_up()
            if self.fails and step == 1:
                raise ValueError(": ".join(self.fails))
            await self._progress(item, "Denoising", step / steps, {"width": 64, "height": 64, "dataURL": jpeg()})
            await asyncio.sleep(self.step_s)

    async def _progress(
        self, item: Item, message: str, percentage: float | None = None, image: JSON | None = None
    ) -> None:
        await self._say("invocation_progress", item, message=message, percentage=percentage, image=image)

    def _picture(self, item: Item, node: JSON) -> JSON:
        sized = next((n for n in item.graph["nodes"].values() if n["type"] in (*MULTIPLES, "blank_image")), node)
        seed = next((n["seed"] for n in item.graph["nodes"].values() if "seed" in n), 0)
        data = png(sized.get("width", 512), sized.get("height", 512), seed)
        return {"image_name": self._keep(data, intermediate=node["is_intermediate"])}


def _graphs(batch: JSON) -> Iterator[JSON]:
    """One graph per value of the batch's data, or per run."""
    graph = batch["graph"]
    if not batch.get("data"):
        yield from [graph] * batch["runs"]
        return
    ((datum,),) = batch["data"]
    for value in datum["items"]:
        node = graph["nodes"][datum["node_path"]] | {datum["field_name"]: value}
        yield graph | {"nodes": graph["nodes"] | {node["id"]: node}}


def _complaint(graph: JSON) -> JSON | None:
    """What pydantic says of a node."""
    for name, node in graph["nodes"].items():
        place = ["body", "batch", "graph", "nodes", name]
        if node["type"] not in {*LOADERS, *DENOISERS, *PICTURES, *OTHERS}:
            return {"type": "union_tag_invalid", "loc": place, "msg": f"Input tag {node['type']!r} found"}
        step = MULTIPLES.get(node["type"], 1)
        if node.get("width", step) % step:
            return {"type": "multiple_of", "loc": [*place, "width"], "msg": f"Input should be a multiple of {step}"}
    ends = [end["node_id"] for edge in graph["edges"] for end in (edge["source"], edge["destination"])]
    missing = [end for end in ends if end not in graph["nodes"]]
    return {"type": "value_error", "loc": ["body"], "msg": f"Node {missing[0]} not found in graph"} if missing else None


def _in_order(graph: JSON) -> Iterator[JSON]:
    """The nodes, each after those it depends on."""
    needs: dict[str, set[str]] = {name: set() for name in graph["nodes"]}
    for edge in graph["edges"]:
        needs[edge["destination"]["node_id"]].add(edge["source"]["node_id"])
    done: set[str] = set()
    while ready := next((name for name in needs if name not in done and needs[name] <= done), None):
        done.add(ready)
        yield graph["nodes"][ready]
