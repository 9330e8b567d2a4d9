"""The data directory: one stack at a time, a stable key, and the state of the running stack."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from cli.errors import ConsoleError
from cli.stack.data_dir import DataDir, StackState
from cli.stack.process_identity import process_identity

HOLD = """
import sys
from pathlib import Path
from cli.stack.data_dir import DataDir
data = DataDir(Path(sys.argv[1]))
with data.locked("http://127.0.0.1:1234"):
    print("held", flush=True)
    sys.stdin.read()
"""
STATE = StackState(pid=1, url="http://127.0.0.1:8800", key="nexus-secret", ports={"nats": 4222})


@pytest.fixture
def data(tmp_path: Path) -> DataDir:
    data = DataDir(tmp_path / "nexus")
    data.prepare()
    return data


@pytest.fixture
def other(data: DataDir):
    """Another process that holds the directory."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(data.root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    yield holder
    holder.kill()
    holder.wait()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_second_stack_is_rejected_with_the_holder_of_the_directory(data: DataDir, other: subprocess.Popen[str]):
    """Pid and URL of the first one, and what to do."""
    with pytest.raises(ConsoleError) as caught, data.locked("http://127.0.0.1:9999"):
        pytest.fail("locked twice")
    assert str(other.pid) in str(caught.value)
    assert "http://127.0.0.1:1234" in str(caught.value)
    assert "--data-dir" in str(caught.value)
    assert caught.value.exit_code == 1


def test_killed_holder_leaves_no_lock(data: DataDir, other: subprocess.Popen[str]):
    """After SIGKILL of the first the directory is free, whatever files it left."""
    data.save_state(STATE)
    assert data.running() == STATE
    other.kill()
    other.wait()
    assert data.running() is None
    with data.locked("http://127.0.0.1:9999"):
        assert data.is_held()


def test_state_exists_only_while_the_directory_is_locked(data: DataDir):
    """`state.json` lives as long as the stack."""
    with data.locked(STATE.url):
        assert data.running() is None
        data.save_state(STATE)
        assert data.running() == STATE
        assert mode(data.state_file) == 0o600
    assert not data.state_file.exists()
    assert data.running() is None


def test_reading_the_lock_does_not_block_a_start(data: DataDir):
    """`nexus status` in one terminal, `nexus up` in another."""
    for _ in range(50):
        assert not data.is_held()
        with data.locked(STATE.url):
            assert data.is_held()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 1}', '{"surprise": 1}'])
def test_broken_state_counts_as_none(data: DataDir, content: str):
    """A file that cannot be read is no traceback."""
    with data.locked(STATE.url):
        data.state_file.write_text(content)
        assert data.running() is None


def test_key_is_made_once_and_private(data: DataDir):
    """The same key at every start, readable by its owner only."""
    key = data.key()
    assert len(key) > 30
    assert data.key() == key
    assert DataDir(data.root).key() == key
    assert mode(data.key_file) == 0o600
    assert mode(data.root) == 0o700


def test_two_directories_have_two_keys(tmp_path: Path):
    """Nothing is derived from a place or a time."""
    keys = set()
    for name in ("a", "b"):
        data = DataDir(tmp_path / name)
        data.prepare()
        keys.add(data.key())
    assert len(keys) == 2


def test_git_does_not_see_the_directory(data: DataDir):
    """A key is never committed by accident."""
    assert (data.root / ".gitignore").read_text() == "*\n"


def test_unusable_directory_is_a_clear_error(tmp_path: Path):
    """A file where the folder should be."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ConsoleError, match="--data-dir"):
        DataDir(tmp_path / "file").prepare()


def test_lock_file_names_its_holder(data: DataDir):
    """For an operator who reads the file."""
    with data.locked(STATE.url):
        wanted = {"pid": os.getpid(), "url": STATE.url, "identity": process_identity(os.getpid())}
        assert json.loads(data.lock_file.read_text()) == wanted


def test_key_is_not_in_the_repr():
    """A state in a log line keeps its secret."""
    assert "nexus-secret" not in repr(STATE)
