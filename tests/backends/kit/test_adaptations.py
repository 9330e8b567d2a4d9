"""Parameters that a server lacks: refused, or replaced by their nearest equivalent and named."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import orjson
import pytest

from schemas.presence import ServiceRecord
from tests.backends.contract import chat, completion
from tests.backends.doubles.ollama import CHAT, OllamaDouble
from tests.backends.kit.test_limitations import Quirky, refused
from workers.adapter_kit.text.adaptations import MAX_CHOICES, NO_EFFECT_VALUES, UNSUPPORTED_HINTS
from workers.backends.base import (
    Adaptation,
    Backend,
    BackendConfig,
    BackendError,
    BackendRefused,
    Chunk,
    Finish,
    Task,
    make_backend,
)

JSON = dict[str, Any]


def tool(name: str, **properties: Any) -> JSON:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": f"Do {name}.", "parameters": parameters}}


WEATHER, TIME = tool("weather", city={"type": "string"}), tool("time")
CALLS = (
    {"function": {"name": "weather", "arguments": {"city": "Lisbon"}}},
    {"function": {"name": "weather", "arguments": {"city": "Porto"}}},
)
NAMED = {"type": "function", "function": {"name": "weather"}}


@pytest.fixture
async def ollama() -> AsyncIterator[OllamaDouble]:
    async with OllamaDouble() as server:
        server.loaded = {name: {} for name in server.models}
        yield server


@pytest.fixture
async def backend(ollama: OllamaDouble) -> AsyncIterator[Backend]:
    made = make_backend("ollama", BackendConfig(url=ollama.url))
    yield made
    await made.close()


async def said(backend: Backend, work: Task) -> tuple[JSON, tuple[str, ...], Finish]:
    """Return the answer, merged from its events, the adapted parameters, and the end."""
    outputs = [output async for output in backend.run(work)]
    names: tuple[str, ...] = ()
    first = next(at for at, one in enumerate(outputs) if isinstance(one, Chunk) and one.data)
    for at, one in enumerate(outputs):
        if isinstance(one, Adaptation):
            assert at < first or not work.stream, "a stream's head has left by then"
            names = one.parameters
    data = b"".join(one.data for one in outputs if isinstance(one, Chunk))
    finish = outputs[-1]
    assert isinstance(finish, Finish)
    return (joined(data) if work.stream else orjson.loads(data)), names, finish


def joined(data: bytes) -> JSON:
    """Merge a stream as clients do: by adding texts and arguments, by index."""
    choices: dict[int, JSON] = {}
    usage = None
    for frame in data.split(b"\n\n")[:-1]:
        event = orjson.loads(frame.removeprefix(b"data: "))
        usage = event.get("usage") or usage
        for one in event["choices"]:
            message: JSON = {"content": "", "tool_calls": []}
            choice = choices.setdefault(
                one["index"], {"index": one["index"], "message": message, "text": "", "finish_reason": None}
            )
            message = choice["message"]
            choice["text"] += one.get("text") or ""
            choice["finish_reason"] = one["finish_reason"] or choice["finish_reason"]
            message["content"] += one.get("delta", {}).get("content") or ""
            for call in one.get("delta", {}).get("tool_calls") or ():
                if call["index"] == len(message["tool_calls"]):
                    message["tool_calls"].append(call)
                else:
                    message["tool_calls"][call["index"]]["function"]["arguments"] += call["function"]["arguments"]
    return {"choices": [choices[index] for index in sorted(choices)], "usage": usage}


def calls(answer: JSON, choice: int = 0) -> list[tuple[str, JSON]]:
    found = answer["choices"][choice]["message"].get("tool_calls") or []
    return [(call["function"]["name"], orjson.loads(call["function"]["arguments"])) for call in found]


both = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])


@both
async def test_a_forced_tool_is_the_only_one_offered(ollama: OllamaDouble, backend: Backend, stream: bool) -> None:
    ollama.behave(calls=CALLS[:1], words=())
    answer, adapted, _ = await said(backend, chat(CHAT, stream, tools=[WEATHER, TIME], tool_choice=NAMED))
    assert (calls(answer), adapted) == ([("weather", {"city": "Lisbon"})], ("tool_choice",))
    assert answer["choices"][0]["finish_reason"] == "tool_calls"
    [sent] = ollama.bodies("/api/chat")
    assert sent["tools"] == [WEATHER]


@both
@pytest.mark.parametrize("choice", [NAMED, "required"], ids=["named", "required"])
async def test_a_model_that_answers_in_text_is_bound_by_a_schema(
    ollama: OllamaDouble, backend: Backend, stream: bool, choice: Any
) -> None:
    """The text that came instead of a call is not sent, but counts in the usage."""
    tools = [WEATHER] if choice == "required" else [WEATHER, TIME]
    ollama.behave(words=('{"city":', ' "Lisbon"}'))
    work = chat(CHAT, stream, tools=tools, tool_choice=choice, stream_options={"include_usage": True})
    answer, adapted, finish = await said(backend, work)
    assert (calls(answer), adapted) == ([("weather", {"city": "Lisbon"})], ("tool_choice",))
    assert not answer["choices"][0]["message"]["content"]
    assert answer["choices"][0]["finish_reason"] == "tool_calls"
    first, second = ollama.bodies("/api/chat")
    assert (first["tools"], "tools" in second, second["format"]) == (
        [WEATHER], False, WEATHER["function"]["parameters"],
    )  # fmt: skip
    assert "weather" in second["messages"][0]["content"]
    assert finish.usage is not None
    assert answer["usage"]["completion_tokens"] == finish.usage.completion_tokens == 4


async def test_one_of_several_tools_is_chosen_by_schema(ollama: OllamaDouble, backend: Backend) -> None:
    ollama.behave(words=('{"name": "time", "arguments": {}}',))
    answer, _, _ = await said(backend, chat(CHAT, tools=[WEATHER, TIME], tool_choice="required"))
    assert calls(answer) == [("time", {})]
    schema = ollama.bodies("/api/chat")[1]["format"]
    assert [one["properties"]["name"]["enum"] for one in schema["anyOf"]] == [["weather"], ["time"]]


async def test_a_model_that_never_calls_is_an_error(ollama: OllamaDouble, backend: Backend) -> None:
    with pytest.raises(BackendError, match="called none of the tools") as caught:
        await said(backend, chat(CHAT, tools=[WEATHER], tool_choice="required"))
    assert (caught.value.info.status, caught.value.info.param, caught.value.transient) == (502, "tool_choice", False)


@both
async def test_an_answer_that_was_cut_short_needs_no_call(ollama: OllamaDouble, backend: Backend, stream: bool) -> None:
    ollama.behave(done_reason="length")
    answer, _, _ = await said(backend, chat(CHAT, stream, tools=[WEATHER], tool_choice="required"))
    assert answer["choices"][0]["finish_reason"] == "length"
    assert len(ollama.bodies("/api/chat")) == 1


@both
async def test_allowed_tools_are_those_offered(ollama: OllamaDouble, backend: Backend, stream: bool) -> None:
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [NAMED]}}
    _, adapted, _ = await said(backend, chat(CHAT, stream, tools=[WEATHER, TIME], tool_choice=allowed))
    assert (ollama.bodies("/api/chat")[0]["tools"], adapted) == ([WEATHER], ("tool_choice",))


@both
async def test_one_tool_call_at_a_time(ollama: OllamaDouble, backend: Backend, stream: bool) -> None:
    """Codex sends `parallel_tool_calls: false` with every request."""
    ollama.behave(calls=CALLS, words=())
    answer, adapted, _ = await said(backend, chat(CHAT, stream, tools=[WEATHER], parallel_tool_calls=False))
    assert (calls(answer), adapted) == ([("weather", {"city": "Lisbon"})], ("parallel_tool_calls",))
    assert "parallel_tool_calls" not in ollama.bodies("/api/chat")[0]
    answer, adapted, _ = await said(backend, chat(CHAT, stream, tools=[WEATHER], parallel_tool_calls=True))
    assert (len(calls(answer)), adapted) == (2, ())


@both
@pytest.mark.parametrize("make", [chat, completion], ids=["chat", "completion"])
async def test_several_choices_are_several_requests(
    ollama: OllamaDouble, backend: Backend, stream: bool, make: Any
) -> None:
    """Each choice has its index and a seed of its own; the usage is the sum."""
    work = make(CHAT, stream, n=3, seed=7, stream_options={"include_usage": True})
    answer, adapted, finish = await said(backend, work)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    texts = [choice["message"]["content"] if make is chat else choice["text"] for choice in answer["choices"]]
    assert (texts, adapted) == (["Hello there, world!"] * 3, ("n",))
    assert {choice["finish_reason"] for choice in answer["choices"]} <= {"stop", "length"}
    sent = ollama.bodies("/api/chat" if make is chat else "/api/generate")
    assert [body["options"]["seed"] for body in sent] == [7, 8, 9]
    usage = answer["usage"]
    assert finish.usage is not None
    assert finish.usage.completion_tokens == usage["completion_tokens"] == 3 * len(ollama.behavior.words)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


@both
async def test_choices_and_forced_calls_together(ollama: OllamaDouble, backend: Backend, stream: bool) -> None:
    ollama.behave(calls=CALLS, words=())
    work = chat(CHAT, stream, n=2, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False)
    answer, adapted, _ = await said(backend, work)
    assert [calls(answer, number) for number in (0, 1)] == [[("weather", {"city": "Lisbon"})]] * 2
    assert adapted == ("n", "tool_choice", "parallel_tool_calls")


async def test_a_second_choice_that_fails_fails_the_answer(ollama: OllamaDouble, backend: Backend) -> None:
    ollama.behave(fault="error_line")
    with pytest.raises(BackendError, match="CUDA"):
        await said(backend, chat(CHAT, n=2))


@pytest.mark.parametrize(
    ("make", "fields"),
    [
        (chat, {"logit_bias": {"1": 5}}),
        (chat, {"verbosity": "low"}),
        (chat, {"store": True}),
        (completion, {"best_of": 2}),
        (completion, {"logprobs": 1}),
        (completion, {"logit_bias": {"1": -100}}),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
async def test_what_has_no_equivalent_is_left_out_and_named(backend: Backend, make: Any, fields: JSON) -> None:
    _, adapted, _ = await said(backend, make(CHAT, **fields))
    assert adapted == tuple(fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 2},
        {"logit_bias": {"1": 5}},
        {"verbosity": "high"},
        {"store": True},
        {"tools": [WEATHER], "parallel_tool_calls": False},
        {"tools": [WEATHER], "tool_choice": "required"},
        {"tools": [WEATHER], "tool_choice": NAMED},
    ],
    ids=str,
)
async def test_the_other_policy_refuses(ollama: OllamaDouble, backend: Backend, fields: JSON) -> None:
    """The error names the parameter, the model and what to do, before any request to the server."""
    [name] = [name for name in fields if name != "tools"]
    with pytest.raises(BackendRefused) as caught:
        await said(backend, replace(chat(CHAT, public_model="mine", **fields), adapt=False))
    info = caught.value.info
    assert (info.status, info.code, info.param) == (400, "unsupported_parameter", name)
    assert "'mine'" in info.message
    assert UNSUPPORTED_HINTS[name][1] in info.message
    assert not ollama.bodies("/api/chat")


@pytest.mark.parametrize("adapt", [False, True])
@pytest.mark.parametrize(
    "fields",
    [
        *({name: value} for name, values in NO_EFFECT_VALUES.items() for value in values if name != "best_of"),
        {"tools": [WEATHER], "tool_choice": "none"},
        {"tools": [WEATHER], "tool_choice": "auto"},
        {"parallel_tool_calls": False},
        {"n": None, "logit_bias": None, "tool_choice": None},
    ],
    ids=str,
)
async def test_what_asks_for_nothing_is_not_adapted(backend: Backend, adapt: bool, fields: JSON) -> None:
    _, adapted, _ = await said(backend, replace(chat(CHAT, **fields), adapt=adapt))
    assert adapted == ()


async def test_choices_are_bounded(ollama: OllamaDouble, backend: Backend) -> None:
    for n in (MAX_CHOICES + 1, 10**9, 0, -1):
        with pytest.raises(BackendRefused) as caught:
            await said(backend, chat(CHAT, n=n))
        assert (caught.value.info.param, str(MAX_CHOICES) in caught.value.info.message) == ("n", True)
    assert not ollama.bodies("/api/chat")


async def test_the_server_stops_when_the_caller_goes(ollama: OllamaDouble, backend: Backend) -> None:
    ollama.behave(delay_s=0.05, words=("word ",) * 200)
    outputs: Any = backend.run(chat(CHAT, True, n=3))
    async for output in outputs:
        if isinstance(output, Chunk) and output.data:
            break
    await outputs.aclose()
    for _ in range(200):
        if not ollama.running:
            break
        await asyncio.sleep(0.01)
    assert ollama.running == 0
    assert len(ollama.bodies("/api/chat")) == 1


# OpenAI-style servers


class Partial(Quirky):
    """A server that lacks parameters: it refuses some by name, and ignores others."""

    def __init__(self) -> None:
        super().__init__()
        self.refuses: set[str] = set()
        self.ignores: set[str] = set()
        self.calls = [calling("weather", '{"city":"Lisbon"}')]
        self.quirk = self._answered

    def _answered(self, path: str, body: JSON) -> Any:
        for name in sorted(self.refuses & body.keys()):
            return refused(f"unknown field: {name}")
        if not path.endswith("completions"):
            return None
        forced = "tool_choice" not in self.ignores and body.get("tool_choice") not in (None, "auto")
        deltas: list[JSON] = [{"content": "Hello"}]
        if "response_format" in body:
            deltas = [{"content": '{"city": "Porto"}'}]
        elif forced:
            deltas = [{"tool_calls": [{**call, "index": at}]} for at, call in enumerate(self.calls)]
        if not body.get("stream"):
            count = 1 if "n" in self.ignores else body.get("n", 1)
            message = {"role": "assistant", "content": "x"}
            choices = [{"index": at, "message": message, "finish_reason": "length"} for at in range(count)]
            return 200, {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": choices}
        self.behave(models=self.behavior.models, deltas=tuple(deltas), finish="stop")
        return None


def calling(name: str, arguments: str) -> JSON:
    return {"id": f"call_{name}_{arguments}", "type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.fixture
async def server() -> AsyncIterator[Partial]:
    async with Partial() as double:
        yield double


@pytest.fixture(params=["openai", "service"])
async def worker(server: Partial, request: pytest.FixtureRequest) -> AsyncIterator[Backend]:
    service = request.param == "service"
    made = make_backend(request.param, BackendConfig(url="" if service else server.url))
    if service:
        made.services_changed({"svc": ServiceRecord(name="svc", base_url=server.url)})
        await made.discover()
    yield made
    await made.close()


@both
async def test_a_server_that_ignores_n_is_asked_for_each_choice(server: Partial, worker: Backend, stream: bool) -> None:
    """One probe shows that, before the first such request; a stream would show it only at its end."""
    server.ignores = {"n"}
    for probes in (1, 0):
        server.seen.clear()
        answer, adapted, _ = await said(worker, chat("one", stream, n=2))
        assert [choice["message"]["content"] for choice in answer["choices"]] == ["Hello"] * 2
        assert adapted == ("n",)
        assert ["n" in body for body in server.posts] == [True] * probes + [False] * 2
    with pytest.raises(BackendRefused) as caught:
        await said(worker, replace(chat("one", stream, n=2), adapt=False))
    assert (caught.value.info.code, caught.value.info.param) == ("unsupported_parameter", "n")


@both
@pytest.mark.parametrize("field", [{"logit_bias": {"1": 5}}, {"verbosity": "low"}, {"n": 2}], ids=str)
async def test_a_parameter_that_is_refused_by_name_is_adapted(
    server: Partial, worker: Backend, stream: bool, field: JSON
) -> None:
    """It is adapted once a probe of the worker's own has confirmed the parameter."""
    [name] = field
    server.refuses = {name}
    answer, adapted, _ = await said(worker, chat("one", stream, **field))
    assert (answer["choices"][0]["message"]["content"], adapted) == ("Hello", (name,))
    server.seen.clear()
    _, adapted, _ = await said(worker, chat("one", stream, **field))
    assert (adapted, any(name in body for body in server.posts)) == ((name,), False)


