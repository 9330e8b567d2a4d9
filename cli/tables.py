"""Tables and colored states for a terminal. Import it only to print one: rich takes a tenth of a second to import."""

from __future__ import annotations

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

__all__ = ["Console", "Group", "Live", "RenderableType", "Table", "Text", "new_table", "styled_state"]

STATE_STYLES = {
    "ready": "green",
    "loaded": "green",
    "loading": "yellow",
    "ok": "green",
    "degraded": "yellow",
    "draining": "yellow",
    "unhealthy": "red",
    "unavailable": "red",
    "down": "red",
}


def styled_state(state: str) -> Text:
    """Return a state in its color."""
    return Text(state, style=STATE_STYLES.get(state, ""))


def new_table(*columns: str, ids: bool = False) -> Table:
    """Return a table without lines. Wide cells are folded, except in a first column of `ids`, which users copy."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
    for column in columns:
        table.add_column(column, overflow="fold")
    table.columns[0].no_wrap = ids
    return table
