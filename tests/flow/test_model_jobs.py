"""Models pulled, loaded and unloaded by callers, and used at once: real gateway, real worker, a double of Ollama."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.backends.doubles.ollama import CHAT, EMBED, OllamaDouble
from tests.cluster import KEY, ROOT, Cluster, Crew
from tests.conftest import Eventually
from tests.fork_server import forked

pytestmark = pytest.mark.asyncio(loop_scope="module")

NEW = "qwen3:0.6b"


@pytest_asyncio.fixture(loop_scope="module")
async def ollama() -> AsyncIterator[OllamaDouble]:
    async with OllamaDouble() as server:
        yield server


@pytest_asyncio.fixture(loop_scope="module")
async def worker(crew: Crew, ollama: OllamaDouble) -> str:
    return await crew.start(backend="ollama", WORKER_BACKEND_URL=ollama.url, WORKER_MODELS="")


async def listed(cluster: Cluster) -> list[str]:
    return [model["id"] for model in (await cluster.get("/v1/models")).json()["data"]]


async def listed_with(cluster: Cluster, name: str) -> bool:
    return name in await listed(cluster)


async def test_a_model_is_pulled_and_used(
    cluster: Cluster, ollama: OllamaDouble, worker: str, eventually: Eventually
) -> None:
    """With progress on the way, and listed when it is there; the worker itself is never listed as a model."""
    ollama.behave(delay_s=0.01)
    lines = [line async for line in cluster.stream({"model": NEW, "worker": worker}, path="/v1/models/pull")]
    assert lines[-1] == "[DONE]"
    frames = [json.loads(line) for line in lines[:-1]]
    assert frames[-1] == {"object": "model.pull", "model": NEW, "status": "success"}
    assert 0.5 in [round(frame.get("fraction") or 0, 1) for frame in frames]

    await eventually(lambda: listed_with(cluster, NEW))
    assert not [name for name in await listed(cluster) if name.startswith("worker:")]
    body = {"model": NEW, "messages": [{"role": "user", "content": "hello"}]}
    answer = (await cluster.post("/v1/chat/completions", body)).json()
    assert answer["choices"][0]["message"]["content"] == "Hello there, world!"
    assert NEW in ollama.loaded


async def test_a_model_is_loaded_and_unloaded(cluster: Cluster, ollama: OllamaDouble, worker: str) -> None:
    loaded = await cluster.post("/v1/models/load", {"model": CHAT, "worker": worker})
    assert loaded.json() == {"object": "model.load", "model": CHAT, "status": "success"}
    assert CHAT in ollama.loaded
    await cluster.post("/v1/models/unload", {"model": CHAT, "worker": worker})
    assert CHAT not in ollama.loaded


async def test_what_cannot_be_done_is_said(cluster: Cluster, worker: str) -> None:
    """An unknown worker is a 404 that names those there are; a model that exists nowhere is a 404."""
    answer = await cluster.post("/v1/models/pull", {"model": NEW, "worker": "nobody"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (404, "worker")
    assert worker in answer.json()["error"]["message"]
    answer = await cluster.post("/v1/models/pull", {"model": "no-such-model", "worker": worker})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


async def test_text_and_embeddings_beside_it(cluster: Cluster, worker: str) -> None:
    answer = (await cluster.post("/v1/embeddings", {"model": EMBED, "input": ["one", "two"]})).json()
    assert [len(item["embedding"]) for item in answer["data"]] == [64, 64]
    answer = (await cluster.post("/v1/completions", {"model": CHAT, "prompt": "Once"})).json()
    assert answer["choices"][0]["text"] == "Hello there, world!"


class Shell:
    """Runs `nexus` against the cluster."""

    def __init__(self, cluster: Cluster, key: str = KEY) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("NEXUS_", "GATEWAY_"))}
        self._env = kept | {"NEXUS_URL": cluster.url, "NEXUS_API_KEY": key, "COLUMNS": "200"}

    async def start(self, *arguments: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *(*forked("cli.main"), *arguments), cwd=ROOT, env=self._env, stdout=PIPE, stderr=PIPE
        )

    async def run(self, *arguments: str) -> tuple[int | None, str, str]:
        """Exit code, standard output, standard error."""
        process = await self.start(*arguments)
        out, err = await process.communicate()
        return process.returncode, out.decode(), err.decode()


async def test_the_console_pulls_and_lists(
    cluster: Cluster, ollama: OllamaDouble, worker: str, eventually: Eventually
) -> None:
    """With progress on standard error; then the model is listed, with its worker."""
    ollama.behave(delay_s=0.01)
    shell = Shell(cluster)
    name = "gemma3:1b"
    code, out, err = await shell.run("pull", name, "--worker", worker)
    assert (code, out) == (0, f"{name}: pulled\n"), err
    assert "%" in err
    await eventually(lambda: listed_with(cluster, name))
    _, table, _ = await shell.run("models")
    lines = {line.split()[0]: line for line in table.splitlines()}
    assert lines["model"].split() == ["model", "capabilities", "state", "workers", "context"]
    assert worker in lines[name]
    assert " cold " in lines[name], "it is pulled, and not loaded yet"
    _, rows, _ = await shell.run("models", "--json")
    found = {row["id"]: row for row in json.loads(rows)["data"]}
    assert found[name]["workers"] == [worker]
    assert not [one for one in found if one.startswith("worker:")]


async def test_a_pull_goes_on_without_the_console(
    cluster: Cluster, ollama: OllamaDouble, worker: str, eventually: Eventually
) -> None:
    """Ctrl-C ends the watching alone, and says how to watch it again."""
    ollama.behave(delay_s=0.3)
    shell = Shell(cluster)
    process = await shell.start("pull", "phi3:mini", "--worker", worker)
    assert process.stderr is not None
    seen = b""
    while b"%" not in seen:
        line = await process.stderr.readline()
        assert line, seen
        seen += line
    process.send_signal(signal.SIGINT)
    _, err = await process.communicate()
    assert process.returncode == 130
    job = re.search(r"The download continues\. To watch it: nexus watch (job_\w+)", err.decode())
    assert job is not None, err
    await eventually(lambda: listed_with(cluster, "phi3:mini"))
    record = (await cluster.get(f"/v1/jobs/{job[1]}?wait=10")).json()
    assert record["status"] == "completed"


async def test_a_pull_that_cannot_be_is_one_sentence(cluster: Cluster, worker: str) -> None:
    """An unknown worker, a model that exists nowhere, a key that may not."""
    shell = Shell(cluster)
    code, _, err = await shell.run("pull", NEW, "--worker", "nobody")
    assert code == 1
    assert worker in err
    code, _, err = await shell.run("pull", "no-such-model", "--worker", worker)
    assert code == 1
    assert "no-such-model" in err
    made = (await cluster.post("/v1/keys", {"name": "plain"})).json()
    plain = Shell(cluster, made["key"])
    code, _, err = await plain.run("pull", NEW, "--worker", worker)
    assert code == 1
    assert "admin" in err
    code, out, err = await plain.run("models")
    assert code == 0, err
    assert CHAT in out
    for text in (err, out):
        assert "Traceback" not in text
