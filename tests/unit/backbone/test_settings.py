"""`.env.example` documents every setting, with its true default."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from backbone.settings import GatewaySettings, WorkerSettings

EXAMPLE = Path(__file__).parents[3] / ".env.example"
COMPOSE = "# --- Docker Compose"
"""From here on: variables of the compose files, which tests/deploy holds against those."""
SETTING = re.compile(r"#([A-Z][A-Z0-9_]*)=(.*)")
CLASSES = (GatewaySettings, WorkerSettings)


def documented() -> dict[str, tuple[str, str]]:
    """Per setting: its shown default, and the comment above it."""
    found: dict[str, tuple[str, str]] = {}
    above = ""
    for line in EXAMPLE.read_text().partition(COMPOSE)[0].splitlines():
        match = SETTING.fullmatch(line)
        if match:
            assert match[1] not in found, f"{match[1]} stands twice"
            found[match[1]] = (match[2], above)
        above = f"{above} {line.removeprefix('# ')}" if above.startswith("# ") and line.startswith("# ") else line
    return found


def defaults() -> dict[str, Any]:
    """Per setting of either class: its default."""
    return {name.upper(): field.get_default() for kind in CLASSES for name, field in kind.model_fields.items()}


def as_text(default: Any) -> str:
    if default is None:
        return ""
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, SecretStr):
        return default.get_secret_value()
    return f"{default:.12g}" if isinstance(default, float) else str(default)


def test_every_setting_is_documented_and_every_documented_one_exists():
    """The names agree both ways."""
    assert set(documented()) == set(defaults())


@pytest.mark.parametrize("name", sorted(defaults()))
def test_default_shown_is_the_default(name: str):
    """What `.env.example` shows is what happens without it."""
    assert documented()[name][0] == as_text(defaults()[name])


@pytest.mark.parametrize("name", sorted(defaults()))
def test_each_setting_has_a_line_of_meaning(name: str):
    """A comment stands right above each setting."""
    meaning = documented()[name][1]
    assert meaning.startswith("# ")
    assert len(meaning) > 10


def test_example_sets_nothing_by_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Copied to `.env` as it is, it changes nothing."""
    for name in defaults():
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    plain = [kind() for kind in CLASSES]
    (tmp_path / ".env").write_text(EXAMPLE.read_text())
    assert [kind() for kind in CLASSES] == plain


def test_taking_the_hash_away_is_valid(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Each shown default can be read back, except an empty key, which is a key that nobody has."""
    for name in defaults():
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text(SETTING.sub(r"\1=\2", EXAMPLE.read_text()))
    for kind in CLASSES:
        settings = kind()
        for name, field in kind.model_fields.items():
            expected = field.get_default()
            assert getattr(settings, name) == (SecretStr("") if expected is None else expected), name
