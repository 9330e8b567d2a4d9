"""`nexus audit`: who did what to what, from where, with which result."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlencode

import typer

from cli import options
from cli.gateway_client import ApiClient

if TYPE_CHECKING:
    from cli.tables import RenderableType

PATH = "/v1/audit"
COLUMNS = ("who", "action", "on", "from", "result", "changes")
WIDE = 160
"""Columns of a terminal that shows an event in one line."""


@options.gateway_command
def audit(
    api: ApiClient,
    action: Annotated[
        list[str] | None,
        typer.Argument(metavar="[ACTION…]", help="Actions, such as key.create or 'key.*'. Default: all."),
    ] = None,
    *,
    start: Annotated[str, typer.Option(help="Beginning: 2026-11-01, or Unix seconds.")] = "",
    end: Annotated[str, typer.Option(help="End, exclusive.")] = "",
    where: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Only this team, key, target, address, result, …; repeatable."),
    ] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=1000, help="Most events to list.")] = 50,
    export: Annotated[bool, typer.Option("--export", help="Print all events as JSON lines, oldest first.")] = False,
    after: Annotated[
        int | None, typer.Option(min=0, help="With --export: begin behind the event with this `sequence`.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Show who did what, newest first."""
    query = [("start", start), ("end", end), *(("action", one) for one in action or ())]
    query = [pair for pair in query if pair[1]] + options.pairs(where, "--where")
    if export:
        behind = [("after", str(after))] if after is not None else []
        with api.download(f"{PATH}/export?" + urlencode(query + behind)) as response:
            for piece in response.parts():
                sys.stdout.buffer.write(piece)
        return
    if after is not None:
        raise typer.BadParameter("--after needs --export")
    answer = api.get(f"{PATH}?" + urlencode([*query, ("limit", str(limit))]))
    if as_json:
        print(json.dumps(answer))
        return
    from cli.tables import Console

    console = Console()
    console.print(render_events(answer, console.width))


def render_events(answer: dict[str, Any], width: int) -> RenderableType:
    """Return a table with a row for each event: in columns, or below each other where `width` has no room for them."""
    from cli.tables import Text, new_table

    if not answer["data"]:
        return Text("There are no such events.")
    is_wide = width >= WIDE
    table = new_table("time", *(COLUMNS if is_wide else ("event",)), ids=True)
    for event in answer["data"]:
        fields = _fields(event)
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(event["created_at"]))
        table.add_row(at, *(map(Text, fields.values()) if is_wide else [Text(_stacked(fields))]))
    if answer["has_more"]:
        table.caption = "There are more events: use --limit, --export, or filters."
    return table


def _fields(event: dict[str, Any]) -> dict[str, str]:
    """Return the texts of an event, by column."""
    count = f" x{event['count']}" if event["count"] > 1 else ""
    values = (
        _who(event["actor"]),
        event["action"] + count,
        event["target"]["id"] or event["target"]["team"] or "-",
        event["address"] or "-",
        event["error"] or event["result"],
        ", ".join(f"{name}: {_value(change)}" for name, change in event["changes"].items()),
    )
    return dict(zip(COLUMNS, values, strict=True))


def _stacked(fields: dict[str, str]) -> str:
    """Return an event in several lines, none longer than two ids."""
    lines = [f"{fields['action']}: {fields['result']}", f"by {fields['who']}"]
    if fields["on"] != "-":
        lines.append(f"on {fields['on']}")
    lines.append(f"from {fields['from']}")
    return "\n".join(line for line in (*lines, fields["changes"]) if line)


def _who(actor: dict[str, Any]) -> str:
    who = actor["person"] or actor["key"] or str(actor["type"]).replace("_", " ")
    return f"{actor['team']} {who}" if actor["team"] else who


def _value(change: dict[str, Any]) -> str:
    old, new = (json.dumps(change[side], ensure_ascii=False) for side in ("old", "new"))
    return new if old == "null" else f"{old} → {new}"
