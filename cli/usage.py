"""`nexus usage`: what teams, keys and models have used."""

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

COLUMNS = (
    ("requests", "requests"),
    ("input_tokens", "tokens in"),
    ("output_tokens", "out"),
    ("images", "images"),
    ("audio_seconds", "audio s"),
    ("characters", "characters"),
    ("slot_seconds", "slot s"),
)
"""Measures and their titles. A column without a number but 0 is left out, behind the first."""


@options.gateway_command
def usage(
    api: ApiClient,
    by: Annotated[
        str, typer.Option(help="What to group by, separated by commas: team, key, model, worker, …")
    ] = "model",
    *,
    start: Annotated[str, typer.Option(help="Beginning: 2026-11-01, or Unix seconds. Default: 30 days ago.")] = "",
    end: Annotated[str, typer.Option(help="End, exclusive. Default: now.")] = "",
    bucket: Annotated[str, typer.Option(help="Interval: hour, day or month. Default: one sum.")] = "",
    where: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Count only this team, key, model, …; repeatable.")
    ] = None,
    csv: Annotated[bool, typer.Option("--csv", help="Print a table for spreadsheets.")] = False,
    as_json: options.Json = False,
) -> None:
    """Show what was used, and what it cost, from the ledger."""
    query = [("group_by", by), ("start", start), ("end", end), ("bucket", bucket)]
    path = "/v1/usage?" + urlencode([pair for pair in query if pair[1]] + options.pairs(where, "--where"))
    if csv:
        with api.download(path + "&format=csv&limit=10000") as response:
            for piece in response.parts():
                sys.stdout.buffer.write(piece)
        return
    answer = api.get(path)
    if as_json:
        print(json.dumps(answer))
        return
    from cli.tables import Console

    Console().print(render_usage(answer))


def render_usage(answer: dict[str, Any]) -> RenderableType:
    """Return a table with a line for each group."""
    from cli.tables import Text, new_table

    rows = answer["data"]
    if not rows:
        return Text("Nothing was used in this time.")
    columns = [(name, title) for name, title in COLUMNS if name == "requests" or any(row[name] for row in rows)]
    costs = any(row["cost"] for row in rows)
    interval = ["start"] if answer["bucket"] else []
    table = new_table(*interval, *answer["group_by"], *(title for _, title in columns), *(["cost"] if costs else []))
    for row in rows:
        table.add_row(
            *(time.strftime("%Y-%m-%d %H:%M", time.gmtime(row[name])) for name in interval),
            *(Text(str(row[name])) for name in answer["group_by"]),
            *(f"{row[name]:,.0f}" for name, _ in columns),
            *([_money(row["cost"])] if costs else []),
        )
    if answer["has_more"]:
        table.caption = "There are more rows: use --csv, or a shorter time."
    return table


def _money(cost: dict[str, Any] | None) -> str:
    return "-" if cost is None else f"{cost['value']:,.4f} {cost['currency']}"
