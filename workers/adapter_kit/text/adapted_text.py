"""A plan of `adaptations` carried out: several requests as one answer, and tool calls where they are required."""

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

MAX_HELD = 4 * 1024 * 1024
"""Bytes of an answer that may come before the tool call that it must hold."""
CUT_SHORT = frozenset({"length", "content_filter"})
CHAT = "/v1/chat/completions"
SendRequest = Callable[[Task, AdaptationPlan], AsyncIterator[Output]]
"""Sends one request to the server. Closing what it returns stops the server."""


async def execute_plan(task: Task, plan: AdaptationPlan, ask: SendRequest) -> AsyncGenerator[Output]:
    """Serve a task by its plan. An async generator; closing it closes what runs."""
    if plan.adapted:
        yield Adaptation(plan.adapted)
    if plan.requests == 1 and not plan.forced:
        async with aclosing(_asked(replace(task, body=orjson.dumps(plan.body)), plan, ask)) as outputs:
            async for output in outputs:
                yield output
        return
    answer = new_completion_reader(_wanted(task, plan))
    used = _UsageTotal()
    for number in range(plan.requests):
        async with aclosing(_ChoiceRun(task, plan, number, ask, used).outputs()) as outputs:
            async for output in outputs:
                if not isinstance(output, Chunk) or not output.data:
                    yield output
                elif (chunk := answer.feed(output.data)) is not None:
                    yield chunk
    if used.counts:
        answer.feed(b"data: %b\n\n" % orjson.dumps({"choices": [], "usage": used.counts}))
    if (chunk := answer.feed(b"data: [DONE]\n\n")) is not None:
        yield chunk
    for output in answer.finish():
        yield output


def _wanted(task: Task, plan: AdaptationPlan) -> CompletionOptions:
    return CompletionOptions(
        chat=task.endpoint == CHAT,
        model=task.public_model,
        fallback_id=task.job,
        include_usage=task.stream and wants_usage(plan.body),
        n=plan.requests,
        prompts=prompt_count(plan.body),
        stream=task.stream,
    )


async def _asked(task: Task, plan: AdaptationPlan, ask: SendRequest) -> AsyncGenerator[Output]:
    outputs = cast("AsyncGenerator[Output]", ask(task, plan))
    async with aclosing(outputs):
        async for output in outputs:
            yield output


@dataclass(slots=True)
class _UsageTotal:
    """The usage of several requests: what each of them has counted, added up."""

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
    """One choice of the answer: one request to the server, or two where a tool call is required and does not come."""

    def __init__(self, task: Task, plan: AdaptationPlan, number: int, ask: SendRequest, used: _UsageTotal) -> None:
        self._task = task
        self._plan = plan
        self._number = number
        self._ask = ask
        self._used = used
        self._held: list[JSON] = []
        self._held_size = 0
        self._called = not plan.forced
        self._reason = ""

    async def outputs(self) -> AsyncGenerator[Output]:
        """Yield events with the choice's index, signs of life, and what is to be told. No Finish."""
        async with aclosing(_asked(self._request(self._plan.body), self._plan, self._ask)) as outputs:
            async for output in outputs:
                if isinstance(output, Finish):
                    self._used.add(output.usage)
                elif isinstance(output, Chunk) and output.data:
                    yield self._passed_on(output)
                else:
                    yield output
        if self._called:
            return
        if self._reason in CUT_SHORT or any(delta.get("refusal") for delta in _deltas(self._held)):
            yield self._events(self._held)
            return
        if self._plan.fallback is None:
            raise unsupported_parameter(TOOL_CHOICE, self._task.public_model)
        yield Adaptation(tuple(dict.fromkeys((*self._plan.adapted, TOOL_CHOICE))))
        async with aclosing(self._constrained(self._plan.fallback)) as outputs:
            async for output in outputs:
                yield output

    def _request(self, body: JSON) -> Task:
        body = {name: value for name, value in body.items() if name != "stream_options"} | {"stream": True}
        seed = body.get("seed")
        if self._number and isinstance(seed, int):
            body["seed"] = seed + self._number  # with one seed all choices would be the same
        return replace(self._task, body=orjson.dumps(body), stream=True)

    def _passed_on(self, chunk: Chunk) -> Chunk:
        events = [orjson.loads(payload) for payload in payloads(chunk.data) if payload != b"[DONE]"]
        if self._called:
            return self._events(events)
        self._held += events
        self._held_size += len(chunk.data)
        if self._held_size > MAX_HELD:
            raise BackendError(f"the backend answered with more than {MAX_HELD} bytes before the required tool call")
        self._called = self._calls(events)
        self._reason = next((r for r in _reasons(events) if r), self._reason)
        if not self._called:
            return Chunk(b"", max(1, chunk.tokens))
        return self._events(self._held)

    def _calls(self, events: list[JSON]) -> bool:
        """Whether one of the required tools is called; servers that ignore `tool_choice` let the model call any other."""
        calls = [call for delta in _deltas(events) for call in delta.get("tool_calls") or ()]
        return any((call.get("function") or {}).get("name") in self._plan.tools for call in calls)

    def _events(self, events: list[JSON]) -> Chunk:
        for event in events:
            for choice in event.get("choices") or ():
                choice["index"] = int(choice.get("index") or 0) * self._plan.requests + self._number
        return Chunk(b"".join(b"data: %b\n\n" % orjson.dumps(event) for event in events), len(events))

    async def _constrained(self, body: JSON) -> AsyncGenerator[Output]:
        """The call as JSON, which the server is bound to by a schema."""
        pieces: list[str] = []
        reason = ""
        async with aclosing(_asked(self._request(body), self._plan, self._ask)) as outputs:
            async for output in outputs:
                if isinstance(output, Finish):
                    self._used.add(output.usage)
                elif isinstance(output, Chunk) and output.data:
                    events = [orjson.loads(payload) for payload in payloads(output.data) if payload != b"[DONE]"]
                    pieces += [str(delta.get("content") or "") for delta in _deltas(events)]
                    reason = next((r for r in _reasons(events) if r), reason)
                    yield Chunk(b"", max(1, output.tokens))
                else:
                    yield output
        name, arguments = self._call("".join(pieces), reason)
        function = {"name": name, "arguments": arguments}
        call = {"index": 0, "id": f"call_{token_hex(12)}", "type": "function", "function": function}
        head = _constant(self._held)
        ends = reason if reason in CUT_SHORT else "tool_calls"
        yield self._events(
            [
                {**head, "choices": [{"index": 0, "delta": {"tool_calls": [call]}, "finish_reason": None}]},
                {**head, "choices": [{"index": 0, "delta": {}, "finish_reason": ends}]},
            ]
        )

    def _call(self, text: str, reason: str) -> tuple[str, str]:
        """The function's name and its arguments. Raises BackendError where the model gave neither."""
        names = self._plan.tools
        try:
            said = orjson.loads(text)
        except orjson.JSONDecodeError:
            said = None
        if len(names) == 1 and (isinstance(said, dict) or reason in CUT_SHORT):
            return names[0], text.strip()
        if len(names) > 1 and isinstance(said, dict) and said.get("name") in names:
            arguments = said.get("arguments")
            return said["name"], orjson.dumps(arguments if isinstance(arguments, dict) else {}).decode()
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


def _constant(events: list[JSON]) -> JSON:
    first = events[0] if events else {}
    return {name: first[name] for name in ("id", "object", "created", "model", "system_fingerprint") if name in first}
