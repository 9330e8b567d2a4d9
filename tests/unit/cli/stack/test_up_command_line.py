"""The command that `nexus up` prints for pasting, and its errors for invalid settings."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cli.errors import ConsoleError
from cli.serve import read_settings
from cli.stack.runner import own_command


def test_the_absolute_command_works_in_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`.venv/bin/nexus` is for the folder of the checkout alone."""
    program = Path(sys.executable).parent / "nexus"
    monkeypatch.setenv("PATH", os.defpath)
    monkeypatch.chdir(program.parent.parent)
    assert own_command() == "bin/nexus"
    result = subprocess.run([own_command(anywhere=True), "--version"], cwd=tmp_path, capture_output=True, check=True)
    assert result.stdout


def test_an_invalid_setting_is_named_without_library_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """pydantic puts `Value error, ` before them."""
    from backbone.settings import GatewaySettings

    monkeypatch.setenv("PUBLIC_ROUTES", "nonsense")
    with pytest.raises(
        ConsoleError, match=r"^PUBLIC_ROUTES \(in the environment\) is wrong: contains 'nonsense'; allowed are"
    ):
        read_settings(GatewaySettings)
