"""A model of the catalog as text: its state, and a table of the parameters of each endpoint."""

from __future__ import annotations

import json
from typing import Any

from cli.tables import Group, RenderableType, Table, Text, new_table, styled_state

MAX_CHOICES = 12
"""Choices of a parameter that are listed."""
MAX_EXAMPLE = 80
"""Characters of a value in an example: files are long."""


def render_model(model: dict[str, Any]) -> RenderableType:
    """Return an entry of the catalog as text."""
    parts: list[RenderableType] = [_facts(model)]
    for path, endpoint in model["endpoints"].items():
        parts += [
            Text(f"\n{path}", style="bold"),
            _parameters(endpoint["parameters"]),
            Text(_example(path, endpoint), style="dim"),
        ]
    return Group(*parts)


def _facts(model: dict[str, Any]) -> Table:
    table = new_table("", "")
    table.show_header = False
    table.add_row("model", Text(model["id"]))
    table.add_row("state", styled_state(model["state"]))
    if model.get("alias_for"):
        table.add_row("alias for", Text(", ".join(model["alias_for"])))
        table.add_row("now", Text(model["resolves_to"] or "-"))
    table.add_row("workers", Text(", ".join(_worker(one) for one in model["workers"]) or "-"))
    for name in ("capabilities", "limitations", "differing", "problems"):
        if model.get(name):
            table.add_row(name, Text(", ".join(model[name])))
    if model.get("context_length"):
        table.add_row("context", str(model["context_length"]))
    if modalities := model.get("modalities"):
        table.add_row("modalities", Text(f"{', '.join(modalities['input'])} -> {', '.join(modalities['output'])}"))
    return table


def _worker(worker: dict[str, Any]) -> str:
    return f"{worker['id']} ({worker['backend']}, {worker.get('load', worker['state'])})"


def _parameters(schema: dict[str, Any]) -> Table:
    table = new_table("parameter", "values", "default", "")
    required = schema.get("required", ())
    for name, one in schema["properties"].items():
        label = f"{name} (required)" if name in required else name
        default = json.dumps(one["default"], ensure_ascii=False) if "default" in one else "-"
        table.add_row(Text(label), Text(_values(one)), Text(default), Text(one.get("description", "")))
    return table


def _values(schema: dict[str, Any]) -> str:
    """Return what a parameter may be: its choices, its bounds, or its type."""
    choices = schema.get("enum") or [one["const"] for one in schema.get("oneOf", ()) if "const" in one]
    if choices:
        more = f", … ({len(choices)})" if len(choices) > MAX_CHOICES else ""
        return ", ".join(map(str, choices[:MAX_CHOICES])) + more
    parts = [schema, *schema.get("anyOf", ())]
    if media := next((one["contentMediaType"] for one in parts if "contentMediaType" in one), None):
        return f"file ({media})"
    kind = schema.get("type") or [one["type"] for one in schema.get("anyOf", ()) if "type" in one] or "any"
    kind = " or ".join(kind) if isinstance(kind, list) else str(kind)
    least, most = schema.get("minimum"), schema.get("maximum")
    if least is None and most is None:
        return kind
    return f"{kind}, {'' if least is None else f'from {least} '}{'' if most is None else f'to {most}'}".rstrip()


def _example(path: str, endpoint: dict[str, Any]) -> str:
    """Return the endpoint's example as a command."""
    example = endpoint["example"]
    if endpoint["content_type"] == "application/json":
        return f"echo '{json.dumps(example, ensure_ascii=False)}' | nexus submit {path} - --wait"
    properties = endpoint["parameters"]["properties"]
    fields = [
        f"-F {name}=@FILE" if _is_file(properties.get(name, {})) else f"-F '{name}={str(value)[:MAX_EXAMPLE]}'"
        for name, value in example.items()
    ]
    return f'curl $NEXUS_URL{path} -H "Authorization: Bearer $NEXUS_API_KEY" {" ".join(fields)}'


def _is_file(schema: dict[str, Any]) -> bool:
    return "contentMediaType" in schema or any("contentMediaType" in one for one in schema.get("anyOf", ()))