@both
@pytest.mark.parametrize("adapt", [False, True])
@pytest.mark.parametrize(
    "field",
    [{"parallel_tool_calls": True, "tools": [WEATHER]}, {"logit_bias": {}}, {"store": False}, {"verbosity": "medium"}],
    ids=str,
)  # fmt: skip
async def test_a_strict_server_does_not_see_what_asks_for_nothing(
    server: Partial, worker: Backend, stream: bool, adapt: bool, field: JSON
) -> None:
    server.refuses = set(field) - {"tools"}
    for posts in (4, 1):  # refused, two of a probe, and without it; then known
        server.seen.clear()
        answer, adapted, _ = await said(worker, replace(chat("one", stream, **field), adapt=adapt))
        assert (answer["choices"][0]["message"]["content"], adapted) == ("Hello", ())
        assert len(server.posts) == posts


async def test_no_tools_are_offered_where_none_may_be_called(server: Partial, worker: Backend) -> None:
    server.refuses = {"tool_choice"}
    fields: JSON = {"tools": [WEATHER], "tool_choice": "none"}
    work = chat("one", **fields)
    answer, adapted, _ = await said(worker, work)
    assert (answer["choices"][0]["message"]["content"], adapted) == ("Hello", ())
    assert not server.posts[-1].keys() & {"tools", "tool_choice"}


