"""The commands of `nexus` as a reference page, from the typer app."""

from __future__ import annotations

import re
from typing import Any

import typer

from cli.app import COMMANDS, app
from docs.generator.markdown import NOTICE, code, table

VALUES = {"integer range": "N", "integer": "N", "float range": "SECONDS", "float": "SECONDS", "text": "TEXT"}
"""How the value of an option is shown, by the type that typer gives it."""
INTRODUCTION = """
`nexus --help` lists the commands, `nexus up --help` the options of one of them. After `make up` the command is `.venv/bin/nexus`; in
containers it is `docker compose exec gateway nexus`. [Call models from the terminal](../how-to/call-models.md#from-the-terminal)
says how a command finds its gateway.

"""


def page() -> str:
    """Return docs/reference/cli.md."""
    root: Any = typer.main.get_command(app)
    rows = [(f"[`nexus {name}`](#{anchor(name)})", summary) for name, (_, summary) in COMMANDS.items()]
    parts = [
        "# Commands\n\n",
        NOTICE,
        INTRODUCTION,
        table(["command", "does"], rows),
    ]
    for name in COMMANDS:
        parts += described(("nexus", name), root.commands[name], level=2)
    return "".join(parts)


def anchor(name: str) -> str:
    """Return the anchor of a command's heading."""
    return f"nexus-{name}"


def described(path: tuple[str, ...], command: Any, *, level: int) -> list[str]:
    """Return the section of a command, and of the commands below it."""
    parts = [f"\n{'#' * level} {' '.join(path)}\n\n", f"{paragraphs(command.help)}\n"]
    children = getattr(command, "commands", {})
    if not children or command.params:
        parts.append(f"\n```text\n{usage(path, command)}\n```\n")
    options = [one for one in command.params if not one.hidden]
    if options:
        parts += ["\n", table(["argument or option", "meaning"], [row(one) for one in options])]
    for name, child in children.items():
        parts += described((*path, name), child, level=level + 1)
    return parts


def paragraphs(text: str | None) -> str:
    """Return a command's help with one line per paragraph."""
    return "\n\n".join(" ".join(part.split()) for part in re.split(r"\n\s*\n", text or ""))


def usage(path: tuple[str, ...], command: Any) -> str:
    """Return the line that shows how a command is called."""
    words = [metavar(one) for one in command.params if one.param_type_name == "argument"]
    if any(one.param_type_name == "option" for one in command.params):
        words.insert(0, "[OPTIONS]")
    if getattr(command, "commands", {}):
        words.append("[COMMAND]")
    return " ".join([*path, *words])


def metavar(argument: Any) -> str:
    """Return an argument as the usage line shows it."""
    name = argument.metavar or argument.name.upper()
    several = "..." if argument.nargs == -1 and not name.endswith("...") else ""
    return f"{name}{several}" if argument.required or name.startswith("[") else f"[{name}]{several}"


def row(one: Any) -> tuple[str, str]:
    """Return an argument or option, and what it means."""
    if one.param_type_name == "argument":
        return code(metavar(one)), one.help or ""
    names = ", ".join([*one.opts, *one.secondary_opts])
    value = "" if one.is_flag else f" {one.metavar or VALUES.get(one.type.name, one.type.name.upper())}"
    return code(names + value), one.help or ""
