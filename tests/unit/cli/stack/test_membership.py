"""Processes that join a running stack, and those that do not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.errors import ConsoleError
from cli.serve import run_as_member
from cli.stack.data_dir import DataDir, StackState
from cli.stack.membership import REJOIN_VARIABLE, StackMembership, join_running_stack

WORKER = {
    "NATS_URL": "nats://127.0.0.1:14222",
    "ETCD_URL": "https://127.0.0.1:12379",
    "NATS_USER": "nexus",
    "NATS_PASSWORD_FILE": "/data/secrets/nats-password",
    "ETCD_USER": "worker",
}
KEYS = ("GATEWAY_BEARER_TOKEN", "GATEWAY_BEARER_TOKEN_FILE")
STATE = StackState(
    pid=1, url="http://127.0.0.1:8800", key="the-printed-key", environments={"worker": WORKER, "gateway": WORKER}
)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DataDir]:
    """A stack runs here, and nothing is set."""
    for name in [*WORKER, *KEYS, "NATS_CREDS_FILE", "NEXUS_DATA_DIR", "REDIS_URL"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    # What is set in a test is taken back after it.
    monkeypatch.setattr(os, "environ", os.environ.copy())
    data = DataDir(tmp_path / ".nexus")
    data.prepare()
    with data.locked(STATE.url):
        data.save_state(STATE)
        yield data


def joins(data: DataDir, **settings: str) -> bool:
    os.environ.update(settings)
    joined = join_running_stack("worker") is not None
    assert joined == (os.environ.get("NATS_PASSWORD_FILE") == WORKER["NATS_PASSWORD_FILE"])
    return joined


def test_without_settings_the_stack_of_the_folder_is_joined(data: DataDir) -> None:
    """As `nexus status` finds it."""
    assert joins(data)
    assert os.environ["ETCD_URL"] == WORKER["ETCD_URL"]


def test_a_gateway_takes_the_key_of_the_stack(data: DataDir) -> None:
    """The key that `nexus up` printed is valid at every gateway beside it."""
    assert join_running_stack("gateway")
    assert os.environ["GATEWAY_BEARER_TOKEN"] == STATE.key


@pytest.mark.parametrize("name", KEYS)
def test_a_gateway_with_a_key_of_its_own_keeps_it(data: DataDir, name: str) -> None:
    """By either setting."""
    os.environ[name] = "another"
    assert join_running_stack("gateway")
    assert {os.environ.get(one) for one in KEYS} == {"another", None}


def test_a_worker_gets_no_key(data: DataDir) -> None:
    """It has no use for one."""
    assert joins(data)
    assert not os.environ.keys() & set(KEYS)


def test_the_stacks_own_addresses_join_it(data: DataDir) -> None:
    """Scripts that read `state.json` know the ports, and not that etcd wants TLS."""
    assert joins(data, NATS_URL="nats://localhost:14222", ETCD_URL="http://127.0.0.1:12379")
    assert os.environ["ETCD_URL"] == WORKER["ETCD_URL"]


@pytest.mark.parametrize(
    "settings",
    [
        {"NATS_URL": "nats://127.0.0.1:4222"},
        {"NATS_URL": "nats://nats.example:14222"},
        {"NATS_URL": "tls://a:1,tls://b:2"},
        {"ETCD_URL": "https://10.0.0.1:12379"},
        {"NATS_USER": "worker"},
        {"ETCD_USER": "gateway"},
        {"NATS_CREDS_FILE": "/run/secrets/creds"},
    ],
    ids=str,
)
def test_other_servers_and_users_are_not_overridden(
    data: DataDir, settings: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Credentials go to their own stack only. A shell may still have those of an earlier start: a line says so."""
    assert not joins(data, **settings)
    assert f"not joining the stack that runs on {data.root}" in capsys.readouterr().err


def test_settings_of_a_file_count(data: DataDir) -> None:
    """`.env` names servers as the environment does."""
    (data.root.parent / ".env").write_text("NATS_URL=nats://10.0.0.1:4222\n")
    assert not joins(data)


def test_without_a_running_stack_nothing_is_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A message explains why the default ports are tried, for users in the wrong folder."""
    _nothing_set(tmp_path, monkeypatch)
    assert not join_running_stack("worker")
    assert f"no `nexus up` runs on {tmp_path / '.nexus'}; trying NATS and etcd at" in capsys.readouterr().err


def test_a_flag_that_names_no_running_stack_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The project's folder instead of its `.nexus`, for example: a Nexus at the default ports must not be joined."""
    _nothing_set(tmp_path, monkeypatch)
    with pytest.raises(ConsoleError, match="No `nexus up` runs on"):
        join_running_stack("worker", tmp_path)


def test_settings_that_name_nats_need_no_stack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A GPU host has no stack, and gets no message about it."""
    _nothing_set(tmp_path, monkeypatch)
    monkeypatch.setenv("NATS_URL", "nats://10.0.0.5:4222")
    assert not join_running_stack("worker")
    assert not join_running_stack("worker", tmp_path)
    assert capsys.readouterr().err == ""


def _nothing_set(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NEXUS_DATA_DIR", "NATS_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(folder)


class Replaced(Exception):
    """This process would run its own command line once more, with this environment."""


@pytest.fixture
def joined(data: DataDir, monkeypatch: pytest.MonkeyPatch) -> StackMembership:
    """A process that has joined the stack, and has not begun."""

    def replace(_program: str, _arguments: list[str], environment: dict[str, str]) -> None:
        raise Replaced(environment.get(REJOIN_VARIABLE))

    monkeypatch.setattr(os, "execve", replace)
    found = join_running_stack("worker")
    assert found
    return found


def test_a_process_that_fails_while_its_stack_ends_waits_for_the_next_start(
    data: DataDir, joined: StackMembership
) -> None:
    """Its password's file goes with the stack."""

    def run() -> int:
        data.clear_state()
        return 2

    with pytest.raises(Replaced, match="1"):
        run_as_member(joined, run)


def test_a_process_that_fails_while_its_stack_runs_ends(joined: StackMembership) -> None:
    """The cause is its own."""
    assert run_as_member(joined, lambda: 2) == 2


def test_a_stopped_process_does_not_wait(data: DataDir, joined: StackMembership) -> None:
    """By Ctrl-C after its stack has ended, for example."""

    def run() -> int:
        data.clear_state()
        return 0

    assert run_as_member(joined, run) == 0


def test_a_supervisor_stopped_by_its_user_does_not_wait(data: DataDir, joined: StackMembership) -> None:
    """One of its processes was still starting and died of the signal, after the stack has ended."""

    def run() -> int:
        data.clear_state()
        return 15

    assert run_as_member(joined, run, has_children=True) == 15
