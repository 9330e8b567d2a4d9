"""Compose files as Compose reads them, as far as tests look: `extends`, `-f` layers, `!reset`, defaults of variables."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from tests.servers import ROOT

VARIABLE = re.compile(r"\$\{(\w+)(?:(:?[-?])((?:[^{}]|\{[^{}]*\})*))?\}")
REPLACED = frozenset({"command", "entrypoint", "test"})
"""Lists that a later file replaces; others grow."""
RESET = object()

Json = Any


@cache
def stack(*names: str) -> dict[str, Json]:
    """Services by name, of these files one upon the other, variables at their defaults. To read only."""
    services: dict[str, Json] = {}
    for name in names:
        path = ROOT / name
        for service, said in _read(path)["services"].items():
            services[service] = _merged(services.get(service, {}), _extended(said, path))
    return _filled(services)


def top(name: str) -> dict[str, Json]:
    """The whole of one file, as it stands."""
    return _read(ROOT / name)


def variables(path: Path) -> dict[str, str]:
    """Variables of one file, and their defaults; those that must be set have an empty one."""
    found: dict[str, str] = {}
    for name, how, default in VARIABLE.findall(re.sub(r"(?m)^\s*#.*$", "", path.read_text())):
        nested = VARIABLE.fullmatch(default)
        text = "" if how.endswith("?") else nested[3] if nested else default
        found.setdefault(name, text or "")
    return found


@cache
def _read(path: Path) -> dict[str, Json]:
    yaml = YAML(typ="safe", pure=True)
    yaml.constructor.add_constructor("!reset", lambda *_: RESET)
    yaml.constructor.add_constructor("!override", lambda load, node: load.construct_sequence(node, deep=True))
    return yaml.load(path.read_text())


def _extended(said: dict[str, Json], path: Path) -> dict[str, Json]:
    said = dict(said)
    where = said.pop("extends", None)
    if where is None:
        return said
    file = (
        path if isinstance(where, str) or "file" not in where else ROOT / where["file"]
    )  # the project's folder, whichever file says it
    service = where if isinstance(where, str) else where["service"]
    return _merged(_extended(_read(file)["services"][service], file), said)


def _merged(old: Json, new: Json, key: str = "") -> Json:
    if new is RESET:
        return [] if isinstance(old, list) else None
    if isinstance(old, dict) and isinstance(new, dict):
        return old | {name: _merged(old.get(name), value, name) for name, value in new.items()}
    if isinstance(old, list) and isinstance(new, list) and key not in REPLACED:
        return old + [one for one in new if one not in old]
    return new


def _filled(value: Json) -> Json:
    if isinstance(value, dict):
        return {name: _filled(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_filled(one) for one in value]
    while isinstance(value, str) and (found := VARIABLE.search(value)):
        value = value.replace(found[0], "" if (found[2] or "").endswith("?") else found[3] or "")
    return value
