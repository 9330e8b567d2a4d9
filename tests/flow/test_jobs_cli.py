"""`nexus submit`, `watch`, `jobs` and `dlq` as their users use them, on a running Nexus."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.cluster import KEY, ROOT, Cluster, Crew, chat
from tests.conftest import Eventually
from tests.fork_server import forked

pytestmark = pytest.mark.asyncio(loop_scope="module")

PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True, slots=True)
class Ran:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """What it printed, of one line."""
        return json.loads(self.out)


class Shell:
    """Runs `nexus` in a folder of its own."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.folder = folder
        self._env = {name: value for name, value in os.environ.items() if not name.startswith(("NEXUS_", "GATEWAY_"))}
        self._env |= {"NEXUS_URL": cluster.url, "NEXUS_API_KEY": KEY, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}

    async def start(self, *arguments: str, stdin: str = "", out: int = asyncio.subprocess.PIPE) -> Any:
        process = await asyncio.create_subprocess_exec(
            *(*forked("cli.main"), *arguments),
            cwd=self.folder,
            env=self._env,
            stdin=asyncio.subprocess.PIPE,
            stdout=out,
            stderr=asyncio.subprocess.PIPE,
        )
        assert process.stdin is not None
        process.stdin.write(stdin.encode())
        process.stdin.close()
        return process

    async def run(self, *arguments: str, stdin: str = "", ends: int = 0) -> Ran:
        return await self.end(await self.start(*arguments, stdin=stdin), ends)

    async def end(self, process: Any, ends: int = 0) -> Ran:
        async with asyncio.timeout(60):
            out, err = await process.communicate()
        ran = Ran(process.returncode, (out or b"").decode(), (err or b"").decode())
        assert ran.code == ends, ran
        return ran


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Commands heed Ctrl-C also where the tests run in a shell's background, which has them and their children ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def shell(cluster: Cluster, tmp_path: Path) -> Shell:
    return Shell(cluster, tmp_path)


@pytest_asyncio.fixture(loop_scope="module")
async def served(crew: Crew) -> Crew:
    await crew.start(options="slots=2")
    return crew


def asked(crew: Crew, content: str = "hello there", **fields: Any) -> str:
    return json.dumps(chat(content, model=crew.model, **fields))


async def submitted(shell: Shell, crew: Crew, content: str = "hello there", **fields: Any) -> str:
    return (await shell.run("submit", "chat", "-", stdin=asked(crew, content, **fields))).out.strip()


async def status_of(cluster: Cluster, job: str) -> str:
    return str((await cluster.get(f"/v1/jobs/{job}")).json()["status"])


async def is_now(cluster: Cluster, job: str, status: str) -> bool:
    return await status_of(cluster, job) == status


async def test_submit_and_watch(shell: Shell, served: Crew) -> None:
    """The id goes to standard output, the answer's text too, and nothing else."""
    ran = await shell.run("submit", "chat", "-", "--metadata", "team=a", stdin=asked(served))
    job = ran.out.strip()
    assert job.startswith("job_")
    assert f"nexus watch {job}" in ran.err
    assert (await shell.run("watch", job)).out == "hello there\n"
    lines = [json.loads(line) for line in (await shell.run("watch", job, "--json")).out.splitlines()]
    assert lines[0]["event"] in {"job.queued", "job.started"}
    assert [line["event"] for line in lines][-2:] == ["job.completed", "result"]
    assert lines[-1]["data"]["choices"][0]["message"]["content"] == "hello there"
    shown = (await shell.run("jobs", "show", job, "--json")).json
    assert (shown["status"], shown["metadata"]) == ("completed", {"team": "a"})


async def test_pictures_sound_and_transcripts(shell: Shell, served: Crew) -> None:
    """Pictures and sound become files; a file can be sent, with metadata or without."""
    picture = json.dumps({"model": served.model, "prompt": "a cat", "size": "64x64", "n": 2})
    ran = await shell.run("submit", "images", "-", "--wait", stdin=picture)
    saved = sorted(shell.folder.glob("job_*.png"))
    assert len(saved) == 2
    assert all(file.read_bytes().startswith(PNG) for file in saved)
    assert all(f"saved {file.name}" in ran.err for file in saved)
    by_url = json.dumps({**json.loads(picture), "n": 1, "response_format": "url"})
    await shell.run("submit", "images", "-", "-o", "cat.png", stdin=by_url)
    assert (shell.folder / "cat.png").read_bytes().startswith(PNG)

    speech = json.dumps({"model": served.model, "input": "hello there", "voice": "alloy", "response_format": "wav"})
    await shell.run("submit", "speech", "-", "-o", "said.wav", stdin=speech)
    assert (shell.folder / "said.wav").read_bytes().startswith(b"RIFF")

    heard = ("submit", "transcriptions", "-f", "file=said.wav", "-m", served.model, "--wait")
    text = (await shell.run(*heard)).out
    assert str((shell.folder / "said.wav").stat().st_size) in text
    assert (await shell.run(*heard, "--metadata", "a=b")).out == text


