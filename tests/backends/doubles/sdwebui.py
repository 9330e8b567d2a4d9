"""A protocol-true double of stable-diffusion-webui's API, and of stable-diffusion.cpp's, with faults on request."""

from __future__ import annotations

import asyncio
import base64
import json
from dataclasses import dataclass, replace
from io import BytesIO
from typing import Any, Self

from aiohttp import web
from PIL import Image

from tests.servers import here


@dataclass
class Behavior:
    """How the server is from now on."""

    step_s: float = 0.0
    load_s: float = 0.0
    """How long another checkpoint takes to load."""
    begin_s: float = 0.0
    """From the request to the start of the work, which forgets interrupts."""
    answer_s: float = 0.0
    """How long it takes to say how far it is."""
    error: tuple[int, Any] | None = None
    """Status and body of a failure after the last step."""
    previews: bool = False
    cpp: bool = False
    """As stable-diffusion.cpp: no progress, no interrupt, one model."""
    current_task: bool = True
    """Older servers do not say whose work it is."""
    drop: bool = False
    """The connection breaks in the middle of the work, which goes on."""
    auth: str = ""
    grid: bool = False
    """A grid comes before the picture."""
    noisy: bool = False
    """An extension adds a picture behind it."""


class SDWebUIDouble:
    """`async with SDWebUIDouble() as double`: `double.url`; `double.behave(...)`."""

    def __init__(self) -> None:
        self.behavior = Behavior()
        self.models = ["v1-5", "sdxl"]
        self.loaded = "v1-5"
        self.port = 0
        self.calls: list[dict[str, Any]] = []
        self.interrupts = 0
        self.stopped = asyncio.Event()
        """It was interrupted."""
        self.looked = asyncio.Event()
        """Somebody asked how far it is."""
        self._runner: web.AppRunner | None = None
        self._starting: asyncio.Task[None] | None = None
        self._clear()

    def _clear(self) -> None:
        self.working = 0
        self._lock = asyncio.Lock()
        self._interrupted = False
        self._task: str | None = None
        self._step = self._steps = 0

    @property
    def url(self) -> str:
        return f"http://{here()}:{self.port}"

    async def idle(self) -> bool:
        return self.working == 0

    def behave(self, **changes: Any) -> None:
        self.behavior = replace(Behavior(), **changes)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.kill()

    async def start(self) -> None:
        """Listen; again on the same port after `kill`."""
        self._clear()
        app = web.Application(client_max_size=64 * 1024 * 1024, middlewares=[self._guard])
        app.add_routes(
            [
                web.post("/sdapi/v1/txt2img", self._make),
                web.post("/sdapi/v1/img2img", self._make),
                web.get("/sdapi/v1/progress", self._progress),
                web.post("/sdapi/v1/interrupt", self._interrupt),
                web.get("/sdapi/v1/sd-models", self._list),
                web.get("/sdapi/v1/options", self._options),
                web.get("/sdapi/v1/samplers", _names("Euler a", "DPM++ 2M")),
                web.get("/sdapi/v1/schedulers", _names("automatic", "karras")),
                web.get("/sdapi/v1/loras", _names("pixel-art", "bad<name>")),
            ]
        )
        self._runner = web.AppRunner(app, shutdown_timeout=0.01)
        await self._runner.setup()
        await web.TCPSite(self._runner, here(), self.port, reuse_address=True).start()
        self.port = self._runner.addresses[0][1]

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
        if self._runner is not None:
            await self._runner.cleanup()
        self._runner = None
        self.working = 0

    @web.middleware
    async def _guard(self, request: web.Request, handler: Any) -> web.StreamResponse:
        behavior = self.behavior
        if behavior.auth:
            wanted = f"Basic {base64.b64encode(behavior.auth.encode()).decode()}"
            if request.headers.get("authorization") != wanted:
                return web.json_response({"detail": "Incorrect username or password"}, status=401)
        if behavior.cpp and request.path.endswith(("/progress", "/interrupt", "/samplers", "/schedulers", "/loras")):
            return web.Response(status=404)
        return await handler(request)

    async def _list(self, _: web.Request) -> web.Response:
        if self.behavior.cpp:
            return web.json_response([{"title": "v1-5", "model_name": "v1-5", "hash": "8888888888"}])
        return web.json_response([{"title": _title(name), "model_name": name, "hash": "ab12"} for name in self.models])

    async def _options(self, _: web.Request) -> web.Response:
        return web.json_response({"sd_model_checkpoint": _title(self.loaded), "samples_format": "png"})

    async def _interrupt(self, _: web.Request) -> web.Response:
        self.interrupts += 1
        self.stopped.set()
        self._interrupted = True
        return web.json_response({})

    async def _progress(self, _: web.Request) -> web.Response:
        self.looked.set()
        await asyncio.sleep(self.behavior.answer_s)
        state = {"sampling_step": self._step, "sampling_steps": self._steps, "job_count": int(self._task is not None)}
        if self._task is None:
            return web.json_response({"progress": 0, "eta_relative": 0, "state": state, "current_image": None})
        done = min(1.0, 0.01 + self._step / max(1, self._steps))
        image = base64.b64encode(png(16, 16)).decode() if self.behavior.previews and self._step else None
        said: dict[str, Any] = {"progress": done, "eta_relative": 1.0, "state": state, "current_image": image}
        return web.json_response(said | ({"current_task": self._task} if self.behavior.current_task else {}))

    async def _make(self, request: web.Request) -> web.Response:
        """The work goes on whether the caller stays or not, as in the real server's threads."""
        body = await request.json()
        self.calls.append(body | {"path": request.path})
        if not isinstance(body.get("steps", 1), int):
            detail = [{"loc": ["body", "steps"], "msg": "value is not a valid integer", "type": "type_error.integer"}]
            return web.json_response({"detail": detail}, status=422)
        self.working += 1
        if self.behavior.drop and request.transport is not None:
            request.transport.abort()
        return await asyncio.shield(asyncio.ensure_future(self._work(body)))

    async def _work(self, body: dict[str, Any]) -> web.Response:
        try:
            async with self._lock:
                return await self._locked(body)
        finally:
            self.working = max(0, self.working - 1)

    async def _locked(self, body: dict[str, Any]) -> web.Response:
        behavior = self.behavior
        await asyncio.sleep(behavior.begin_s)
        self._interrupted = False
        self._task, self._step, self._steps = body.get("force_task_id") or "task(other)", 0, 0
        try:
            wanted = body.get("override_settings", {}).get("sd_model_checkpoint", self.loaded).partition(" ")[0]
            if wanted != self.loaded:
                await asyncio.sleep(behavior.load_s)
                self.loaded = wanted
            self._steps = body.get("steps", 4)
            for step in range(1, self._steps + 1):
                if self._interrupted or self._runner is None:
                    break
                await asyncio.sleep(behavior.step_s)
                self._step = step
        finally:
            self._task = None
        if behavior.error is not None:
            return web.json_response(behavior.error[1], status=behavior.error[0])
        for image in [*body.get("init_images", ()), *([body["mask"]] if body.get("mask") else ())]:
            if not base64.b64decode(image).startswith(b"\x89PNG"):
                said = {"error": "HTTPException", "detail": "Invalid encoded image", "body": "", "errors": ""}
                return web.json_response(said, status=500)
        return web.json_response(self._answer(body))

    def _answer(self, body: dict[str, Any]) -> dict[str, Any]:
        picture = png(body.get("width", 512), body.get("height", 512))
        grid = [png(1, 1)] if self.behavior.grid else []
        images = [*grid, picture, *([png(2, 2)] if self.behavior.noisy else [])]
        info = {"all_seeds": [body["seed"]], "seed": body["seed"], "index_of_first_image": len(grid)}
        return {
            "images": [base64.b64encode(image).decode() for image in images],
            "parameters": body,
            "info": json.dumps(info),
        }


def _names(*names: str) -> Any:
    async def answer(_: web.Request) -> web.Response:
        return web.json_response([{"name": name, "label": name, "options": {}} for name in names])

    return answer


def png(width: int, height: int) -> bytes:
    out = BytesIO()
    Image.new("RGB", (width, height), (200, 100, 50)).save(out, "PNG")
    return out.getvalue()


def _title(name: str) -> str:
    return f"{name} [ab12]"
