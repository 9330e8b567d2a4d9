"""The adapters as a reference page, from the docstrings of their modules."""

from __future__ import annotations

import inspect
import sys

from docs.generator.markdown import NOTICE, table
from workers.backends.base import Backend, load_adapters

INTRODUCTION = """
`nexus worker --backend NAME` runs a worker with one of these adapters. Their options are `--option NAME=VALUE`, or `WORKER_BACKEND_OPTIONS`.
[Write an adapter](../how-to/adapters.md) says how to add one.

"""


def page() -> str:
    """Return docs/reference/adapters.md."""
    ours = {name: kind for name, kind in sorted(load_adapters().items()) if kind.__module__.startswith("workers.")}
    rows = [(f"[`{name}`](#{name})", _docstring(kind).partition("\n\n")[0]) for name, kind in ours.items()]
    sections = [f"\n## {name}\n\n{_docstring(kind)}\n" for name, kind in ours.items()]
    return "".join(["# Adapters\n\n", NOTICE, INTRODUCTION, table(["adapter", "serves"], rows), *sections])


def _docstring(kind: type[Backend]) -> str:
    text = inspect.getdoc(sys.modules[kind.__module__])
    assert text, f"{kind.__module__} has no docstring"
    return text.rstrip()
