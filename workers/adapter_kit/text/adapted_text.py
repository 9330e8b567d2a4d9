"""Execution of an adaptation plan: several requests as one answer, and tool calls where they are required."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from secrets import token_hex
from typing import cast

import orjson

from schemas.jobs import Usage
from workers.adapter_kit.request_fields import JSON, prompt_count, wants_usage
from workers.adapter_kit.sse import payloads
from workers.adapter_kit.text.adaptations import (
    TOOL_CHOICE,
    UNSUPPORTED_PARAMETER,
    AdaptationPlan,
    unsupported_parameter,
)
from workers.adapter_kit.text.completion_stream import CompletionOptions, new_completion_reader
from workers.backends.base import Adaptation, BackendError, Chunk, Finish, Output, Task

MAX_BUFFERED_BYTES = 4 * 1024 * 1024
"""Bytes of an answer that are buffered before the required tool call."""
CUT_SHORT_REASONS = frozenset({"length", "content_filter"})
CHAT = "/v1/chat/completions"
SendRequest = Callable[[Task, AdaptationPlan], AsyncIterator[Output]]
"""Sends one request to the server. Closing the iterator that it returns stops the server."""


async def execute_plan(task: Task, plan: AdaptationPlan, send: SendRequest) -> AsyncGenerator[Output]:
    """Serve a task by its plan. Closing this generator closes the request that runs."""
    if plan.adapted:
        yield Adaptation(plan.adapted)
    if plan.requests == 1 and not plan.forced:
        async with aclosing(_send_request(replace(task, body=orjson.dumps(plan.body)), plan, send)) as outputs:
            async for output in outputs:
                yield output
        return
    answer = new_completion_reader(_completion_options(task, plan))
    usage_total = _UsageTotal()
    for number in range(plan.requests):
        async with aclosing(_ChoiceRun(task, plan, number, send, usage_total).outputs()) as outputs:
            async for output in outputs:
                if not isinstance(output, Chunk) or not output.data:
                    yield output
                elif (chunk := answer.feed(output.data)) is not None:
                    yield chunk
    if usage_total.counts:
        answer.feed(b"data: %b\n\n" % orjson.dumps({"choices": [], "usage": usage_total.counts}))
    if (chunk := answer.feed(b"data: [DONE]\n\n")) is not None:
        yield chunk
    for output in answer.finish():
        yield output


def _completion_options(task: Task, plan: AdaptationPlan) -> CompletionOptions:
    return CompletionOptions(
        chat=task.endpoint == CHAT,
        model=task.public_model,
        fallback_id=task.job,
        include_usage=task.stream and wants_usage(plan.body),
        n=plan.requests,
        prompts=prompt_count(plan.body),
        stream=task.stream,
    )


async def _send_request(task: Task, plan: AdaptationPlan, send: SendRequest) -> AsyncGenerator[Output]:
    outputs = cast("AsyncGenerator[Output]", send(task, plan))
    async with aclosing(outputs):
        async for output in outputs:
            yield output


@dataclass(slots=True)
class _UsageTotal:
    """The sum of the usage of several requests."""

    counts: JSON = field(default_factory=dict)

    def add(self, usage: Usage | None) -> None:
        if usage is not None:
            _add(self.counts, usage.model_dump())


def _add(into: JSON, more: JSON) -> None:
    for name, value in more.items():
        old = into.get(name)
        if isinstance(value, dict):
            if isinstance(old, dict):
                _add(old, value)
            else:
                into[name] = dict(value)
        elif isinstance(value, int | float) and isinstance(old, int | float):
            into[name] = old + value
        elif old is None:
            into[name] = value


class _ChoiceRun:
    """Makes one choice of the answer, by one request to the server, or by two where a required tool call is missing."""

    def __init__(
        self, task: Task, plan: AdaptationPlan, number: int, send: SendRequest, usage_total: _UsageTotal
    ) -> None:
        self._task = task
        self._plan = plan
        self._number = number
        self._send = send
        self._usage_total = usage_total
        self._buffered: list[JSON] = []
        self._buffered_size = 0
        self._has_call = not plan.forced
        self._reason = ""

    async def outputs(self) -> AsyncGenerator[Output]:
        """Yield events with the choice's index, signs of life, and adaptations; no Finish."""
        async with aclosing(_send_request(self._request(self._plan.body), self._plan, self._send)) as outputs:
            async for output in outputs:
                if isinstance(output, Finish):
                    self._usage_total.add(output.usage)
                elif isinstance(output, Chunk) and output.data:
                    yield self._forward(output)
                else:
                    yield output
        if self._has_call:
            return
        if self._reason in CUT_SHORT_REASONS or any(delta.get("refusal") for delta in _deltas(self._buffered)):
            yield self._indexed_chunk(self._buffered)
            return
        if self._plan.fallback is None:
            raise unsupported_parameter(TOOL_CHOICE, self._task.public_model)
        yield Adaptation(tuple(dict.fromkeys((*self._plan.adapted, TOOL_CHOICE))))
        async with aclosing(self._request_json_call(self._plan.fallback)) as outputs:
            async for output in outputs:
                yield output

    def _request(self, body: JSON) -> Task:
        body = {name: value for name, value in body.items() if name != "stream_options"} | {"stream": True}
        seed = body.get("seed")
        if self._number and isinstance(seed, int):
            body["seed"] = seed + self._number  # with one seed all choices would be equal
        return replace(self._task, body=orjson.dumps(body), stream=True, push=None)

    def _forward(self, chunk: Chunk) -> Chunk:
        events = [orjson.loads(payload) for payload in payloads(chunk.data) if payload != b"[DONE]"]
        if self._has_call:
            return self._indexed_chunk(events)
        self._buffered += events
        self._buffered_size += len(chunk.data)
        if self._buffered_size > MAX_BUFFERED_BYTES:
            raise BackendError(
                f"the backend answered with more than {MAX_BUFFERED_BYTES} bytes before the required tool call"
            )
        self._has_call = self._calls_required_tool(events)
        self._reason = next((r for r in _reasons(events) if r), self._reason)
        if not self._has_call:
            return Chunk(b"", max(1, chunk.tokens))
        return self._indexed_chunk(self._buffered)

    def _calls_required_tool(self, events: list[JSON]) -> bool:
        """Return whether the events call one of the required tools; servers that ignore `tool_choice` let the model call others."""
        calls = [call for delta in _deltas(events) for call in delta.get("tool_calls") or ()]
        return any((call.get("function") or {}).get("name") in self._plan.tools for call in calls)

    def _indexed_chunk(self, events: list[JSON]) -> Chunk:
        for event in events:
            for choice in event.get("choices") or ():
                choice["index"] = int(choice.get("index") or 0) * self._plan.requests + self._number
        return Chunk(b"".join(b"data: %b\n\n" % orjson.dumps(event) for event in events), len(events))

    async def _request_json_call(self, body: JSON) -> AsyncGenerator[Output]:
        """Request the call as JSON, by a schema, and yield it as a tool call."""
        pieces: list[str] = []
        reason = ""
        async with aclosing(_send_request(self._request(body), self._plan, self._send)) as outputs:
            async for output in outputs:
                if isinstance(output, Finish):
                    self._usage_total.add(output.usage)
                elif isinstance(output, Chunk) and output.data:
                    events = [orjson.loads(payload) for payload in payloads(output.data) if payload != b"[DONE]"]
                    pieces += [str(delta.get("content") or "") for delta in _deltas(events)]
                    reason = next((r for r in _reasons(events) if r), reason)
                    yield Chunk(b"", max(1, output.tokens))
                else:
                    yield output
        name, arguments = self._parse_call("".join(pieces), reason)
        function = {"name": name, "arguments": arguments}
        call = {"index": 0, "id": f"call_{token_hex(12)}", "type": "function", "function": function}
        head = _constant_fields(self._buffered)
        ends = reason if reason in CUT_SHORT_REASONS else "tool_calls"
        yield self._indexed_chunk(
            [
                {**head, "choices": [{"index": 0, "delta": {"tool_calls": [call]}, "finish_reason": None}]},
                {**head, "choices": [{"index": 0, "delta": {}, "finish_reason": ends}]},
            ]
        )

    def _parse_call(self, text: str, reason: str) -> tuple[str, str]:
        """Return the function's name and its arguments. Raises BackendError where the model gave neither."""
        names = self._plan.tools
        try:
            parsed = orjson.loads(text)
        except orjson.JSONDecodeError:
            parsed = None
        if len(names) == 1 and (isinstance(parsed, dict) or reason in CUT_SHORT_REASONS):
            return names[0], text.strip()
        if len(names) > 1 and isinstance(parsed, dict) and parsed.get("name") in names:
            arguments = parsed.get("arguments")
            return parsed["name"], orjson.dumps(arguments if isinstance(arguments, dict) else {}).decode()
        raise BackendError(
            f"The model '{self._task.public_model[:100]}' called none of the tools that tool_choice requires, nor gave its"
            " arguments as JSON. Try again, or leave tool_choice out.",
            code=UNSUPPORTED_PARAMETER,
            param=TOOL_CHOICE,
        )


def _deltas(events: list[JSON]) -> list[JSON]:
    choices = [choice for event in events for choice in event.get("choices") or ()]
    return [choice["delta"] for choice in choices if isinstance(choice.get("delta"), dict)]


def _reasons(events: list[JSON]) -> list[str]:
    return [str(choice.get("finish_reason") or "") for event in events for choice in event.get("choices") or ()]


def _constant_fields(events: list[JSON]) -> JSON:
    first = events[0] if events else {}
    return {name: first[name] for name in ("id", "object", "created", "model", "system_fingerprint") if name in first}
