"""backup.sh and restore.sh, as far as they go without Docker."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cli.backup.archive import read_manifest
from tests.servers import ROOT

SCRIPTS = ROOT / "deploy" / "scripts"


def run(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SCRIPTS / script, *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env=os.environ | environment,
    )


@pytest.mark.parametrize(
    ("script", "arguments", "said"),
    [
        ("backup.sh", ["a", "b"], "One NAME at most"),
        ("backup.sh", ["../elsewhere"], "no name of a folder"),
        ("backup.sh", ["--unknown"], "Unknown option"),
        ("restore.sh", [], "Say which backup"),
        ("restore.sh", [".partial"], "no name of a folder"),
    ],
)
def test_wrong_use(script: str, arguments: list[str], said: str) -> None:
    """It is said, with exit code 2, and nothing is done."""
    done = run(script, *arguments)
    assert (done.returncode, said in done.stderr) == (2, True), done


def test_with_the_nexus_of_this_machine(nats_url: str, etcd_url: str, redis_url: str, tmp_path: Path) -> None:
    """A folder is made and verified; one that is damaged is not restored; one that is there is not replaced."""
    nexus = tmp_path / "bin" / "nexus"
    nexus.parent.mkdir()
    nexus.write_text(f'#!/bin/sh\nPYTHONPATH="{ROOT}" exec "{sys.executable}" -m cli.main "$@"\n')
    nexus.chmod(0o755)
    servers = {"NATS_URL": nats_url, "ETCD_URL": etcd_url, "REDIS_URL": redis_url}
    servers["PATH"] = f"{nexus.parent}{os.pathsep}{os.environ['PATH']}"
    done = run("backup.sh", "--local", "--dir", str(tmp_path), "one", "--", "--only", "etcd,redis", **servers)
    assert done.returncode == 0, done
    assert "is complete" in done.stderr
    assert [part.name for part in read_manifest(tmp_path / "one").parts] == ["etcd", "redis"]
    assert run("backup.sh", "--local", "--dir", str(tmp_path), "one", **servers).returncode == 1
    (tmp_path / "one" / "redis.jsonl.gz").write_bytes(b"")
    done = run("restore.sh", "--local", "--dir", str(tmp_path), "one", **servers)
    assert (done.returncode, "0 bytes instead of" in done.stderr) == (1, True), done
