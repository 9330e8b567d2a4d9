"""The requirements of adapters, and how a worker checks them."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

from schemas.jobs import Capability
from workers.adapter_kit import requirements
from workers.adapter_kit.requirements import AUDIO_CODECS, OPTIONAL_PILLOW, PILLOW, Library, Program
from workers.backends.base import Backend, BackendConfig, load_adapters, make_backend

ROOT = Path(__file__).parents[3]
NEEDS_OPTIONS = {"command": {"command": "espeak-ng"}}
"""Adapters that cannot be made from a URL alone."""


def source_of(module: str) -> Path | None:
    """Return the file of a module of this project; None for other modules."""
    base = ROOT / module.replace(".", "/")
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.exists()), None)


def late_imports(module: str) -> set[str]:
    """Return the libraries that a module, and the workers' modules that it imports, import inside functions."""
    waiting, seen, late = [module], set[str](), set[str]()
    while waiting:
        name = waiting.pop()
        path = source_of(name)
        if name in seen or path is None:
            continue
        seen.add(name)
        tree = ast.parse(path.read_text())
        late |= {one for function in ast.walk(tree) for one in imported_within(function)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("workers."):
                waiting += [node.module, *(f"{node.module}.{one.name}" for one in node.names)]
    return late - set(sys.stdlib_module_names) - {"workers", "schemas"}


def imported_within(function: ast.AST) -> set[str]:
    found: set[str] = set()
    if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
        for node in ast.walk(function):
            if isinstance(node, ast.Import):
                found |= {name.name.partition(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.partition(".")[0])
    return found


def made(kind: str) -> Backend:
    options = NEEDS_OPTIONS.get(kind, {})
    try:
        return make_backend(kind, BackendConfig(url="http://127.0.0.1:1", options=options))
    except ValueError:  # it takes no URL
        return make_backend(kind, BackendConfig(options=options))


@pytest.mark.parametrize("kind", sorted(load_adapters()))
def test_every_adapter_requires_what_it_imports_late(kind: str) -> None:
    """A library that is imported inside a function is a requirement of the adapters that use it, and of no other."""
    late = late_imports(load_adapters()[kind].__module__)
    if "socketio" in late:
        late.discard("aiohttp")  # comes with it
    assert {one.module for one in made(kind).requirements() if isinstance(one, Library)} == late


def test_a_missing_library_is_one_sentence_with_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    problem = PILLOW.problem()
    assert problem is not None
    assert problem.startswith(
        "Pillow is not installed; the worker needs it for picture formats, sizes and masks. Install"
    )
    assert re.search(r"Install it with: \S+ .*images.*\.$", problem)
    monkeypatch.undo()
    assert PILLOW.problem() is None


def test_a_library_that_is_broken_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package without its shared object counts as missing, until it can be imported; no restart is needed."""
    monkeypatch.syspath_prepend(str(tmp_path))
    library = Library("nexus_test_broken", "Broken", "this test", "images")
    assert "is not installed" in (library.problem() or "")
    package = tmp_path / "nexus_test_broken.py"
    package.write_text("raise OSError('libx.so.3: cannot open shared object file')")
    assert "cannot be imported (OSError: libx.so.3" in (library.problem() or "")
    package.write_text("there = True\n")
    assert library.problem() is None


def test_a_missing_program_says_what_to_do(tmp_path: Path) -> None:
    program = Program(str(tmp_path / "speak"), "correct the option command")
    assert program.problem() == (
        f"There is no program '{tmp_path / 'speak'}' on this machine. Install it, or correct the option command."
    )
    (tmp_path / "speak").write_text("#!/bin/sh\n")
    (tmp_path / "speak").chmod(0o755)
    assert program.problem() is None


def test_what_only_some_requests_need_is_optional() -> None:
    """A worker of a chat server reports no missing codecs."""
    assert AUDIO_CODECS.optional
    assert AUDIO_CODECS.capabilities == (Capability.SPEECH,)
    assert OPTIONAL_PILLOW.optional
    assert not PILLOW.optional


def test_make_up_and_the_image_of_workers_install_all_of_it() -> None:
    """The README's two commands and deploy/Dockerfile install every extra."""
    extras = {one.extra for one in vars(requirements).values() if isinstance(one, Library)}
    assert extras == {"audio", "images"}
    makefile = (ROOT / "Makefile").read_text()
    recipe = makefile.partition("$(VENV)/.for-up:")[2].partition("\n\n")[0]
    dockerfile = (ROOT / "deploy" / "Dockerfile").read_text()
    image = dockerfile.partition("AS worker-libraries")[2].partition("FROM")[0]
    for extra in extras:
        assert f"--extra {extra}" in recipe
        assert f"--extra {extra}" in image
    assert "$(VENV)/.for-test: $(VENV)/.for-up" in makefile
