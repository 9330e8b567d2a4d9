"""`docs/reference/parameters.md` is true: each row, on each adapter of text, under both policies."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.backends.contract import chat
from tests.backends.doubles.ollama import CHAT, OllamaDouble
from tests.backends.kit.test_adaptations import NAMED, WEATHER, Partial, said
from workers.adapter_kit.openai.unsupported_parameters import PARAMETERS
from workers.adapter_kit.text.adaptations import UNSUPPORTED_HINTS
from workers.backends.base import Backend, BackendConfig, BackendRefused, make_backend
from workers.backends.ollama.requests import LACKS

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "parameters.md"
ROW = re.compile(r"^\| `(\w+)` \| ([\w ]+) \| ([\w ]+) \| ([\w ]+) \| (.*)\|$", re.MULTILINE)
ROWS = {name: (ollama, openai, echo) for name, ollama, openai, echo, _ in ROW.findall(PAGE.read_text())}
EXAMPLES: dict[str, Any] = {
    "n": 2,
    "tool_choice": NAMED,
    "parallel_tool_calls": False,
    "logit_bias": {"1": 5},
    "best_of": 2,
    "verbosity": "low",
    "store": True,
    "logprobs": True,
    "response_format": {"type": "json_object"},
    "seed": 7,
    "stop": ["never"],
    "frequency_penalty": 0.5,
    "presence_penalty": 0.5,
    "max_completion_tokens": 50,
    "stream_options": {"include_usage": True},
    "user": "me",
    "metadata": {"a": "b"},
    "safety_identifier": "me",
    "prompt_cache_key": "me",
    "service_tier": "flex",
    "functions": [{"name": "f"}],
    "function_call": {"name": "f"},
    "modalities": ["text", "audio"],
    "web_search_options": {},
}
KINDS = ("ollama", "openai", "echo")
CASES = [(name, kind, said) for name, row in ROWS.items() for kind, said in zip(KINDS, row, strict=True)]


@pytest.fixture
async def servers() -> AsyncIterator[tuple[OllamaDouble, Partial]]:
    async with OllamaDouble() as ollama, Partial() as openai:
        ollama.behave(calls=({"function": {"name": "weather", "arguments": {"city": "Lisbon"}}},))
        ollama.loaded = {name: {} for name in ollama.models}
        yield ollama, openai


def test_the_table_is_whole() -> None:
    assert set(ROWS) == set(EXAMPLES)
    assert {name for name, (ollama, _, _) in ROWS.items() if ollama == "lacks"} == LACKS
    assert {name for name, (_, openai, _) in ROWS.items() if openai == "by probe"} == PARAMETERS
    assert set(UNSUPPORTED_HINTS) == LACKS | {"logprobs"}


@pytest.mark.parametrize(("name", "kind", "row"), CASES, ids=lambda value: str(value))
async def test_a_row_is_true(servers: tuple[OllamaDouble, Partial], name: str, kind: str, row: str) -> None:
    ollama, openai = servers
    options = {"lacks": name} if row == "by probe" else {}
    url = {"ollama": ollama.url, "openai": openai.url, "echo": ""}[kind]
    backend = make_backend(kind, BackendConfig(url=url, options=options))
    model = {"ollama": CHAT, "openai": "one", "echo": "echo"}[kind]
    fields = {name: EXAMPLES[name]} | ({"tools": [WEATHER]} if name in ("tool_choice", "parallel_tool_calls") else {})
    try:
        await _check(backend, chat(model, stream=name == "stream_options", **fields), name, row)
    finally:
        await backend.close()
    sent = orjson.dumps(openai.posts).decode() if kind == "openai" else ""
    assert kind != "openai" or (f'"{name}":' in sent) is (row == "has")


async def _check(backend: Backend, work: Any, name: str, row: str) -> None:
    if row == "refused":
        for adapt in (True, False):
            with pytest.raises(BackendRefused) as caught:
                await said(backend, replace(work, adapt=adapt))
            assert caught.value.info.param == name
        return
    lacks = row in ("lacks", "by probe")
    _, adapted, _ = await said(backend, work)
    assert adapted == ((name,) if lacks else ())
    if not lacks:
        assert (await said(backend, replace(work, adapt=False)))[1] == ()
        return
    with pytest.raises(BackendRefused) as caught:
        await said(backend, replace(work, adapt=False))
    assert (caught.value.info.code, caught.value.info.param) == ("unsupported_parameter", name)