async def test_tools_of_other_types_are_the_business_of_a_server_with_tool_choice(
    server: Partial, worker: Backend
) -> None:
    custom: JSON = {"type": "custom", "custom": {"name": "sh"}}
    await said(worker, chat("one", tools=[custom], tool_choice=custom))
    assert server.posts[-1]["tool_choice"] == custom


@pytest.mark.parametrize("choice", ["auto!", "", 7, True])
async def test_a_tool_choice_that_is_none_is_refused(backend: Backend, choice: Any) -> None:
    with pytest.raises(BackendRefused, match="tool_choice must be 'none', 'auto', 'required'"):
        await said(backend, chat(CHAT, tools=[WEATHER], tool_choice=choice))


async def test_a_refusal_that_names_a_parameter_proves_nothing(server: Partial, worker: Backend) -> None:
    usual = server.quirk
    server.quirk = lambda path, body: (
        refused("logit_bias is out of range") if body.get("logit_bias") == {"1": 900} else usual(path, body)
    )
    with pytest.raises(BackendRefused, match="out of range"):
        await said(worker, chat("one", logit_bias={"1": 900}))
    _, adapted, _ = await said(worker, chat("one", logit_bias={"1": 9}))
    assert (adapted, server.posts[-1]["logit_bias"]) == ((), {"1": 9})


