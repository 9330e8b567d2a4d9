"""Adapters that installed packages bring, by the example in docs/how-to/adapters.md."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "how-to" / "adapters.md").read_text()


def example(kind: str, holding: str) -> str:
    """The block of this kind that holds these words."""
    return next(block for block in re.findall(rf"```{kind}\n(.*?)```", DOCUMENT, re.DOTALL) if holding in block)


MODULE = example("python", 'name = "teller"')
TEST = example("python", "class Double")
PROJECT = tomllib.loads(example("toml", "nexus.backends"))


def install(folder: Path, name: str, entry_points: dict[str, str], **modules: str) -> None:
    """As an installer lays a package out."""
    for module, code in modules.items():
        (folder / f"{module}.py").write_text(code)
    info = folder / f"{name.replace('-', '_')}-1.0.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0.0\n")
    lines = [f"{key} = {value}\n" for key, value in entry_points.items()]
    (info / "entry_points.txt").write_text("".join(["[nexus.backends]\n", *lines]))


def run(folder: Path, *arguments: str) -> tuple[int, str]:
    path = os.pathsep.join((str(ROOT), str(folder)))
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path, "COLUMNS": "400"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def teller(tmp_path: Path) -> Path:
    project = PROJECT["project"]
    install(tmp_path, project["name"], project["entry-points"]["nexus.backends"], nexus_teller=MODULE)
    return tmp_path


def test_the_documented_package_is_found_and_passes_the_documented_test(teller: Path) -> None:
    """Module, test and project as they stand in the document."""
    (teller / "test_teller.py").write_text(TEST)
    options = ("-p", "no:cacheprovider", "-p", "tests.backends.conftest", "-o", "asyncio_mode=auto")
    code, out = run(teller, "pytest", "-q", *options, "test_teller.py")
    assert code == 0, out
    counts = re.compile(r"(\d+) passed, (\d+) skipped")
    documented, counted = counts.search(DOCUMENT), counts.search(out)
    assert documented is not None
    assert counted is not None, out
    assert counted.groups() == documented.groups()


def test_the_example_runs_both_contracts() -> None:
    """All that any adapter, and all that any text adapter, must do."""
    assert {"AdapterContract", "Contract"} <= set(re.findall(r"class \w+\((\w+)\)", TEST))


@pytest.mark.parametrize(
    ("code", "path"), [(MODULE, "workers/backends/teller.py"), (TEST, "tests/backends/test_teller.py")]
)
def test_the_example_is_written_as_the_rest(code: str, path: str) -> None:
    """What is copied from the page passes `make check`."""
    for command in (["check"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--no-cache", "--stdin-filename", path, "-"]
        done = subprocess.run(ruff, cwd=ROOT, input=code, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_wheel_holds_the_module_that_the_entry_names() -> None:
    """What `pip install` would copy is what is found."""
    value = PROJECT["project"]["entry-points"]["nexus.backends"]["teller"]
    assert PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"] == [f"{value}.py"]


def test_an_unknown_kind_names_those_of_packages_too(teller: Path) -> None:
    code, out = run(teller, "cli.main", "worker", "--backend", "storyteller")
    assert code == 2
    assert "there is no backend called 'storyteller'" in out
    assert re.search(r"(?i)there are: .*echo, .*teller", out)


@pytest.mark.parametrize(
    ("entry", "code", "complaint"),
    [
        (
            "broken",
            "import nothing_of_that_name",
            "cannot be imported: ModuleNotFoundError: No module named 'nothing_of",
        ),
        ("broken", "x = 1", "does not exist: the module broken defines no Backend with name = 'broken'"),
        ("teller", "x = 1", "two packages provide an adapter called 'teller'"),
        ("again", MODULE, "cannot be imported: TypeError: two adapters are called 'teller'"),
        ("echo", "x = 1", "has the name of an adapter of Nexus; rename it"),
    ],
)
def test_a_package_that_is_wrong_is_an_error_that_names_it(teller: Path, entry: str, code: str, complaint: str) -> None:
    """No adapter vanishes in silence."""
    install(teller, "bad-package", {entry: "broken"}, broken=code)
    status, out = run(teller, "cli.main", "worker", "--backend", "echo")
    assert status == 2
    assert complaint in out
    assert "bad-package" in out
    assert "Traceback" not in out
