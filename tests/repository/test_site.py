"""The docs site builds without a warning, and its pages need no other host."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOADED = re.compile(
    r"""<(?:script|img|iframe|link(?=[^>]*rel="(?:stylesheet|icon|preload)"))[^>]*(?:src|href)="(?:https?:)?//"""
)


def build(source: Path, target: Path) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--config-file",
        str(source / "mkdocs.yml"),
        "--site-dir",
        str(target),
    ]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=100, env={"NO_MKDOCS_2_WARNING": "1", "PATH": ""}
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built once."""
    target = tmp_path_factory.mktemp("site")
    done = build(ROOT, target)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


def test_the_site_builds_without_a_warning(site: Path) -> None:
    """Each link and each anchor leads somewhere, and the page of each audience is there."""
    for audience in ("application-developer", "operator", "adapter-author", "contributor"):
        assert (site / "audiences" / audience / "index.html").is_file()


def test_no_page_loads_anything_from_another_host(site: Path) -> None:
    """A reader without internet sees the same; nobody else learns who reads."""
    pages = list(site.rglob("*.html"))
    assert len(pages) > 50
    assert [page for page in pages if LOADED.search(page.read_text())] == []
    assert "fonts.g" not in "".join(page.read_text() for page in pages)


def test_a_link_to_a_missing_heading_fails_the_build(tmp_path: Path) -> None:
    """The strict build is what checks links."""
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    text = (tmp_path / "mkdocs.yml").read_text()
    (tmp_path / "mkdocs.yml").write_text(
        text.partition("\nnav:")[0].replace("hooks:\n  - docs/generator/site_hooks.py\n", "")
    )
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# One\n\n[two](#two)\n")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0
    assert "#two" in done.stdout + done.stderr
