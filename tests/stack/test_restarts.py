"""Ports and workers started by hand survive a restart of `nexus up`."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from cli.embedded.managed_process import bind_to_parent
from tests.cluster import free_port
from tests.fork_server import forked
from tests.stack.test_up import Up, clean_environment, eventually_true

pytestmark = pytest.mark.timeout(240)

KEPT = ("nats", "etcd", "redis")


class Worker:
    """`nexus worker`, started in a second terminal."""

    def __init__(self, folder: Path, data: Path, *, by_file: bool) -> None:
        self.model = "by-file" if by_file else "by-folder"
        self.log = folder / f"{self.model}.log"
        command = [*forked("cli.main"), "worker", "--backend", "echo", "--model", self.model, "--name", self.model]
        environment = clean_environment()
        if by_file:
            command = ["sh", "-c", f'. {data}/worker.env && exec "$@"', "sh", *command]
        else:
            environment["NEXUS_DATA_DIR"] = str(data)
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                bind_to_parent(command), env=environment, cwd=folder, stdout=log, stderr=log
            )

    def end(self) -> int:
        self.process.terminate()
        return self.process.wait(30)


@pytest.fixture
async def up(tmp_path: Path) -> AsyncIterator[Up]:
    async with Up(tmp_path / "nexus", "--no-local-models") as up:
        yield await up.is_up()


async def serves(up: Up, worker: Worker) -> None:
    """The worker answers, and is the process that it was."""
    assert await up.chat_again("joined", worker.model, within_s=60) == "joined"
    assert worker.process.poll() is None, worker.log.read_text()


async def serve(up: Up, workers: list[Worker]) -> None:
    for worker in workers:
        await serves(up, worker)


async def test_workers_by_hand_serve_after_restarts(tmp_path: Path, up: Up) -> None:
    """After a stop, after a kill, and on other ports because the old ones are in use. The workers are left alone: one found the
    stack by NEXUS_DATA_DIR, the other by worker.env.
    """
    workers = [Worker(tmp_path, up.data, by_file=by_file) for by_file in (False, True)]
    try:
        await serve(up, workers)
        ports = up.state()["ports"]
        up.process.send_signal(signal.SIGTERM)
        await up.ended_well()
        async with Up(up.data, "--no-local-models") as second:
            await second.is_up()
            assert [second.state()["ports"][name] for name in KEPT] == [ports[name] for name in KEPT]
            await serve(second, workers)
            second.process.kill()
            second.process.wait()
            async with Up(up.data, "--no-local-models") as third:
                await third.is_up()
                await serve(third, workers)
                third.process.send_signal(signal.SIGTERM)
                assert await third.ended() == 0
        with socket.socket() as thief:
            thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            thief.bind(("127.0.0.1", ports["nats"]))
            thief.listen()
            async with Up(up.data, "--no-local-models") as fourth:
                await fourth.is_up()
                assert f"Port {ports['nats']}, which NATS had before, is in use by " in fourth.output
                assert fourth.state()["ports"]["nats"] != ports["nats"]
                await serve(fourth, workers)
    finally:
        codes = [worker.end() for worker in workers]
    assert codes == [0, 0], "\n".join(worker.log.read_text() for worker in workers)


async def test_a_worker_by_hand_ends_while_its_stack_is_away(tmp_path: Path, up: Up) -> None:
    """In order, and without a traceback."""
    worker = Worker(tmp_path, up.data, by_file=False)
    try:
        await serves(up, worker)
        up.process.send_signal(signal.SIGTERM)
        await up.ended_well()
        await eventually_true(lambda: "nats.disconnected" in worker.log.read_text(), "it has noticed")
    finally:
        code = await asyncio.to_thread(worker.end)
    output = worker.log.read_text()
    assert (code, "Traceback" in output) == (0, False), output


@pytest.mark.parametrize("count", [1, 2])
async def test_a_gateway_by_hand_serves_after_a_restart(tmp_path: Path, up: Up, count: int) -> None:
    """On its own port, with the same key; processes that share the port make room for the next ones."""
    port, side = free_port(), free_port()
    log = tmp_path / "gateway.log"
    command = [
        *forked("cli.main"),
        "gateway",
        "--port",
        str(port),
        "--observability-port",
        str(side),
        "--gateways",
        str(count),
    ]
    with log.open("w") as out:
        environment = clean_environment(NEXUS_DATA_DIR=str(up.data), GATEWAY_LAME_DUCK_S="0", GATEWAY_DRAIN_S="0")
        gateway = subprocess.Popen(bind_to_parent(command), env=environment, cwd=tmp_path, stdout=out, stderr=out)
    try:
        await answers(up, port)
        up.process.kill()
        up.process.wait()
        async with Up(up.data, "--no-local-models") as second:
            await second.is_up()
            await eventually_true(lambda: "has been started again; joining it" in log.read_text(), "it has noticed")
            await answers(second, port)
            assert gateway.poll() is None, log.read_text()
    finally:
        gateway.terminate()
        try:
            # 15: a process of it that was still starting
            assert await asyncio.to_thread(gateway.wait, 30) in (0, 15)
        except subprocess.TimeoutExpired:
            tree = subprocess.run(
                ["ps", "-eo", "pid,ppid,stat,etimes,args"], capture_output=True, text=True, check=False
            )
            gateway.kill()
            pytest.fail(
                f"it does not end: {log.read_text()[-3000:]}\n{[line for line in tree.stdout.splitlines() if 'gateway' in line]}"
            )


async def answers(up: Up, port: int, within_s: float = 60.0) -> None:
    """The gateway at `port` answers with the stack's worker and key."""
    headers = {"authorization": f"Bearer {up.state()['key']}"}
    body = {"model": "echo", "messages": [{"role": "user", "content": "hello"}]}
    deadline = time.monotonic() + within_s
    async with httpx.AsyncClient(trust_env=False, timeout=20, headers=headers) as http:
        while True:
            with suppress(httpx.HTTPError):
                answer = await http.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body)
                if answer.status_code == 200:
                    return
            assert time.monotonic() < deadline
            await asyncio.sleep(0.1)


