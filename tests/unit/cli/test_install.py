"""The output of an installation, and of a failed one."""

from __future__ import annotations

import os
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cli.stack.ports import free_port

SCRIPT = Path(__file__).parents[3] / "deploy" / "install.py"
NOWHERE = f"http://127.0.0.1:{free_port()}/simple/"


def command(code: str, *options: str) -> list[str]:
    return [sys.executable, str(SCRIPT), "--mb", "1", *options, "some models", "--", sys.executable, "-c", code]


def install(code: str, *options: str) -> tuple[int, str]:
    """With an installer that runs this code, its output in a pipe."""
    done = subprocess.run(command(code, *options), capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == ""
    return done.returncode, done.stderr


def test_a_log_says_what_is_downloaded_and_leaves_the_list_out() -> None:
    """One line for each large file as it comes; not a hundred with every package."""
    says = "import sys; print('Downloading x (88.6MiB)\\n + a==1\\n + b==2\\nInstalled 2 packages', file=sys.stderr)"
    code, output = install(says, "--step", "2 of 3")
    assert code == 0
    assert "==> Installing some models (step 2 of 3, up to 1 MB to download)\n" in output
    assert "Downloading x (88.6MiB)" in output
    assert "==1" not in output
    assert "done in" in output


def test_a_missing_network_is_explained() -> None:
    """With the host, and what to do; the installer's own code is kept."""
    code, output = install("import sys; sys.exit(2)", "--index", NOWHERE)
    assert code == 2
    assert "Installing some models failed: 127.0.0.1 cannot be reached" in output
    assert "HTTPS_PROXY" in output
    assert "it goes on where it stopped" in output


def test_ctrl_c_explains_that_nothing_is_lost() -> None:
    """The terminal sends it to the installer too."""
    code = "import time, sys; print('Downloading x', file=sys.stderr, flush=True); time.sleep(60)"
    with subprocess.Popen(
        command(code), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stderr is not None
        while "Downloading" not in process.stderr.readline():
            pass
        os.killpg(process.pid, signal.SIGINT)
        output = process.stderr.read()
    assert process.returncode == 130
    assert output.endswith("Stopped. Run the same command again: it goes on where it stopped.\n")


@pytest.fixture
def script() -> dict[str, Any]:
    """Its functions."""
    return runpy.run_path(str(SCRIPT))


def test_a_full_disk_is_named(script: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Beforehand as a note, for less may do; as the reason where the installation failed."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=90_000_000))
    places = [tmp_path / "not" / "there", tmp_path]
    assert "90 MB are free" in script["tight_space"](places, 460)
    assert "1380 MB are needed" in script["tight_space"](places, 460)
    assert script["tight_space"](places, 25) == ""
    script["why"].__globals__["unreachable"] = lambda _: ""
    assert "the disk is full" in script["why"](places, "http://x", 460)
    assert "installer's own words" in script["why"](places, "http://x", 25)


def test_every_installation_of_the_makefile_goes_this_way() -> None:
    """None is silent."""
    makefile = (SCRIPT.parents[1] / "Makefile").read_text()
    rules = [rule for rule in makefile.split("\n\n") if rule.lstrip("#").startswith(("$(VENV)/", " The installer"))]
    assert len(rules) == 4
    assert all(rule.count("$(INSTALL)") == 1 for rule in rules)
    assert [line for line in makefile.splitlines() if "@$(SYNC)" in line] == []