@both
async def test_a_server_that_has_tool_choice_is_trusted(server: Partial, worker: Backend, stream: bool) -> None:
    work = chat("one", stream, tools=[WEATHER, TIME], tool_choice=NAMED)
    answer, adapted, _ = await said(worker, work)
    assert (calls(answer), adapted) == ([("weather", {"city": "Lisbon"})], ())
    [sent] = server.posts
    assert (sent["tool_choice"], len(sent["tools"])) == (NAMED, 2)


@both
@pytest.mark.parametrize("calls_another", [False, True])
async def test_a_server_that_ignores_tool_choice_is_noticed(
    server: Partial, worker: Backend, stream: bool, calls_another: bool
) -> None:
    """The answer holds no call, or a call of another tool; none of it is sent."""
    if calls_another:
        server.calls = [calling("time", "{}")]
    else:
        server.ignores = {"tool_choice"}
    work = chat("one", stream, tools=[WEATHER, TIME], tool_choice=NAMED)
    answer, adapted, _ = await said(worker, work)
    assert (calls(answer), adapted) == ([("weather", {"city": "Porto"})], ("tool_choice",))
    with pytest.raises(BackendRefused) as caught:
        await said(worker, replace(work, adapt=False))
    assert (caught.value.info.code, caught.value.info.param) == ("unsupported_parameter", "tool_choice")


