"""Which processes beside a running stack get its credentials by themselves."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.datadir import DataDir, StackState
from cli.running_stack import join_running_stack

WORKER = {
    "NATS_URL": "nats://127.0.0.1:14222",
    "ETCD_URL": "https://127.0.0.1:12379",
    "NATS_USER": "nexus",
    "NATS_PASSWORD_FILE": "/data/secrets/nats-password",
    "ETCD_USER": "worker",
}
STATE = StackState(pid=1, url="http://127.0.0.1:8800", key="x", environments={"worker": WORKER})


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DataDir]:
    """A stack runs here, and nothing is set."""
    for name in [*WORKER, "NATS_CREDS_FILE", "NEXUS_DATA_DIR", "REDIS_URL"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    # What is set in a test is taken back after it.
    monkeypatch.setattr(os, "environ", os.environ.copy())
    data = DataDir(tmp_path / ".nexus")
    data.prepare()
    with data.locked(STATE.url):
        data.remember(STATE)
        yield data


def joins(data: DataDir, **settings: str) -> bool:
    os.environ.update(settings)
    joined = join_running_stack("worker")
    assert joined == (os.environ.get("NATS_PASSWORD_FILE") == WORKER["NATS_PASSWORD_FILE"])
    return joined


def test_nothing_set_is_the_stack_of_this_folder(data: DataDir) -> None:
    """As `nexus status` finds it."""
    assert joins(data)
    assert os.environ["ETCD_URL"] == WORKER["ETCD_URL"]


def test_its_own_addresses_are_enough(data: DataDir) -> None:
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
def test_other_servers_and_other_users_are_meant_as_they_are(data: DataDir, settings: dict[str, str]) -> None:
    """Credentials go to nobody but the stack that they are for."""
    assert not joins(data, **settings)


def test_settings_of_a_file_count(data: DataDir) -> None:
    """`.env` names servers as the environment does."""
    (data.root.parent / ".env").write_text("NATS_URL=nats://10.0.0.1:4222\n")
    assert not joins(data)


def test_without_a_running_stack_nothing_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that a stack has left."""
    monkeypatch.delenv("NEXUS_DATA_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    assert not join_running_stack("worker")
