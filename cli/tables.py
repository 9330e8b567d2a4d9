"""Tables and colored words for a terminal. Only what prints one imports this: rich takes a tenth of a second."""

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


def styled_state(word: str) -> Text:
    """A state in its colour."""
    return Text(word, style=STATE_STYLES.get(word, ""))


def new_table(*columns: str, ids: bool = False) -> Table:
    """Columns without lines; wide cells are folded. `ids`: the first column's are not, since they are copied."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
    for column in columns:
        table.add_column(column, overflow="fold")
    table.columns[0].no_wrap = ids
    return table