@both
async def test_a_server_that_refuses_tool_choice_is_offered_one_tool(
    server: Partial, worker: Backend, stream: bool
) -> None:
    server.refuses = {"tool_choice"}
    answer, adapted, _ = await said(worker, chat("one", stream, tools=[WEATHER, TIME], tool_choice=NAMED))
    assert (calls(answer), adapted) == ([("weather", {"city": "Porto"})], ("tool_choice",))
    assert [len(body["tools"]) for body in server.posts if body.get("tools") and "tool_choice" not in body] == [1, 1]


@both
async def test_a_server_that_calls_several_tools_all_the_same(server: Partial, worker: Backend, stream: bool) -> None:
    server.calls = [calling("weather", '{"city":"Lisbon"}'), calling("weather", '{"city":"Porto"}')]
    fields: dict[str, Any] = {"tools": [WEATHER], "tool_choice": "required"}
    answer, _, _ = await said(worker, chat("one", stream, parallel_tool_calls=False, **fields))
    assert calls(answer) == [("weather", {"city": "Lisbon"})]
    answer, _, _ = await said(worker, chat("one", stream, **fields))
    assert len(calls(answer)) == 2


async def test_the_operator_says_what_a_server_lacks(server: Partial) -> None:
    backend = make_backend("openai", BackendConfig(url=server.url, options={"lacks": "n+parallel_tool_calls"}))
    _, adapted, _ = await said(backend, chat("one", n=2, tools=[WEATHER], parallel_tool_calls=False))
    assert adapted == ("n", "parallel_tool_calls")
    assert all(not {"n", "parallel_tool_calls"} & body.keys() for body in server.posts)
    await backend.close()
    with pytest.raises(ValueError, match="temperature"):
        make_backend("openai", BackendConfig(url=server.url, options={"lacks": "n+temperature"}))
