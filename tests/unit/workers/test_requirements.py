"""What adapters say that they need, and what a worker makes of it."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

from schemas.jobs import Capability
from workers.adapter_kit import requirements
from workers.adapter_kit.requirements import AUDIO_CODECS, OPTIONAL_PILLOW, PILLOW, Library, Program
from workers.backends.base import BackendConfig, load_adapters, make_backend

ROOT = Path(__file__).parents[3]
LAZY = {"av", "PIL", "aiohttp", "socketio"}
"""What adapters import where they use it, since not every worker has it."""
HELPERS = {"audio": "av", "image_formats": "PIL", "comfyui_server": "aiohttp", "invokeai_events": "socketio"}
"""Modules that import such a library, by the library that their users must name."""


def imports_within_functions(path: Path) -> set[str]:
    """The libraries that a module imports somewhere else than at its top."""
    tree = ast.parse(path.read_text())
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for inner in ast.walk(node):
                if isinstance(inner, ast.Import):
                    found |= {name.name.partition(".")[0] for name in inner.names}
                elif isinstance(inner, ast.ImportFrom) and inner.module:
                    found.add(inner.module.partition(".")[0])
    return found - set(sys.stdlib_module_names)


def test_every_late_import_is_a_known_one() -> None:
    """A library that is imported first when a request needs it must be somebody's requirement."""
    for path in (ROOT / "workers" / "backends").glob("*.py"):
        late = imports_within_functions(path)
        assert late <= LAZY, f"{path.name} imports {late - LAZY} late: add it to requirements.py and here"
        if late:
            assert path.stem in HELPERS, f"{path.name} imports {late}: which adapters use it?"


@pytest.mark.parametrize(
    ("kind", "options", "modules"),
    [
        ("comfyui", {}, {"aiohttp", "PIL"}),
        ("invokeai", {}, {"socketio", "PIL"}),
        ("sdwebui", {}, {"PIL"}),
        ("piper", {}, {"av"}),
        ("openai", {}, {"av", "PIL"}),
        ("service", {}, {"av", "PIL"}),
        ("echo", {}, {"av", "PIL"}),
        ("command", {"command": "espeak-ng"}, {"av"}),
        ("ollama", {}, set()),
        ("whisper", {}, set()),
    ],
)
def test_every_adapter_says_what_it_needs(kind: str, options: dict[str, str], modules: set[str]) -> None:
    backend = make_backend(kind, BackendConfig(url="" if kind == "service" else "http://127.0.0.1:1", options=options))
    found = {one.module for one in backend.requirements() if isinstance(one, Library)}
    assert found == modules
    assert set(load_adapters()) <= {*("comfyui", "invokeai", "sdwebui", "piper", "openai", "service"),
                                    *("echo", "command", "ollama", "whisper")}  # fmt: skip


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
    """A package without its shared object, say. It counts as soon as it can be imported, without a restart."""
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
    """A worker of a chat server is not troubled for want of codecs."""
    assert AUDIO_CODECS.optional
    assert AUDIO_CODECS.capabilities == (Capability.SPEECH,)
    assert OPTIONAL_PILLOW.optional
    assert not PILLOW.optional


def test_make_up_and_the_image_of_workers_install_all_of_it() -> None:
    """The README's two commands, and deploy/Dockerfile."""
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
