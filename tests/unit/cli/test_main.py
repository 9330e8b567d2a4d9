"""The `nexus` command's last words, whatever ends it."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
from pydantic_core import SchemaError

from cli.main import main


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SchemaError("Error building: KeyboardInterrupt: ")])
def test_an_interrupt_ends_without_a_traceback(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Also one that comes while Pydantic builds a model."""
    commands = ModuleType("cli.app")

    def app() -> None:
        raise error

    commands.app = app  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cli.app", commands)
    monkeypatch.setattr(sys, "argv", ["nexus", "up"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130
