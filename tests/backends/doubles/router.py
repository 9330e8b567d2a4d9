"""A double of servers that load and unload models behind OpenAI's API: llama.cpp's router and llama-swap, as seen on both.

A request for a model that is not there waits until those in use have ended, unloads the one that was used least recently, and loads it. Meanwhile
later requests wait in line.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Any, Literal, Self

from aiohttp import web

from tests.servers import here

JSON = dict[str, Any]


class RouterDouble:
    """`async with RouterDouble(("a", "b"), 1) as double`: `double.url`, `double.loads`."""

    def __init__(
        self, models: tuple[str, ...], max_loaded: int, kind: Literal["llamacpp", "llama-swap"] = "llamacpp"
    ) -> None:
        self.models, self.max_loaded, self.kind = models, max_loaded, kind
        self.load_s = 0.05
        self.whole_after_s: float | None = None
        """Answers come in one piece, so long after a job began; None: they are streamed."""
        self.states: dict[str, str] = {}
        """`loading` or `loaded`; the most recently used model is the last one."""
        self.loads = 0
        self.url = ""
        self._users: Counter[str] = Counter()
        self._line = asyncio.Lock()
        self._idle = asyncio.Event()
        self._runner: web.AppRunner | None = None

    async def __aenter__(self) -> Self:
        app = web.Application()
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/props", self._props)
        app.router.add_get("/running", self._running)
        app.router.add_post("/v1/chat/completions", self._chat)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.0)
        await self._runner.setup()
        await web.TCPSite(self._runner, here(), 0).start()
        self.url = f"http://{here()}:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._runner is not None
        await self._runner.cleanup()

    async def _health(self, _: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _props(self, _: web.Request) -> web.Response:
        if self.kind != "llamacpp":
            raise web.HTTPNotFound
        return web.json_response(
            {"role": "router", "max_instances": self.max_loaded, "default_generation_settings": {"n_ctx": 0}}
        )

    async def _models(self, _: web.Request) -> web.Response:
        entries: list[JSON] = [
            {"id": name, "object": "model", "owned_by": self.kind, "created": 1} for name in self.models
        ]
        if self.kind == "llama-swap":
            entries.append(
                {"id": "peer/big", "object": "model", "owned_by": self.kind, "meta": {"llamaswap": {"type": "peer"}}}
            )
            return web.json_response({"object": "list", "data": entries})
        for entry in entries:
            state = self.states.get(entry["id"], "unloaded")
            entry["status"] = {"value": state}
            if state == "loaded":
                entry["meta"] = {"n_ctx": 512, "n_ctx_train": 8192}
        return web.json_response({"object": "list", "data": entries})

    async def _running(self, _: web.Request) -> web.Response:
        if self.kind != "llama-swap":
            raise web.HTTPNotFound
        words = {"loading": "starting", "loaded": "ready"}
        return web.json_response(
            {"running": [{"model": name, "state": words[state]} for name, state in self.states.items()]}
        )

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        name = body["model"]
        if name not in self.models:
            return web.json_response({"error": {"message": "model not found", "code": 400}}, status=400)
        await self._hold(name)
        try:
            return await self._answer(request, name)
        finally:
            self._users[name] -= 1
            self._idle.set()

    async def _hold(self, name: str) -> None:
        async with self._line:
            if name not in self.states:
                while len(self.states) >= self.max_loaded:
                    await self._unload(next(iter(self.states)))
                self.states[name] = "loading"
                self.loads += 1
                await asyncio.sleep(self.load_s)
            self.states.pop(name)
            self.states[name] = "loaded"
            self._users[name] += 1

    async def _unload(self, victim: str) -> None:
        while self._users[victim]:
            self._idle.clear()
            await self._idle.wait()
        del self.states[victim]

    async def _answer(self, request: web.Request, name: str) -> web.StreamResponse:
        if self.whole_after_s is not None:
            await asyncio.sleep(self.whole_after_s)
            message = {"role": "assistant", "content": "one two"}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            return web.json_response({"id": "c", "object": "chat.completion", "model": name, "choices": [choice]})
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for word, reason in (("one", None), (" two", None), (None, "stop")):
            await asyncio.sleep(0.005)
            choice = {"index": 0, "delta": {"content": word} if word else {}, "finish_reason": reason}
            chunk = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": name, "choices": [choice]}
            await response.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response
