"""The log events as a reference page, from the calls of loggers in the code and the sentences of the terminal's log."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from backbone.terminal_log import SENTENCES
from docs.generator.markdown import NOTICE, code, table

ROOT = Path(__file__).parents[2]
PACKAGES = ("backbone", "gateway", "workers", "cli")
LOGGERS = frozenset({"log", "_log", "logger"})
LEVELS = {
    "debug": "debug",
    "info": "info",
    "warning": "warning",
    "error": "error",
    "exception": "error",
    "critical": "critical",
}
INTRODUCTION = """
Every event that gateways, workers and the console log, with its fields and the module that logs it. The fields `timestamp` and `level`, the
request's id and the process's name come on top. On a terminal an event with a sentence is shown as that sentence.
[Operations](../how-to/operations.md#logs) explains the events that need a reaction.

"""


@dataclass
class Event:
    """One event, over all of its calls."""

    levels: set[str] = field(default_factory=set)
    fields: set[str] = field(default_factory=set)
    modules: set[str] = field(default_factory=set)


def page() -> str:
    """Return docs/reference/log-events.md."""
    rows = [
        (
            code(key),
            ", ".join(sorted(event.levels)),
            ", ".join(code(name) for name in sorted(event.fields)),
            code(SENTENCES.get(key, "")),
            ", ".join(code(module) for module in sorted(event.modules)),
        )
        for key, event in sorted(events().items())
    ]
    header = ("event", "level", "fields", "sentence on a terminal", "module")
    return "".join(["# Log events\n\n", NOTICE, INTRODUCTION, table(header, rows)])


def events() -> dict[str, Event]:
    """Return the events that the code logs under a constant key."""
    found: dict[str, Event] = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            tree, module = ast.parse(path.read_text()), str(path.relative_to(ROOT))
            for call, level in logger_calls(tree):
                for key in keys(call):
                    event = found.setdefault(key, Event())
                    event.levels.add(level)
                    event.fields |= {one.arg for one in call.keywords if one.arg not in (None, "exc_info")}
                    event.modules.add(module)
            for key, fields in direct_lines(tree):
                event = found.setdefault(key, Event())
                event.levels.add("info")
                event.fields |= fields
                event.modules.add(module)
    return found


def direct_lines(tree: ast.Module) -> Iterator[tuple[str, set[str]]]:
    """Yield the event of each call of `log_info`, with the names of the fields that its function sets in dictionaries."""
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        nodes = list(ast.walk(function))
        calls = [node for node in nodes if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "log_info"]
        names = [key for node in nodes if isinstance(node, ast.Dict) for key in node.keys]
        names += [node.slice for node in nodes if isinstance(node, ast.Subscript)]
        fields = {node.value for node in names if isinstance(node, ast.Constant) and isinstance(node.value, str)}
        for call in calls:
            for key in keys(call):
                yield key, fields


def logger_calls(tree: ast.Module) -> Iterator[tuple[ast.Call, str]]:
    """Yield each call of a logger's method, with its level."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        for method in [node.func.body, node.func.orelse] if isinstance(node.func, ast.IfExp) else [node.func]:
            if isinstance(method, ast.Attribute) and method.attr in LEVELS:
                logger = method.value
                name = logger.id if isinstance(logger, ast.Name) else getattr(logger, "attr", "")
                if name in LOGGERS:
                    yield node, LEVELS[method.attr]


def keys(call: ast.Call) -> Iterator[str]:
    """Yield the constant keys that a call may log."""
    first = call.args[0] if call.args else None
    for one in [first.body, first.orelse] if isinstance(first, ast.IfExp) else [first]:
        if isinstance(one, ast.Constant) and isinstance(one.value, str):
            yield one.value
