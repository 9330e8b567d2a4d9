"""docs/reference/compatibility.md, of what the recorded shapes and the lock files say: `python -m tests.backends.compatibility` writes it again."""

from __future__ import annotations

import json
import tomllib
from itertools import groupby
from pathlib import Path

from tests.backends.shape_corpus import Shape, shapes

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reference" / "compatibility.md"
INTRODUCTION = """\
# Tested servers and clients

This page lists the tested clients, and the tested text servers with their versions, their quirks, and what callers get. The lists are generated from the lock files and the recorded answers
in `tests/backends/shapes` by `python -m tests.backends.compatibility`, and a test compares them.

## Tests

Each recorded answer is a server's answer from a public report, shortened: status, headers and body, byte by byte. `tests/backends/test_shapes.py`
replays it over HTTP to the adapter for that API (`openai` and `service`, or `ollama`), for a caller with and without a stream; the
bytes arrive at once, event by event, one by one, and cut within characters and line ends. `tests/flow/test_shapes.py` replays it
through a whole Nexus: chat, text completions and responses. The expected answer is written by hand beside each: the text, reasoning, calls with ids, one final
reason, usage, one id and time; or OpenAI's error.

| test | servers |
|---|---|
| the real server, in the test suite | llama.cpp's `llama-server` (the version that `nexus up` installs) |
| the real server, by hand, behind an earlier Nexus; versions were not recorded | Ollama, vLLM, LiteLLM |
| recorded answers from public reports, replayed | all in the lists below |

A version is that of the report; later ones may be better, and the same answer is still understood. To add one, record the body, put it into a file of
`tests/backends/shapes` with its source, write down what callers must get, and run the test.

## What callers get

See [what is repaired in text](../how-to/openai-servers.md#what-is-repaired-in-text) and [what an error becomes](../how-to/openai-servers.md#what-a-servers-error-becomes).

## Clients

The test suite runs these clients, unmodified, against a whole Nexus, in the versions of the lock files:

| client | version | tests |
|---|---|---|
"""
CLIENTS = (
    ("openai", "OpenAI's SDK for Python", "test_openai_python.py", "uv"),
    ("openai", "OpenAI's SDK for Node", "test_openai_node.py", "npm"),
    ("anthropic", "Anthropic's SDK for Python", "test_anthropic_python.py", "uv"),
    ("@anthropic-ai/sdk", "Anthropic's SDK for Node", "test_anthropic_node.py", "npm"),
)


def page() -> str:
    """Return the page."""
    parts = [INTRODUCTION + "".join(map(_client, CLIENTS))]
    ordered = sorted(shapes(), key=lambda shape: (shape.adapter != "openai", str(shape.entry["server"]).lower()))
    for server, group in groupby(ordered, key=lambda shape: str(shape.entry["server"])):
        rows = "\n".join(map(_row, group))
        parts.append(f"## {server}\n\n| version | quirk | callers get | seen |\n|---|---|---|---|\n{rows}\n")
    return "\n".join(parts)


def _client(client: tuple[str, str, str, str]) -> str:
    package, title, test, lock = client
    if lock == "npm":
        packages = json.loads((ROOT / "tests/clients/node/package-lock.json").read_text())["packages"]
        version = packages[f"node_modules/{package}"]["version"]
    else:
        packages = tomllib.loads((ROOT / "uv.lock").read_text())["package"]
        version = next(one["version"] for one in packages if one["name"] == package)
    return f"| {title} (`{package}`) | {version} | `tests/clients/{test}` |\n"


def _row(shape: Shape) -> str:
    entry = shape.entry
    seen = ", ".join(f"[{number}]({url})" for number, url in enumerate(entry["seen"], 1)) or "by its form"
    return f"| {entry['version'] or 'any'} | {_safe(str(entry['quirk']))} | {_outcome(shape)} | {seen} |"


def _outcome(shape: Shape) -> str:
    want = shape.entry["want"]
    error = want.get("error")
    if error is not None:
        code = f" `{error['code']}`" if error.get("code") else ""
        return f"{error['status']}{code}"
    calls = len(want.get("tool_calls", ()))
    said = f"{calls} tool call{'s' if calls > 1 else ''}" if calls else "the answer"
    return f"{said}, `{want['finish_reason']}`"


def _safe(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "`<").replace(">", ">`")


if __name__ == "__main__":
    PAGE.write_text(page())
