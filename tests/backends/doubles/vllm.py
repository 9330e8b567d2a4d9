"""A protocol-true double of vLLM's server, with faults on request: what vLLM has beside OpenAI's API.

As in vLLM 0.32: `/v1/models` gives `max_model_len` of base models only and the parent of LoRA modules; an API key guards `/v1` alone; the
routes of sleep mode exist in its developer mode only; a request that reaches a sleeping engine breaks the connection.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field, replace
from typing import Any, Literal
from urllib.parse import parse_qs, urlsplit

from tests.backends.doubles.openai import OpenAIDouble, ReceivedRequest, send_answer

JSON = dict[str, Any]

MODEL = "Qwen/Qwen3-8B"
CONTEXT = 8192


@dataclass
class VLLMState:
    """How this server was started, and which faults it has."""

    names: tuple[str, ...] = (MODEL,)
    """`--served-model-name`: names of the one base model."""
    lora_modules: tuple[str, ...] = ()
    """`--lora-modules`."""
    developer_mode: bool = True
    """`VLLM_SERVER_DEV_MODE=1`."""
    sleep_mode: bool = True
    """`--enable-sleep-mode`; without it `/sleep` answers 200 and does nothing."""
    api_key: str = ""
    """`--api-key`."""
    wake_s: float = 0.0
    sleep_status: int = 200
    wake_status: int = 200
    engines: int = 1
    """`--data-parallel-size`: each engine has metrics of its own."""
    running: int = 0
    """Requests of other clients."""
    waiting: int = 0
    kv_cache_usage: tuple[float, ...] = (0.25,)
    """Of each engine."""
    metrics: Literal["current", "deprecated", "both", "missing", "foreign"] = "current"
    """`deprecated`: the cache's name before 0.10; `both`: 0.10; `missing`: 404; `foreign`: metrics of another program."""
    engine_dead: bool = False
    tokenizer: bool = True
    """Otherwise `/tokenize` is not there, as behind a proxy that forwards `/v1` only."""
    extra: JSON = field(default_factory=dict)
    """Fields of every entry of `/v1/models`."""


