"""A protocol-true double of Ollama's native API, with faults on request. It counts what it is doing.

It schedules as Ollama's `server/sched.go` does: a request for a loaded model goes ahead at once; others wait in one line, and the first of it has
a model unloaded where there is no room, once nobody uses that model any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import math
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from aiohttp import web

from tests.servers import here

JSON = dict[str, Any]

CHAT, EMBED, VISION = "llama3.2:1b", "nomic-embed-text:latest", "llava:latest"
SERVER_CONTEXT = 4096
"""`OLLAMA_CONTEXT_LENGTH`."""
BUSY = "server busy, please try again.  maximum pending requests exceeded"
STAMP = "2025-05-10T08:06:48.639712648-07:00"


@dataclass(frozen=True)
class StoredModel:
    """A model on its disk."""

    capabilities: tuple[str, ...] = ("completion",)
    family: str = "llama"
    context_length: int = 8192
    embedding_length: int = 64
    num_ctx: int | None = None
    """The Modelfile's."""
    remote_host: str = ""


MODELS = {
    CHAT: StoredModel(("completion", "tools", "thinking")),
    EMBED: StoredModel(("embedding",), "nomic-bert", 2048),
    VISION: StoredModel(("completion", "vision")),
}
LAYERS = {"sha256:aa11": 4000, "sha256:bb22": 600}
"""What every model is made of, when it is pulled."""


@dataclass
class Behavior:
    """What the next answers look like."""

    words: tuple[str, ...] = ("Hello", " there", ",", " world", "!")
    thoughts: tuple[str, ...] = ()
    calls: tuple[JSON, ...] = ()
    """Tool calls, each in a line of its own."""
    logprobs: bool = False
    done_reason: str = ""
    """Instead of `stop` or `length`."""
    delay_s: float = 0.0
    """Before each line, and each embedding."""
    loads: asyncio.Event | None = None
    """A load ends when this is set; None: after `load_s`."""
    load_s: float = 0.0
    discovery_s: float = 0.0
    """Ollama looks at the memory of its GPUs before a load begins: so long, the model is not listed yet."""
    fault: Literal["", "error_line", "no_done", "die", "hang", "nonsense", "no_newline"] = ""
    """In the middle of a stream."""
    error: str = "an error was encountered while running the model: CUDA error"
    refuse: tuple[int, str] | None = None
    """Status and text of every answer to a POST but for `/api/show`."""
    old: bool = False
    """As before 0.6.4: `/api/show` does not tell capabilities, `dimensions` is not known."""
    version: str = "0.12.11"


