"""GitHub's workflows, and the script that runs the same checks elsewhere: they are what they should be as far as can be told from here."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.servers import ROOT

WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
BIN = Path(sys.executable).parent


def load(path: Path) -> dict[str, Any]:
    return YAML(typ="safe").load(path.read_text())


def steps(path: Path) -> list[str]:
    return [step["run"] for job in load(path)["jobs"].values() for step in job["steps"] if "run" in step]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_is_a_workflow(path: Path) -> None:
    """GitHub would read it: it keeps to the schema of workflows."""
    command: list[str | Path] = [BIN / "check-jsonschema", "--builtin-schema", "vendor.github-workflows", path]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_nothing_in_them_is_unsafe() -> None:
    """No credentials left lying about, no text of strangers in a shell, no more rights than a job needs."""
    command: list[str | Path] = [
        BIN / "zizmor",
        "--offline",
        "--no-progress",
        "--config",
        ROOT / ".github/zizmor.yml",
        *WORKFLOWS,
    ]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_only_what_is_there_is_run(path: Path) -> None:
    """Every `make` target, folder of tests and image target that a workflow names exists."""
    targets = set(re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))
    stages = set(re.findall(r"^FROM \S+ AS (\S+)$", (ROOT / "deploy/Dockerfile").read_text(), re.MULTILINE))
    for run in steps(path):
        assert set(re.findall(r"\bmake ([\w-]+)", run)) <= targets
        missing = [name for name in re.findall(r"\btests/\w+", run) if not (ROOT / name).is_dir()]
        assert missing == []
    for job in load(path)["jobs"].values():
        assert set(job.get("strategy", {}).get("matrix", {}).get("target", [])) <= stages


def test_what_is_run_on_containers_is_there() -> None:
    """`make test-containers` names files; a renamed one would be an error only where Docker runs."""
    named = re.search(r"^CONTAINER_TESTS := ((?:.*\\\n)*.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert named is not None
    files = [name for name in named[1].split() if name != "\\"]
    assert files
    assert [name for name in files if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("script", [".ci/run", ".ci/engine"])
def test_scripts_of_ci(script: str) -> None:
    """They are clean by shellcheck."""
    ran = subprocess.run([BIN / "shellcheck", ROOT / script], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout
