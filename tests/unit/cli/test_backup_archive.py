"""Folders of backups are complete or absent, and a restore rejects every changed file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cli.backup import command
from cli.backup.archive import BackupManifest, create_folder, read_lines, read_manifest, write_manifest
from cli.errors import ConsoleError


def quiet(_: str) -> None:
    pass


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Two parts, one of them of lines."""
    with create_folder(tmp_path / "saved", quiet) as folder:
        with folder.lines("etcd.json.gz") as (writer, add):
            add(b'["aliases/a", "b"]')
        folder.add(writer.part("etcd"))
        with folder.file("NEXUS_DONE.snapshot") as writer:
            writer.write(b"abc" * 100_000)
        folder.add(writer.part("NEXUS_DONE", config={"name": "NEXUS_DONE"}, state={"last_seq": 3}))
        write_manifest(folder, BackupManifest("0.1.0", "then", "later", {}, tuple(folder.parts)))
    return tmp_path / "saved"


def verify(folder: Path) -> None:
    command.backup(folder, check=True, quiet=True)


def test_a_complete_backup(saved: Path) -> None:
    """It is verified, comes back as it was, only its owner reads it, and nothing else is beside it."""
    verify(saved)
    manifest = read_manifest(saved)
    part = manifest.part("NEXUS_DONE")
    assert part is not None
    assert (part.bytes, part.kind, part.about["state"]) == (300_000, "streams", {"last_seq": 3})
    assert list(read_lines(saved / "etcd.json.gz")) == [b'["aliases/a", "b"]']
    assert saved.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in saved.iterdir()} == {0o600}
    assert list(saved.parent.iterdir()) == [saved]


def test_a_failed_backup(tmp_path: Path) -> None:
    """Nothing is left."""
    with (
        pytest.raises(RuntimeError),
        create_folder(tmp_path / "saved", quiet) as folder,
        folder.lines("etcd.json.gz") as (_, add),
    ):
        add(b"{}")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_appears_meanwhile(tmp_path: Path) -> None:
    """A folder of another process stays."""
    with pytest.raises(ConsoleError, match="created by another process"), create_folder(tmp_path / "saved", quiet):
        (tmp_path / "saved").mkdir()
    assert list(tmp_path.iterdir()) == [tmp_path / "saved"]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


@pytest.mark.parametrize("name", ["NEXUS_DONE.snapshot", "etcd.json.gz"])
@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (cut, "bytes instead of"),
        (longer, "bytes instead of"),
        (flip, "its SHA-256 differs"),
        (Path.unlink, "No such file"),
    ],
)
def test_a_damaged_part(saved: Path, name: str, damage: Callable[[Path], Any], expected: str) -> None:
    """It is named, with what is wrong; a restore refuses it before it asks any server."""
    damage(saved / name)
    for read in (verify, lambda folder: command.restore(folder, quiet=True)):
        with pytest.raises(ConsoleError) as caught:
            read(saved)
        assert name in str(caught.value)
        assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("manifest", "expected"),
    [
        (None, "an unfinished one"),
        (b"", "damaged"),
        (b'{"format": "nexus-backup", "version": 1, "parts": [', "damaged"),
        (b'{"format": "nexus-backup", "version": 1}', "damaged"),
        (b'{"format": "another"}', "is not the manifest of a Nexus backup"),
        (b"[]", "is not the manifest of a Nexus backup"),
        (b'{"format": "nexus-backup", "version": 2, "nexus": "9.9"}', "Use Nexus 9.9"),
    ],
)
def test_an_invalid_manifest(saved: Path, manifest: bytes | None, expected: str) -> None:
    """It is refused, and says why."""
    if manifest is None:
        (saved / "manifest.json").unlink()
    else:
        (saved / "manifest.json").write_bytes(manifest)
    with pytest.raises(ConsoleError, match=expected):
        command.restore(saved, quiet=True)


def test_a_part_outside_the_folder(saved: Path) -> None:
    """A manifest names nothing outside of its folder."""
    expected = json.loads((saved / "manifest.json").read_text())
    expected["parts"][0]["file"] = "../../etc/passwd"
    (saved / "manifest.json").write_text(json.dumps(expected))
    with pytest.raises(ConsoleError, match="not a valid file name of a part"):
        verify(saved)


def test_parts_that_do_not_exist(saved: Path) -> None:
    """`--only` knows its words."""
    with pytest.raises(ConsoleError, match=r"--only: unknown postgres\. Choose from etcd, redis, streams"):
        command.restore(saved, only="etcd,postgres", quiet=True)
    with pytest.raises(ConsoleError, match="has no data of redis"):
        command.restore(saved, only="redis", quiet=True)