class VLLMDouble(OpenAIDouble):
    """As OpenAIDouble; `double.start_with(...)` sets how vLLM was started. A token is a word."""

    def __init__(self) -> None:
        super().__init__()
        self.vllm = VLLMState()
        self.asleep = False
        self.sleeps: list[str] = []
        """The queries of `/sleep`."""
        self.wakes = 0
        self.reached_asleep = 0
        """Requests that came while the engine slept: each would have crashed vLLM."""
        self.disturbed = 0
        """Requests that ran when the engine was put to sleep."""

    def start_with(self, **changes: Any) -> None:
        self.vllm = replace(VLLMState(), **changes)

    async def _get(self, path: str, writer: asyncio.StreamWriter) -> bool:
        state = self.vllm
        if path == "/health":
            return await send_answer(writer, 503 if state.engine_dead else self.behavior.health_status, b"")
        if path == "/metrics" and state.metrics != "missing":
            return await send_answer(writer, 200, self._metrics())
        if path == "/is_sleeping" and state.developer_mode:
            return await send_answer(writer, 200, {"is_sleeping": self.asleep})
        if path.startswith("/v1/") and self._unauthorized():
            return await send_answer(writer, 401, {"error": "Unauthorized"})
        if path == "/v1/models":
            return await send_answer(writer, self.behavior.models_status, {"object": "list", "data": self._cards()})
        return await send_answer(writer, 404, {"detail": "Not Found"})

    async def _post(self, seen: ReceivedRequest, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        path = urlsplit(seen.path).path
        if path in ("/sleep", "/wake_up"):
            return await self._switch(seen, writer)
        if path in ("/tokenize", "/detokenize") and self.vllm.tokenizer:
            return await self._tokenizer(path, seen, writer)
        if not path.startswith("/v1/"):
            return await send_answer(writer, 404, {"detail": "Not Found"})
        if self._unauthorized():
            return await send_answer(writer, 401, {"error": "Unauthorized"})
        if self.asleep:
            self.reached_asleep += 1
            writer.transport.abort()
            return False
        try:
            body = seen.json
        except json.JSONDecodeError as error:
            return await send_answer(
                writer, 400, _error(400, "Bad Request", f"[{{'type': 'json_invalid', 'msg': '{error}'}}]")
            )
        if body.get("model") not in (*self.vllm.names, *self.vllm.lora_modules):
            missing = f"The model `{body.get('model')}` does not exist."
            return await send_answer(writer, 404, _error(404, "NotFoundError", missing, "model"))
        if not isinstance(body.get("messages", []), list):
            details = "[{'type': 'list_type', 'loc': ('body', 'messages'), 'msg': 'Input should be a valid list'}]"
            return await send_answer(writer, 400, _error(400, "Bad Request", details))
        return await super()._post(seen, reader, writer)

    def _unauthorized(self) -> bool:
        key = self.vllm.api_key
        return bool(key) and self.seen[-1].headers.get("authorization") != f"Bearer {key}"

    def _cards(self) -> list[JSON]:
        """vLLM makes the cards again for each request: `created` is the time of the request."""
        state = self.vllm
        common = {"object": "model", "created": int(time.time()), "owned_by": "vllm", "permission": [], **state.extra}
        base = [{**common, "id": name, "root": MODEL, "parent": None, "max_model_len": CONTEXT} for name in state.names]
        return base + [
            {**common, "id": name, "root": f"/loras/{name}", "parent": state.names[0], "max_model_len": None}
            for name in state.lora_modules
        ]

    def _metrics(self) -> bytes:
        state = self.vllm
        if state.metrics == "foreign":
            return b'# TYPE up gauge\nup{job="proxy"} 1\n'
        lines = ["# HELP vllm:num_requests_running Number of requests in model execution batches."]
        for engine in range(state.engines):
            labels = f'{{engine="{engine}",model_name="a}} b"}}'
            usage = state.kv_cache_usage[engine % len(state.kv_cache_usage)]
            running = self.streaming + state.running if engine == 0 else 0
            waiting = state.waiting if engine == 0 else 0
            lines += [
                f"vllm:num_requests_running{labels} {float(running)}",
                f"vllm:num_requests_waiting{labels} {float(waiting)}",
            ]
            lines += [f'vllm:num_requests_waiting_by_reason{{engine="{engine}",reason="capacity"}} 99.0']
            if state.metrics in ("current", "both"):
                lines.append(f"vllm:kv_cache_usage_perc{labels} {usage}")
            if state.metrics in ("deprecated", "both"):
                lines.append(f"vllm:gpu_cache_usage_perc{labels} {usage}")
        return "\n".join([*lines, ""]).encode()

    async def _switch(self, seen: ReceivedRequest, writer: asyncio.StreamWriter) -> bool:
        state, url = self.vllm, urlsplit(seen.path)
        if not state.developer_mode:
            return await send_answer(writer, 404, {"detail": "Not Found"})
        if url.path == "/sleep":
            self.sleeps.append(url.query)
            assert parse_qs(url.query).get("level", ["1"])[0] in ("1", "2")
            if state.sleep_status == 200 and state.sleep_mode:
                self.disturbed += self.streaming
                self.asleep = True
            return await send_answer(writer, state.sleep_status, b"")
        self.wakes += 1
        await asyncio.sleep(state.wake_s)
        if state.wake_status == 200:
            self.asleep = False
        return await send_answer(writer, state.wake_status, b"")

    async def _tokenizer(self, path: str, seen: ReceivedRequest, writer: asyncio.StreamWriter) -> bool:
        body = seen.json
        if path == "/detokenize":
            return await send_answer(writer, 200, {"prompt": " ".join(f"w{token}" for token in body["tokens"])})
        if "messages" in body:
            words = [word for one in body["messages"] for word in (one["role"], *str(one["content"]).split())]
            words += ["assistant"] if body.get("add_generation_prompt", True) else []
            words += [str(tool) for tool in body.get("tools") or ()]
        else:
            words = [*(["<s>"] if body.get("add_special_tokens", True) else []), *body["prompt"].split()]
        tokens = list(range(len(words)))
        answer = {"count": len(tokens), "max_model_len": CONTEXT, "tokens": tokens, "token_strs": None}
        return await send_answer(writer, 200, answer)


def _error(status: int, kind: str, message: str, param: str | None = None) -> JSON:
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}