class OllamaDouble:
    """`async with OllamaDouble() as double`: `double.url`; `double.behave(...)` sets how it answers from now on."""

    def __init__(self, max_loaded: int | None = None) -> None:
        """`max_loaded`: `OLLAMA_MAX_LOADED_MODELS`; None: all that it has."""
        self.max_loaded = max_loaded
        self.behavior = Behavior()
        self.models = dict(MODELS)
        self.loaded: dict[str, JSON] = {}
        """Loaded or loading, with the options that a change of needs another load."""
        self.seen: list[tuple[str, JSON]] = []
        """Paths and bodies of POST requests."""
        self.counts: Counter[str] = Counter()
        """Begun loads, as `load`; loads given up, as `given up`; models that gave way, as `evicted`; prompts cut, as `cut`; requests by path."""
        self.running = 0
        """Loads, answers and pulls under way."""
        self.port = 0
        self._line = asyncio.Lock()
        self._users: Counter[str] = Counter()
        self._being_loaded: set[str] = set()
        self._moved = asyncio.Event()
        """Set, and replaced, whenever one of those changes."""
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"http://{here()}:{self.port}"

    def behave(self, **changes: Any) -> None:
        self.behavior = replace(Behavior(), **changes)

    def bodies(self, path: str) -> list[JSON]:
        return [body for seen, body in self.seen if seen == path]

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.kill()

    async def start(self) -> None:
        """Listen; again on the same port after `kill`, with nothing loaded."""
        app = web.Application(client_max_size=64 * 1024 * 1024)
        app.router.add_get("/api/version", self._version)
        app.router.add_get("/api/tags", self._tags)
        app.router.add_get("/api/ps", self._ps)
        app.router.add_get("/v1/models", self._openai_models)
        posts = {
            "show": self._show, "generate": self._generate, "chat": self._chat, "embed": self._embed, "pull": self._pull,
        }  # fmt: skip
        for name, handler in posts.items():
            app.router.add_post(f"/api/{name}", self._post(handler))
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, here(), self.port)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def kill(self) -> None:
        """Die: every connection is cut, and nothing is loaded any more."""
        runner, self._runner = self._runner, None
        if runner is None:
            return
        for connection in list(runner.server.connections if runner.server else ()):
            if connection.transport is not None:
                connection.transport.abort()
        await runner.cleanup()
        self.loaded.clear()
        self._line = asyncio.Lock()
        self._users.clear()
        self._being_loaded.clear()

    # What it has

    async def _version(self, _: web.Request) -> web.Response:
        return web.json_response({"version": self.behavior.version})

    async def _tags(self, _: web.Request) -> web.Response:
        return web.json_response({"models": [self._entry(name) for name in self.models]})

    async def _ps(self, _: web.Request) -> web.Response:
        more = {"expires_at": STAMP, "size_vram": 0}
        entries = [self._entry(name) | more | {"context_length": self._context(name)} for name in self.loaded]
        return web.json_response({"models": entries})

    async def _openai_models(self, _: web.Request) -> web.Response:
        names = [{"id": name, "object": "model", "created": 1746889608, "owned_by": "library"} for name in self.models]
        return web.json_response({"object": "list", "data": names or None})

    def _entry(self, name: str) -> JSON:
        digest = hashlib.sha256(name.encode()).hexdigest()
        details = {"format": "gguf", "family": self.models[name].family, "parameter_size": "1.2B"}
        entry = {"name": name, "model": name, "modified_at": STAMP, "size": 1, "digest": digest, "details": details}
        remote = self.models[name].remote_host
        return entry | ({"remote_host": remote, "remote_model": name} if remote else {})

    async def _show(self, _: web.Request, body: JSON) -> web.StreamResponse:
        model = self.models[self._existing(body)]
        info = {
            "general.architecture": model.family,
            f"{model.family}.context_length": model.context_length,
            f"{model.family}.embedding_length": model.embedding_length,
        }
        told: dict[str, Any] = {} if self.behavior.old else {"capabilities": list(model.capabilities)}
        if model.num_ctx:
            told |= {
                "parameters": f'stop                           "<|eot_id|>"\nnum_ctx                        {model.num_ctx}'
            }
        return web.json_response({"modelfile": "", "template": "{{ .Prompt }}", "model_info": info} | told)

    # Requests

    def _post(
        self, handler: Callable[[web.Request, JSON], Awaitable[web.StreamResponse]]
    ) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def handle(request: web.Request) -> web.StreamResponse:
            try:
                body = await request.json()
            except json.JSONDecodeError:
                return _error(400, "invalid character 'o' in literal null (expecting 'u')")
            self.seen.append((request.path, body))
            self.counts[request.path] += 1
            refuse = self.behavior.refuse
            if refuse is not None and request.path != "/api/show":
                return _error(*refuse)
            try:
                with self._busy(request.path):
                    return await handler(request, body)
            except _Refused as refused:
                return _error(refused.status, str(refused))

        return handle

    @contextlib.contextmanager
    def _busy(self, path: str) -> Iterator[None]:
        works = path != "/api/show"
        self.running += works
        try:
            yield
        finally:
            self.running -= works

    def _existing(self, body: JSON) -> str:
        name = str(body.get("model") or "")
        full = name if ":" in name else f"{name}:latest"
        if full not in self.models:
            raise _Refused(404, f"model '{name}' not found")
        return full

    async def _generate(self, request: web.Request, body: JSON) -> web.StreamResponse:
        name = self._existing(body)
        if not body.get("prompt") and body.get("keep_alive") == 0:
            self.loaded.pop(name, None)
            return web.json_response(_line(body, response="", done=True, done_reason="unload"))
        if "completion" not in self.models[name].capabilities:
            raise _Refused(400, f'"{name}" does not support generate')
        async with self._runner_of(name, body):
            if not body.get("prompt"):
                return web.json_response(_line(body, response="", done=True, done_reason="load"))
            self._fit(name, body, body["prompt"])
            pieces = [{"response": "", "thinking": thought} for thought in self.behavior.thoughts]
            return await self._stream(request, body, [*pieces, *({"response": word} for word in self.behavior.words)])

    async def _chat(self, request: web.Request, body: JSON) -> web.StreamResponse:
        name = self._existing(body)
        if not isinstance(body.get("messages"), list):
            raise _Refused(
                400, "json: cannot unmarshal string into Go struct field ChatRequest.messages of type []api.Message"
            )
        able = self.models[name].capabilities
        if "completion" not in able:
            raise _Refused(400, f'"{name}" does not support chat')
        if body.get("tools") and "tools" not in able:
            raise _Refused(400, f"registry.ollama.ai/library/{name} does not support tools")
        if body.get("think") and "thinking" not in able:
            raise _Refused(400, f'"{name}" does not support thinking')
        async with self._runner_of(name, body):
            self._fit(name, body, " ".join(str(message.get("content") or "") for message in body["messages"]))
            return await self._answer(request, body)

    async def _answer(self, request: web.Request, body: JSON) -> web.StreamResponse:
        behavior = self.behavior
        messages: list[JSON] = [{"content": "", "thinking": thought} for thought in behavior.thoughts]
        messages += [{"content": "", "tool_calls": [call]} for call in behavior.calls if body.get("tools")]
        messages += [{"content": word} for word in behavior.words]
        pieces: list[JSON] = [{"message": {"role": "assistant"} | message} for message in messages]
        if body.get("logprobs"):
            for piece in pieces:
                token = {"token": piece["message"]["content"], "logprob": -0.5, "bytes": [1]}
                piece["logprobs"] = [token | {"top_logprobs": [token]}]
        return await self._stream(request, body, pieces)

    async def _embed(self, _: web.Request, body: JSON) -> web.StreamResponse:
        name = self._existing(body)
        async with self._runner_of(name, body):
            return await self._vectors(name, body)

    async def _vectors(self, name: str, body: JSON) -> web.StreamResponse:
        given = body.get("input")
        texts = [given] if isinstance(given, str) else given or []
        if not all(isinstance(text, str) for text in texts):
            raise _Refused(400, "invalid input type")
        for text in texts:
            self._fit(name, body, text, "the input length exceeds the context length")
        size = self.models[name].embedding_length
        if body.get("dimensions") and not self.behavior.old:
            size = min(size, body["dimensions"])
        await asyncio.sleep(self.behavior.delay_s * len(texts))
        vectors = [vector(text, size) for text in texts]
        tokens = {"prompt_eval_count": sum(len(text.split()) for text in texts)} if texts else {}
        return web.json_response({"model": body["model"], "embeddings": vectors, "total_duration": 9, **tokens})

    async def _pull(self, request: web.Request, body: JSON) -> web.StreamResponse:
        name = body["model"]

        async def lines() -> AsyncIterator[JSON]:
            yield {"status": "pulling manifest"}
            if name == "no-such-model":
                yield {"error": "pull model manifest: file does not exist"}
                return
            for digest, total in LAYERS.items():
                for completed in range(0, total + 1, total // 4):
                    await asyncio.sleep(self.behavior.delay_s)
                    line = {"status": f"pulling {digest[7:]}", "digest": digest, "total": total}
                    yield line | ({"completed": completed} if completed else {})
                if self.behavior.fault == "error_line":
                    yield {"error": "max retries exceeded: EOF"}
                    return
            if self.behavior.fault == "no_done":
                return
            for status in ("verifying sha256 digest", "writing manifest"):
                yield {"status": status}
            self.models[name if ":" in name else f"{name}:latest"] = StoredModel()
            yield {"status": "success"}

        return await _send_lines(request, lines())

    # Work

    def _context(self, name: str) -> int:
        model = self.models[name]
        wanted = self.loaded.get(name, {}).get("num_ctx") or model.num_ctx or SERVER_CONTEXT
        return int(min(wanted, model.context_length))

    def _fit(self, name: str, body: JSON, text: str, words: str = "") -> None:
        """A prompt is cut to the context, or refused where the caller says so; a word is a token here."""
        tokens, context = len(text.split()), self._context(name)
        if tokens <= context or self.models[name].remote_host:
            return
        if body.get("truncate", True):
            self.counts["cut"] += 1
            return
        raise _Refused(
            400,
            words
            or f"request ({tokens} tokens) exceeds the available context size ({context} tokens), try increasing it",
        )

    @contextlib.asynccontextmanager
    async def _runner_of(self, name: str, body: JSON) -> AsyncIterator[None]:
        """Have the model loaded with the request's own `num_ctx`. While it is being loaded, `/api/ps` shows it already."""
        options = body.get("options") or {}
        if not isinstance(options.get("seed", 0), int):
            raise _Refused(500, 'option "seed" must be of type integer')
        if self.models[name].remote_host:
            yield
            return
        need = {key: value for key, value in options.items() if key in ("num_ctx", "num_gpu")}
        while not await self._use(name, need):
            async with self._line:  # in the order in which they came
                if self.loaded.get(name) == need:
                    continue
                await asyncio.sleep(self.behavior.discovery_s)
                await self._make_room(name)
                self._begin_load(name, need)
            await self._load(name)
            break
        try:
            yield
        finally:
            self._leave(name, body.get("keep_alive"))

    async def _use(self, name: str, need: JSON) -> bool:
        """Use the model, if it is loaded. One that is being loaded is waited for."""
        while self.loaded.get(name) == need:
            if name not in self._being_loaded:
                self._users[name] += 1
                return True
            await self._moved.wait()
        return False

    async def _make_room(self, name: str) -> None:
        while name in self.loaded or (self.max_loaded and len(self.loaded) >= self.max_loaded):
            idle = [one for one in self.loaded if not self._users[one]]
            victim = name if name in self.loaded else next(iter(idle or self.loaded))
            while self._users[victim] and victim in self.loaded:
                await self._moved.wait()
            if self.loaded.pop(victim, None) is not None:
                self.counts["evicted"] += 1

    def _begin_load(self, name: str, need: JSON) -> None:
        self.loaded[name] = need
        self._being_loaded.add(name)
        self._users[name] += 1
        self.counts["load"] += 1
        self._move()

    async def _load(self, name: str) -> None:
        try:
            if self.behavior.loads is not None:
                await self.behavior.loads.wait()
            await asyncio.sleep(self.behavior.load_s)
        except asyncio.CancelledError:
            self.loaded.pop(name, None)
            self._users[name] -= 1
            self.counts["given up"] += 1
            raise
        finally:
            self._being_loaded.discard(name)
            self._move()

    def _leave(self, name: str, keep_alive: Any) -> None:
        self._users[name] -= 1
        if keep_alive == 0 and not self._users[name]:
            self.loaded.pop(name, None)
        self._move()

    def _move(self) -> None:
        self._moved.set()
        self._moved = asyncio.Event()

    async def _stream(self, request: web.Request, body: JSON, pieces: list[JSON]) -> web.StreamResponse:
        assert body.get("stream", True)
        limit = (body.get("options") or {}).get("num_predict", -1)
        cut = 0 <= limit < len(pieces)
        return await _send_lines(request, self._lines(body, pieces[:limit] if cut else pieces, cut))

    async def _lines(self, body: JSON, pieces: list[JSON], cut: bool) -> AsyncIterator[JSON | bytes | None]:
        behavior = self.behavior
        for number, piece in enumerate(pieces):
            await asyncio.sleep(behavior.delay_s)
            if number == len(pieces) // 2:
                if behavior.fault == "hang":
                    await asyncio.Event().wait()
                if behavior.fault == "die":
                    yield None
                if behavior.fault == "error_line":
                    yield {"error": behavior.error}
                    return
                if behavior.fault == "nonsense":
                    yield b"{nonsense}\n"
            yield _line(body, **piece, done=False)
        if behavior.fault == "no_done":
            return
        reason = behavior.done_reason or ("length" if cut else "stop")
        last = (
            {"message": {"role": "assistant", "content": ""}}
            if "messages" in body
            else {"response": "", "context": [1]}
        )
        counts = {"total_duration": 5, "load_duration": 1, "prompt_eval_count": 7, "eval_count": len(pieces)}
        line = _line(body, **last, done=True, done_reason=reason, **counts)
        yield json.dumps(line).encode() if behavior.fault == "no_newline" else line


class _Refused(Exception):
    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


def vector(text: str, size: int) -> list[float]:
    """The embedding of a text: another one for each, of length 1."""
    seed = hashlib.sha256(text.encode()).digest() * (size // 32 + 1)
    numbers = [byte - 127.5 for byte in seed[:size]]
    length = math.sqrt(sum(number * number for number in numbers))
    return [round(number / length, 7) for number in numbers]


def _line(body: JSON, **fields: Any) -> JSON:
    return {"model": body["model"], "created_at": "2025-07-07T20:22:19.184789Z", **fields}


def _error(status: int, text: str) -> web.Response:
    return web.json_response({"error": text}, status=status)


async def _send_lines(request: web.Request, lines: AsyncIterator[JSON | bytes | None]) -> web.StreamResponse:
    """Chunked NDJSON; None cuts the connection. An error before any other line is an answer of its own."""
    response = web.StreamResponse(headers={"content-type": "application/x-ndjson"})
    response.enable_chunked_encoding()
    async for line in lines:
        if line is None:
            assert request.transport is not None
            request.transport.abort()
            return response
        if not response.prepared:
            if isinstance(line, dict) and "error" in line:
                return _error(500, line["error"])
            await response.prepare(request)
        await response.write(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n")
    if not response.prepared:
        await response.prepare(request)
    await response.write_eof()
    return response
