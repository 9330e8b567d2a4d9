"""What every source file must be, on every Python that Nexus runs on."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.servers import ROOT

PACKAGES = ("schemas", "backbone", "gateway", "workers", "cli")
FILES = sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_python_3_13_compiles_every_docstring(file: Path) -> None:
    r"""A docstring that writes `\ud83d` without being raw holds half a character, and Python 3.13 refuses the whole module."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=False) or ""
            assert not any("\ud800" <= letter <= "\udfff" for letter in text), f"write r-quotes around {text[:60]!a}"
