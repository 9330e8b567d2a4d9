"""The output of `nexus up`: a live list on a terminal, elsewhere a plain line for each component."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

NAME_WIDTH = 28


@dataclass(slots=True)
class ProgressRow:
    """The start of one component."""

    title: str
    began: float = field(default_factory=time.monotonic)
    state: str = "starting"
    detail: str = ""
    took: str = ""
    spinner: Spinner = field(default_factory=lambda: Spinner("dots", style="cyan"))

    def end(self, state: str, detail: str) -> None:
        """Note that the component is up or has failed."""
        self.state = state
        self.detail = detail
        self.took = f"{time.monotonic() - self.began:.1f} s"


class StackDisplay:
    """Shows the progress of the start, then messages. A lost terminal is ignored."""

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = out or sys.stdout
        self._console = Console(file=self._out, highlight=False, soft_wrap=True)
        self._rows: dict[str, ProgressRow] = {}
        self._live: Live | None = None
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(console=self._console, get_renderable=self._table, refresh_per_second=10)

    def open(self) -> None:
        """Start showing progress."""
        if self._live is not None:
            self._ignore_lost_terminal(self._live.start)

    def close(self) -> None:
        """Stop showing progress. Components that are up or failed stay on the screen; unfinished ones are removed."""
        self._rows = {name: row for name, row in self._rows.items() if row.state != "starting"}
        if self._live is not None:
            live, self._live = self._live, None
            self._ignore_lost_terminal(live.stop)

    def begin(self, name: str, title: str) -> None:
        """Show that a component is being started."""
        self._rows[name] = ProgressRow(title)

    def up(self, name: str, detail: str = "") -> None:
        """Show that a component is ready."""
        self._end(name, "up", detail)

    def failed(self, name: str, detail: str) -> None:
        """Show that a component could not be started."""
        self._end(name, "failed", detail)

    def _end(self, name: str, state: str, detail: str) -> None:
        row = self._rows[name]
        row.end(state, detail)
        if self._live is None:
            self.print(f"{row.title:<{NAME_WIDTH}} {state} after {row.took}  {row.detail}".rstrip())

    def note(self, text: str) -> None:
        """Print a message with the time of day."""
        self.print(f"{time.strftime('%H:%M:%S')}  {text}")

    def print(self, text: str) -> None:
        """Print lines without wrapping them, so that they can be copied."""
        self._ignore_lost_terminal(lambda: self._console.print(text, markup=False))
        self._ignore_lost_terminal(self._out.flush)

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 2, 0, 0))
        for row in self._rows.values():
            mark = {"up": Text("✓", "green"), "failed": Text("✗", "red")}.get(row.state, row.spinner)
            took = row.took or f"{time.monotonic() - row.began:.1f} s"
            table.add_row(mark, row.title, Text(took, "dim"), Text(row.detail, "dim"))
        return table

    @staticmethod
    def _ignore_lost_terminal(write: Callable[[], object]) -> None:
        """Call `write` and ignore that the terminal may be lost."""
        with contextlib.suppress(OSError, ValueError):
            write()
