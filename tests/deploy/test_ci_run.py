"""`.ci/run` where an engine answers, where one is brought up, and where none can be: what is run, what is said, what is left."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.servers import ROOT

NOTE = '#!/usr/bin/env bash\necho "$(basename "$0") $* ${NEXUS_REQUIRE_DOCKER:-}" >> "$NOTES"\n'


class Checkout:
    """The scripts, in a folder of their own, with commands that only note that they were called."""

    def __init__(self, folder: Path) -> None:
        self.tree, self.bin, self.notes = folder / "tree", folder / "bin", folder / "notes"
        shutil.copytree(ROOT / ".ci", self.tree / ".ci")
        self.bin.mkdir()
        self.notes.touch()
        self.command(self.bin / "make")
        self.command(self.bin / "chromium")  # else one would be installed

    def command(self, path: Path, *more: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(NOTE + "\n".join(more) + "\n")
        path.chmod(0o755)

    def tools(self, *more: str) -> None:
        """What brings an engine up here."""
        for name in ("engine.sh", "images.sh"):
            self.command(self.tree.parent / "shared/docker" / name, *more)

    def run(self) -> tuple[int, str, list[str]]:
        environment = os.environ | {"PATH": f"{self.bin}:{os.environ['PATH']}", "NOTES": str(self.notes)}
        environment.pop("NEXUS_REQUIRE_DOCKER", None)
        ran = subprocess.run(
            [self.tree / ".ci/run"], env=environment, capture_output=True, text=True, timeout=30, check=False
        )
        return ran.returncode, ran.stdout, [line.strip() for line in self.notes.read_text().splitlines()]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def makes(notes: list[str]) -> list[str]:
    return [note for note in notes if note.startswith("make ")]


def test_an_engine_answers(checkout: Checkout) -> None:
    """It is used, tests of containers may not be skipped, and the engine is left as it is."""
    checkout.command(checkout.bin / "docker")
    checkout.tools()
    code, out, notes = checkout.run()
    assert code == 0
    assert makes(notes) == ["make check 1", "make test-containers 1", "make bench-gate 1", "make test 1"]
    assert "Without containers" not in out
    assert not [note for note in notes if note.startswith("engine.sh")]


def test_no_engine(checkout: Checkout) -> None:
    """It is said why, and everything else runs."""
    checkout.command(checkout.bin / "docker", "exit 1")
    code, out, notes = checkout.run()
    assert code == 0
    assert makes(notes) == ["make check", "make bench-gate", "make test"]
    assert "==> Without containers: no Docker engine answers, and nothing here brings one up" in out


@pytest.mark.skipif(os.getuid() != 0, reason="only root brings up an engine")
@pytest.mark.parametrize("tests", [0, 2], ids=["pass", "fail"])
def test_an_engine_is_brought_up(checkout: Checkout, tests: int) -> None:
    """It is used, and ended again whether tests pass or fail; the result is the tests'."""
    checkout.command(checkout.bin / "docker", '[ "$1" != info ]')
    checkout.command(checkout.bin / "make", f'[ "$1" != test ] || exit {tests}')
    checkout.tools()
    code, _, notes = checkout.run()
    assert code == tests
    assert makes(notes) == ["make check", "make test-containers 1", "make bench-gate 1", "make test 1"]
    assert notes[-1] == "engine.sh down 1"


@pytest.mark.skipif(os.getuid() != 0, reason="only root brings up an engine")
def test_an_engine_that_does_not_come_up(checkout: Checkout) -> None:
    """Its last words are shown, what there is of it is ended, and everything else runs."""
    checkout.command(checkout.bin / "docker", '[ "$1" != info ]')
    checkout.tools('[ "$1" != up ] || { echo "no room left"; exit 1; }')
    code, out, notes = checkout.run()
    assert code == 0
    assert "==> Without containers: no room left" in out
    assert makes(notes) == ["make check", "make bench-gate", "make test"]
    assert "engine.sh down" in notes
