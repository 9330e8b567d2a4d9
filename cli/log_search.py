"""Print what all gateways and workers have logged about one request, job or batch."""

from __future__ import annotations

import json
import re
import sys
from typing import Any
from urllib.parse import urlencode

from cli.gateway_client import ApiClient

ID = re.compile(r"(req|job|batch|resp|file)_[A-Za-z0-9_-]{1,60}")
MAX_LINES = 1000


def is_id(text: str) -> bool:
    """Return whether this is an id that logs can be searched for, and not the name of a component."""
    return ID.fullmatch(text) is not None


def show_found(api: ApiClient, found_id: str, limit: int, *, as_json: bool) -> None:
    """Print the lines, oldest first, and on standard error which processes did not answer, or not for the whole time."""
    answer = api.get("/v1/logs?" + urlencode({"id": found_id, "limit": min(max(limit, 1), MAX_LINES)}))
    if as_json:
        print(json.dumps(answer))
        return
    width = max((len(line["process"]) for line in answer["data"]), default=0)
    for line in answer["data"]:
        print(render_line(line, width))
    for note in notes(answer):
        print(f"nexus: {note}", file=sys.stderr)


def render_line(line: dict[str, Any], width: int) -> str:
    """Return a line of text. Control characters, which a worker may have sent, are shown as escapes."""
    fields = " ".join(f"{name}={_value(value)}" for name, value in line["fields"].items())
    return _plain(
        f"{line['timestamp']} {line['process']:<{width}} {line['level']:<7} {line['event']} {fields}".rstrip()
    )


def _value(value: Any) -> str:
    return value if isinstance(value, str) and " " not in value else json.dumps(value, ensure_ascii=False)


def _plain(text: str) -> str:
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def notes(answer: dict[str, Any]) -> list[str]:
    """Return what is missing, as sentences."""
    processes = answer["processes"]
    found = [] if answer["data"] else ["no process has a line about it."]
    for one in processes:
        name = f"{one['kind']} {one['id']}"
        if not one["answered"]:
            found.append(f"{name} did not answer: its lines are missing.")
        elif not one["is_complete"] and not one["lines"]:
            found.append(f"{name} has no line about it; its lines reach back to {one['oldest_at'] or 'now'}.")
    if answer["has_more"]:
        found.append("older lines were left out.")
    answered = sum(one["answered"] for one in processes)
    return [_plain(note) for note in (*found, f"{answered} of {len(processes)} processes answered.")]
