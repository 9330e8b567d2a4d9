"""Installation hints: each names this project and one of its extras."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from gateway.console.files import APP
from schemas.installation import DISTRIBUTION, install_hint

ROOT = Path(__file__).parents[3]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = set(PROJECT["optional-dependencies"])
KINDS = {".py", ".md", ".sh", ".toml", ".yml", ".yaml", ".example", ".lock", ".txt"}
SKIPPED = {"tests", ".venv", ".git", ".nexus", ".runtime", "build", "dist", "node_modules"}

REQUIREMENT = re.compile(r"(?<![\w./-])(nexus[a-z.-]*)\[([\w, -]+)\]")
"""`NAME[EXTRA]` of anything that is called like Nexus."""
INSTALL = re.compile(r"(?:pip|uv add|uvx|pipx)\s+(?:install\s+)(?:-\S+\s+)*['\"]?(nexus[\w.-]*)")
CALL = re.compile(r"install_hint\(\s*['\"]([\w-]+)['\"]")
OWN = {DISTRIBUTION, "nexus-teller"}
"""Ours, and the package that docs/how-to/adapters.md has for an example."""


def texts() -> list[tuple[str, str]]:
    """Everything a user may read a hint in, by path: documents, code, scripts, image files, workflows."""
    found = []
    for path in sorted(ROOT.rglob("*")):
        inside = path.relative_to(ROOT)
        if SKIPPED & set(inside.parts) or not path.is_file():
            continue
        if path.suffix in KINDS or path.name.startswith(("Dockerfile", "Makefile")):
            found.append((str(inside), path.read_text()))
    return found


def test_every_hint_names_this_project_and_an_extra_that_it_has() -> None:
    """A hint with another name would install somebody else's package."""
    seen = 0
    for path, text in texts():
        for name, extras in REQUIREMENT.findall(text):
            seen += 1
            assert name == DISTRIBUTION, f"{path}: {name}[{extras}]"
            assert {one.strip() for one in extras.split(",")} <= EXTRAS, f"{path}: {name}[{extras}]"
        for name in INSTALL.findall(text):
            assert name.rstrip(".") in OWN, f"{path}: {name}"
        for extra in CALL.findall(text):
            seen += 1
            assert extra in EXTRAS, f"{path}: {extra}"
    assert seen > 10


def test_every_local_model_names_an_extra_that_brings_it() -> None:
    from cli.embedded import embeddings_server, llama_server, piper_server, whisper_server

    assert {module.EXTRA for module in (embeddings_server, llama_server, piper_server, whisper_server)} < EXTRAS


def test_the_name_is_the_projects() -> None:
    assert PROJECT["name"] == DISTRIBUTION


@pytest.mark.parametrize("extra", sorted(EXTRAS))
def test_a_hint_says_what_works_where_nexus_is(tmp_path: Path, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed wheel is known by its name; a checkout is not in any index under any name."""
    assert install_hint(extra, tmp_path) == f"pip install '{DISTRIBUTION}[{extra}]'"
    (tmp_path / "pyproject.toml").touch()
    assert install_hint(extra, tmp_path) == f"pip install -e '.[{extra}]' (in Nexus's folder)"
    uv = tmp_path / ".venv" / "bin" / "uv"
    uv.parent.mkdir(parents=True)
    uv.touch()
    assert install_hint(extra, tmp_path).startswith("pip install -e"), "that environment is not this process's"
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    assert install_hint(extra, tmp_path) == f".venv/bin/uv sync --frozen --inexact --extra {extra} (in Nexus's folder)"


def test_the_hint_of_this_checkout_runs() -> None:
    """As it is printed, less that nothing is changed by it."""
    hint = install_hint("audio")
    if not hint.startswith(".venv/bin/uv"):
        pytest.skip("this Nexus was not installed by make")
    command = hint.partition(" (")[0].split()
    ran = subprocess.run([*command, "--dry-run", "--offline"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built without a network."""
    out = tmp_path_factory.mktemp("wheel")
    build = "import sys; from hatchling.build import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(out)], cwd=ROOT, check=True, capture_output=True)
    (built,) = out.glob("*.whl")
    return built


def pip(*args: str) -> str:
    """What pip says on both of its outputs. Fails when pip does."""
    command = [sys.executable, "-m", "pip", "--isolated", "--disable-pip-version-check", *args]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout + ran.stderr


def test_the_wheels_hint_installs_this_project_with_the_extra(wheel: Path, tmp_path: Path) -> None:
    """By the words of the hints, from a folder with the wheel: pip finds it by that name, and the wheel has the extras."""
    site = tmp_path / "site"
    hints = [install_hint(extra, tmp_path).partition("pip install ")[2].strip("'") for extra in sorted(EXTRAS)]
    output = pip("install", "--no-index", "--no-deps", "--find-links", str(wheel.parent), "--target", str(site), *hints)
    assert f"Successfully installed {DISTRIBUTION}-{PROJECT['version']}" in output
    hint = (
        "from schemas.installation import install_hint; from backbone.version import VERSION; "
        "print(VERSION, install_hint('audio'))"
    )
    # The installed packages, not this checkout's.
    code = f"import sys; sys.path = [{str(site)!r}, *[p for p in sys.path if p != {str(ROOT)!r}]]; {hint}"
    ran = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == f"{PROJECT['version']} pip install '{DISTRIBUTION}[audio]'"
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(f"{DISTRIBUTION.replace('-', '_')}-{PROJECT['version']}.dist-info/METADATA").decode()
        names = set(archive.namelist())
    # pip names an extra that it does not find only together with dependencies.
    assert set(re.findall(r"^Provides-Extra: (.+)$", metadata, re.MULTILINE)) == EXTRAS
    # The console as it was built here: users of a wheel have no Node.
    assert {path.relative_to(ROOT).as_posix() for path in APP.rglob("*.gz")} <= names


def test_a_name_that_pip_does_not_know_is_refused_offline(wheel: Path) -> None:
    """The other test can fail: by another name the same folder holds nothing."""
    command = [sys.executable, "-m", "pip", "--isolated", "download", "--no-index", "--no-deps"]
    ran = subprocess.run(
        [*command, "--find-links", str(wheel.parent), "nexus[audio]"], capture_output=True, text=True, check=False
    )
    assert ran.returncode != 0
    assert "No matching distribution" in ran.stderr