async def test_failure_and_retry(shell: Shell, served: Crew, cluster: Cluster) -> None:
    """The reason is said, and the exit code is 1; another run may do better."""
    job = await submitted(shell, served, echo={"fail": "error", "fail_times": 1})
    ran = await shell.run("watch", job, ends=1)
    assert ran.out == ""
    assert "failed: " in ran.err
    assert (await shell.run("jobs", "retry", job)).out == f"{job}: queued\n"
    assert (await shell.run("watch", job)).out == "hello there\n"
    assert "Only a failed job" in (await shell.run("jobs", "retry", job, ends=1)).err


async def test_cancel(shell: Shell, served: Crew, cluster: Cluster, eventually: Eventually) -> None:
    """Anyone who watches sees it."""
    job = await submitted(shell, served, echo={"fail": "hang"})
    watching = await shell.start("watch", job)
    await eventually(lambda: is_now(cluster, job, "in_progress"))
    assert (await shell.run("jobs", "cancel", job)).out == f"{job}: cancelled\n"
    assert "cancelled" in (await shell.end(watching, 1)).err


async def test_list(shell: Shell, served: Crew) -> None:
    """By model, status and metadata."""
    for team in ("a", "b", "a"):
        await shell.run("submit", "chat", "-", "--wait", "--metadata", f"team={team}", stdin=asked(served))
    every = (await shell.run("jobs", "list", "-m", served.model, "--json")).json["data"]
    some = (await shell.run("jobs", "list", "-m", served.model, "--metadata", "team=a", "--json")).json["data"]
    assert len(every) == 3
    assert [job["id"] for job in some] == [every[0]["id"], every[2]["id"]]
    table = (await shell.run("jobs", "list", "-m", served.model, "--status", "completed")).out
    assert [line.split()[0] for line in table.splitlines()] == ["job", *(job["id"] for job in every)]


async def test_dead_letters(shell: Shell, served: Crew, cluster: Cluster, eventually: Eventually) -> None:
    """A job whose retries are used up lies there, with its request; it can be run again, or be forgotten."""
    job = await submitted(shell, served, echo={"fail": "before", "fail_times": 3})
    await eventually(lambda: is_now(cluster, job, "failed"), timeout_s=60)
    assert job in (await shell.run("dlq", "list")).out
    letter = (await shell.run("dlq", "show", job, "--json")).json
    assert letter["request"]["model"] == served.model
    assert (await shell.run("dlq", "replay", "--all")).out == f"{job}: queued\n"
    assert (await shell.run("watch", job)).out == "hello there\n"
    assert job not in (await shell.run("dlq", "list")).out
    lost = await submitted(shell, served, echo={"fail": "before"})
    await eventually(lambda: is_now(cluster, lost, "failed"), timeout_s=60)
    assert (await shell.run("dlq", "delete", lost)).out == f"{lost}: deleted\n"
    assert "no dead letter" in (await shell.run("dlq", "list")).out
    assert (await shell.run("dlq", "delete", lost, ends=1)).out == ""


class Terminal:
    """A terminal that a command believes in; `text` is what stands there."""

    def __init__(self, ours: int) -> None:
        self.text = ""
        self._ours = ours
        asyncio.get_running_loop().add_reader(ours, self._read)

    def _read(self) -> None:
        try:
            self.text += os.read(self._ours, 65536).decode(errors="replace")
        except OSError:
            asyncio.get_running_loop().remove_reader(self._ours)

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._ours)
        os.close(self._ours)


@asynccontextmanager
async def terminal() -> AsyncIterator[tuple[Terminal, int]]:
    ours, theirs = pty.openpty()
    screen = Terminal(ours)
    try:
        yield screen, theirs
    finally:
        screen.close()
        os.close(theirs)


async def test_tokens_on_a_terminal_and_ctrl_c(
    shell: Shell, served: Crew, cluster: Cluster, eventually: Eventually
) -> None:
    """They come as they are made; Ctrl-C stops the watching, and the job goes on."""
    body = asked(served, "one two three four", echo={"delay_ms": 400, "tokens": 30})
    async with terminal() as (screen, theirs):
        process = await shell.start("submit", "chat", "-", "--wait", stdin=body, out=theirs)
        await eventually(lambda: "one two three" in screen.text)
        process.send_signal(signal.SIGINT)
        ran = await shell.end(process, 130)
    assert "the job continues" in ran.err
    [job] = (await shell.run("jobs", "list", "-m", served.model, "--json")).json["data"]
    assert job["status"] == "in_progress"
    assert (await shell.run("watch", job["id"])).out.split() == (["one", "two", "three", "four"] * 8)[:30]


async def test_watching_over_a_restart_of_the_gateway(
    shell: Shell, served: Crew, cluster: Cluster, eventually: Eventually
) -> None:
    """What comes afterwards follows what came before: nothing twice, nothing missing."""
    body = asked(served, " ".join(map(str, range(40))), stream=True, echo={"delay_ms": 200})
    async with terminal() as (screen, theirs):
        process = await shell.start("submit", "chat", "-", "--wait", stdin=body, out=theirs)
        await eventually(lambda: "0 1 2 3" in screen.text)
        gateway = cluster.gateways[0]
        gateway.kill()
        await gateway.wait()
        await gateway.start()
        ran = await shell.end(process)
        await eventually(lambda: screen.text.endswith("39\r\n"))
        # A note on the outage begins a line of its own.
        assert screen.text.split() == [str(number) for number in range(40)]
    assert "Trying again" in ran.err
