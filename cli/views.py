"""Print what a gateway answers, as a table or as JSON, once or again and again."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cli.errors import ConsoleError
from cli.gateway_client import ApiClient

if TYPE_CHECKING:
    from cli.tables import RenderableType

REFRESH_INTERVAL_S = 1.0
UNWRAPPED_COLUMNS = 1000
"""Width of output whose lines must not be folded."""
Fetch = Callable[[ApiClient], Any]
Render = Callable[[Any], "RenderableType"]


def fetch_list(path: str) -> Fetch:
    """Return a function that reads the list at `path`."""
    return lambda api: api.get(path)


def show(api: ApiClient, fetch: Fetch, render: Render, *, as_json: bool, watch: bool) -> Any:
    """Print the result of `fetch`, with `watch` again and again until Ctrl-C. Returns the last result."""
    data = fetch(api)
    if not watch:
        _print(data, render, as_json=as_json)
        return data
    try:
        if as_json or not sys.stdout.isatty():
            return _watch_lines(api, fetch, render, data, as_json=as_json)
        return _watch_live(api, fetch, render, data)
    except KeyboardInterrupt:
        return data


def _print(data: Any, render: Render, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(data), flush=True)
    else:
        from cli.tables import Console

        view = render(data)
        Console(width=_width(view)).print(view)


def _width(view: RenderableType) -> int | None:
    """Return the width to print with; None is the terminal's. Tables of ids to copy, and pipes, get unfolded lines."""
    from cli.tables import Table

    ids = isinstance(view, Table) and view.columns[0].no_wrap
    return UNWRAPPED_COLUMNS if ids or not sys.stdout.isatty() else None


def _watch_lines(api: ApiClient, fetch: Fetch, render: Render, data: Any, *, as_json: bool) -> Any:
    """Print a whole view each second, for a pipe."""
    while True:
        _print(data, render, as_json=as_json)
        time.sleep(REFRESH_INTERVAL_S)
        data = fetch(api)


def _watch_live(api: ApiClient, fetch: Fetch, render: Render, data: Any) -> Any:
    """Refresh one view on a terminal. An outage of the gateway is shown, and does not end the command."""
    from cli.tables import Live, Text

    with Live(render(data), auto_refresh=False, screen=False) as live:
        while True:
            time.sleep(REFRESH_INTERVAL_S)
            try:
                data = fetch(api)
                live.update(render(data), refresh=True)
            except ConsoleError as error:
                live.update(Text(str(error), style="red"), refresh=True)
