"""`nexus budgets`: what is spent and left of budgets."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from cli import options
from cli.gateway_client import ApiClient

if TYPE_CHECKING:
    from cli.tables import RenderableType

PATH = "/v1/budgets"


@options.gateway_command
def budgets(api: ApiClient, *, as_json: options.Json = False) -> None:
    """Show what is spent and left of the key's and its team's budgets; with an operator's key, of all."""
    rows: list[dict[str, Any]] = []
    after: str | None = ""
    while after is not None:
        answer = api.get(PATH + ("?" + urlencode({"after": after}) if after else ""))
        rows += answer["data"]
        after = answer["next_after"]
    if as_json:
        print(json.dumps({"object": "list", "data": rows}))
        return
    from cli.tables import Console

    Console().print(render_budgets(rows))


def render_budgets(rows: list[dict[str, Any]]) -> RenderableType:
    """Return a table with a line for each budget."""
    from cli.tables import Text, new_table

    if not rows:
        return Text("There are no budgets. Set one: nexus teams set TEAM --budget tokens=5000000/month")
    table = new_table("holder", "unit", "per", "amount", "spent", "reserved", "left", "renews")
    for row in rows:
        table.add_row(
            Text(f"{row['holder']} {row['holder_id']}"),
            Text(row["currency"] or row["unit"]),
            row["period"],
            *(_number(row, name) for name in ("amount", "spent", "reserved", "left")),
            time.strftime("%Y-%m-%d %H:%MZ", time.gmtime(row["renews_at"])),
        )
    return table


def _number(row: dict[str, Any], name: str) -> str:
    return f"{row[name]:,.{0 if row['unit'] == 'tokens' else 2}f}"
