"""deploy/console.py: builds when the sources changed, with a Node that will do, and stops nothing where it cannot."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "deploy" / "console.py"
NPM = """#!/bin/sh
echo "$1 $2 $3" >>"$NOTES"
case "$1" in
  ci) mkdir -p node_modules; exit ${NPM_CI:-0} ;;
  run) mkdir -p ../gateway/console/app ;;
esac
"""


class Tree:
    """The script beside sources of a console, with a Node and an npm that only note what they were called for."""

    def __init__(self, folder: Path, node: str = "v22.12.0") -> None:
        self.folder = folder
        (folder / "deploy").mkdir()
        shutil.copy2(SCRIPT, folder / "deploy")
        (folder / "console" / "src").mkdir(parents=True)
        (folder / "console" / "package-lock.json").write_text("{}")
        self.source = folder / "console" / "src" / "main.ts"
        self.source.write_text("1")
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.notes = folder / "notes"
        self.notes.touch()
        self.command("node", f"#!/bin/sh\necho {node}\n")
        self.command("npm", NPM)

    def command(self, name: str, text: str) -> None:
        path = self.bin / name
        path.write_text(text)
        path.chmod(0o755)

    def run(self, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
        env = os.environ | {"PATH": f"{self.bin}:/usr/bin:/bin", "NOTES": str(self.notes), **environment}
        env.pop("UV_PROJECT_ENVIRONMENT", None)
        command = [sys.executable, "-S", str(self.folder / "deploy" / "console.py"), *flags]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=30, check=False)

    def called(self) -> list[str]:
        """What npm was called for since this was last asked."""
        lines = [line.split()[0] for line in self.notes.read_text().splitlines()]
        self.notes.write_text("")
        return lines


def test_it_is_built_once_for_the_same_sources(tmp_path: Path) -> None:
    """Packages are installed again only for another lock file."""
    tree = Tree(tmp_path)
    assert tree.run("--required").returncode == 0
    assert tree.called() == ["ci", "run"]
    assert tree.run("--required").stderr == ""
    assert tree.called() == []
    tree.source.write_text("2")
    assert tree.run().returncode == 0
    assert tree.called() == ["run"]


def test_no_registry_stops_nothing_but_who_requires_the_console(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    ran = tree.run(NPM_CI="1")
    assert ran.returncode == 0
    assert "Can the npm registry be reached?" in ran.stderr
    assert "Nexus works without it. Try again with: make console" in ran.stderr
    assert tree.run("--required", NPM_CI="1").returncode == 1


def test_an_old_node_is_replaced_by_the_wheels(tmp_path: Path) -> None:
    """The command that installs it is run, and where there is none, it is said which version is needed."""
    tree = Tree(tmp_path, node="v18.19.0")
    tree.command("installer", '#!/bin/sh\necho "installer" >>"$NOTES"\nexit 1\n')
    ran = tree.run("--required", "--node", "installer now")
    assert (ran.returncode, tree.called()) == (1, ["installer"])
    assert "Node could not be installed" in ran.stderr
    assert "it needs Node 22.12 or newer" in tree.run("--required").stderr


@pytest.mark.parametrize(
    ("version", "usable"),
    [
        ("v20.18.1", False),
        ("v20.19.0", True),
        ("v21.7.3", False),
        ("v22.11.0", False),
        ("v22.12.0", True),
        ("v26.0.0", True),
    ],
)
def test_versions_of_node(tmp_path: Path, version: str, usable: bool) -> None:
    tree = Tree(tmp_path, version)
    script = runpy.run_path(str(SCRIPT))
    assert script["is_usable"](str(tree.bin / "node")) is usable