async def test_ports_by_the_environment_and_by_env_file(tmp_path: Path) -> None:
    """The settings of any gateway. A flag overrides the environment, which overrides `.env`."""
    (tmp_path / ".env").write_text("GATEWAY_PORT=1\nOBSERVABILITY_PORT=2\nGATEWAY_WORKERS=2\n")
    up = Up(tmp_path / "nexus", "--no-local-models", start=True, OBSERVABILITY_PORT="1")
    up.port_flags = False
    up.environment["GATEWAY_PORT"] = str(up.port)
    up.flags += ("--observability-port", str(up.observability_port))
    async with up:
        await up.is_up()
        ports = up.state()["ports"]
        assert (ports["gateway"], ports["observability"]) == (up.port, up.observability_port)
        assert "2 gateways" in up.output
        assert await up.chat("hello") == "hello"
        code, _, error = await up.command("up", "--data-dir", str(tmp_path / "other"), GATEWAY_PORT=str(up.port))
        assert code == 1
        assert f"port {up.port} on 127.0.0.1 is in use by another Nexus gateway (pid " in error
        assert "--port or GATEWAY_PORT" in error


async def test_every_command_finds_the_stack_of_its_folder(tmp_path: Path, shared: Up) -> None:
    """Without flags, where `.nexus` is in the folder itself."""
    here = tmp_path / "here"
    here.mkdir()
    (here / ".nexus").symlink_to(shared.data)
    commands = [
        *(["status"], ["workers"], ["queues"], ["aliases"], ["services"], ["keys", "list"], ["jobs", "list"]),
        *(["dlq", "list"], ["chat", "-m", "hi"], ["backup", str(tmp_path / "backup")]),
    ]
    for command in commands:
        done = await asyncio.to_thread(
            subprocess.run,
            [*forked("cli.main"), *command],
            cwd=here,
            env=clean_environment(),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, (command, done.stderr)
    assert json.loads((here / ".nexus" / "ports.json").read_text()).keys() >= set(KEPT)


async def test_commands_without_a_stack_say_where_they_looked(tmp_path: Path, shared: Up) -> None:
    """The message names the folder and what to do, also if a gateway runs at the URL and only its key is missing."""
    for command in (["status"], ["jobs", "list"], ["keys", "list"], ["dlq", "list"], ["chat", "-m", "x"]):
        for url, output in (("http://127.0.0.1:1", "No gateway answers at"), (shared.url, "requires a key")):
            if output == "requires a key" and command == ["status"]:
                continue  # readiness needs none
            done = await asyncio.to_thread(
                subprocess.run,
                [*forked("cli.main"), *command, "--url", url],
                cwd=tmp_path,
                env=clean_environment(),
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            assert done.returncode == 1
            assert output in done.stderr
            assert f"no `nexus up` runs on {tmp_path / '.nexus'}" in done.stderr
            assert "--data-dir" in done.stderr
