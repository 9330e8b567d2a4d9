"""`nexus status`, `workers`, `queues`, `drain`: what an operator asks a running gateway."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer

from cli import options
from cli.errors import ConsoleError
from cli.gateway_client import ApiClient

if TYPE_CHECKING:
    from cli.tables import RenderableType

REFRESH_S = 1.0
WIDE = 1000
"""Columns, where lines are not to be folded."""
Fetch = Callable[[ApiClient], Any]
Render = Callable[[Any], "RenderableType"]


def status(
    url: options.Url = None,
    key: options.Key = None,
    key_file: options.KeyFile = None,
    data_dir: options.Data = None,
    as_json: options.Json = False,
    watch: options.Watch = False,
) -> None:
    """Is everything well: the parts, the workers, the queues."""
    with options.client(url, key, data_dir, key_file) as api:
        seen = show(api, fetch_status, render_status, as_json=as_json, watch=watch)
    if seen["ready"].get("status") == "unavailable":
        raise typer.Exit(1)


def workers(
    url: options.Url = None,
    key: options.Key = None,
    key_file: options.KeyFile = None,
    data_dir: options.Data = None,
    as_json: options.Json = False,
    watch: options.Watch = False,
) -> None:
    """The workers, their slots and their models."""
    with options.client(url, key, data_dir, key_file) as api:
        show(api, fetch_list("/v1/workers"), render_workers, as_json=as_json, watch=watch)


def queues(
    url: options.Url = None,
    key: options.Key = None,
    key_file: options.KeyFile = None,
    data_dir: options.Data = None,
    as_json: options.Json = False,
    watch: options.Watch = False,
) -> None:
    """How many jobs wait, and how many run, per model and lane."""
    with options.client(url, key, data_dir, key_file) as api:
        show(api, fetch_list("/v1/queues"), render_queues, as_json=as_json, watch=watch)


def drain(
    worker: Annotated[str, typer.Argument(help="The worker's id, as `nexus workers` shows it.")],
    url: options.Url = None,
    key: options.Key = None,
    key_file: options.KeyFile = None,
    data_dir: options.Data = None,
    as_json: options.Json = False,
) -> None:
    """Let a worker finish what it runs and take nothing new."""
    with options.client(url, key, data_dir, key_file) as api:
        answer = api.post(f"/v1/workers/{quote(worker, safe='')}/drain")
    if as_json:
        print(json.dumps(answer))
    else:
        print(f"{answer.get('id', worker)}: {answer.get('state', 'draining')}")


def fetch_status(api: ApiClient) -> dict[str, Any]:
    """Readiness, workers and queues together."""
    ready = api.get("/readyz", accept=(503,))
    if not isinstance(ready, dict) or "status" not in ready:
        raise ConsoleError(f"{api.target.url} does not answer like a Nexus gateway")
    seen: dict[str, Any] = {"url": api.target.url, "ready": ready, "workers": [], "queues": []}
    if ready["status"] != "unavailable":
        seen["workers"] = api.get("/v1/workers")["data"]
        seen["queues"] = api.get("/v1/queues")["data"]
    return seen


def fetch_list(path: str) -> Fetch:
    """What is at `path`."""
    return lambda api: api.get(path)


def show(api: ApiClient, fetch: Fetch, render: Render, *, as_json: bool, watch: bool) -> Any:
    """Print what `fetch` gets, once or until Ctrl-C. Returns the last of it."""
    seen = fetch(api)
    if not watch:
        _print(seen, render, as_json=as_json)
        return seen
    try:
        if as_json or not sys.stdout.isatty():
            return _watch_lines(api, fetch, render, seen, as_json=as_json)
        return _watch_live(api, fetch, render, seen)
    except KeyboardInterrupt:
        return seen


def _print(seen: Any, render: Render, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(seen), flush=True)
    else:
        from cli.tables import Console

        view = render(seen)
        Console(width=_width(view)).print(view)


def _width(view: RenderableType) -> int | None:
    """None: the terminal's. Elsewhere, and where there are ids to be copied, a line stays one line."""
    from cli.tables import Table

    ids = isinstance(view, Table) and view.columns[0].no_wrap
    return WIDE if ids or not sys.stdout.isatty() else None


def _watch_lines(api: ApiClient, fetch: Fetch, render: Render, seen: Any, *, as_json: bool) -> Any:
    """For a pipe: a whole view a second."""
    while True:
        _print(seen, render, as_json=as_json)
        time.sleep(REFRESH_S)
        seen = fetch(api)


def _watch_live(api: ApiClient, fetch: Fetch, render: Render, seen: Any) -> Any:
    """For a terminal: one view, kept fresh. An outage is shown, and ends by itself."""
    from cli.tables import Live, Text

    with Live(render(seen), auto_refresh=False, screen=False) as live:
        while True:
            time.sleep(REFRESH_S)
            try:
                seen = fetch(api)
                live.update(render(seen), refresh=True)
            except ConsoleError as error:
                live.update(Text(str(error), style="red"), refresh=True)


def render_status(seen: dict[str, Any]) -> RenderableType:
    """The whole picture on one screen."""
    from cli.tables import Group, Text, new_table, styled_state

    ready = seen["ready"]
    head = Text.assemble(("Nexus ", "bold"), seen["url"], "  ", styled_state(ready["status"]))
    parts = new_table("part", "state", "ms", "")
    for name, part in ready.get("parts", {}).items():
        milliseconds = f"{part['ms']:.1f}" if isinstance(part.get("ms"), int | float) else "-"
        parts.add_row(
            name, styled_state("ok" if part.get("ok") else "down"), milliseconds, Text(part.get("error") or "")
        )
    out: list[RenderableType] = [head, parts]
    if ready["status"] != "unavailable":
        out += [Text(), render_workers({"data": seen["workers"]}), Text(), render_queues({"data": seen["queues"]})]
    return Group(*out)


def render_workers(answer: dict[str, Any]) -> RenderableType:
    """One line a worker."""
    from cli.tables import Text, new_table, styled_state

    rows = answer["data"]
    if not rows:
        return Text("No worker is there. Start one: nexus worker --backend openai --url http://HOST:PORT")
    notes = {row["id"]: "\n".join(_notes(row)) for row in rows}
    loads = {row["id"]: _load(row) for row in rows}
    table = new_table(
        *("worker", "backend", "host", "slots", "state"),
        *(["load"] if any(loads.values()) else []),
        "models",
        *(["notes"] if any(notes.values()) else []),
    )
    for row in rows:
        table.add_row(
            Text(row["id"]),
            Text(row["backend"]),
            Text(f"{row.get('host', '')}:{row.get('pid', '')}"),
            f"{row.get('busy', 0)}/{row.get('slots', 0)}",
            styled_state(row.get("state", "")),
            *([loads[row["id"]]] if any(loads.values()) else []),
            Text(", ".join(one["name"] for one in row.get("models", []) if one["capabilities"] != ["models"])),
            *([Text(notes[row["id"]])] if any(notes.values()) else []),
        )
    return table


def _load(row: dict[str, Any]) -> str:
    """Return the load figures that a worker's server reports, or ""."""
    load = row.get("load")
    if not load:
        return ""
    usage = load.get("kv_cache_usage")
    figures = f"{load['running']} running, {load['waiting']} waiting"
    return figures if usage is None else f"{figures}, KV cache {usage:.0%}"


def _notes(row: dict[str, Any]) -> Iterator[str]:
    """What keeps a worker or a model from serving, the models that it leaves alone for now, and what its models lack."""
    yield from row.get("problems", ())
    for one in row.get("pauses", ()):
        yield f"{one['model']} paused until {_clock(one['until'])}: {one['reason']}"
    for one in row.get("limitations", ()):
        yield f"{one['model']} lacks {one['feature']} (until {_clock(one['until'])})"


def _clock(at: int) -> str:
    return time.strftime("%H:%M:%S", time.localtime(at))


def render_queues(answer: dict[str, Any]) -> RenderableType:
    """One line a queue."""
    from cli.tables import Text, new_table

    rows = answer["data"]
    if not rows:
        return Text("All queues are empty: no job waits or runs.")
    table = new_table("model", "capability", "lane", "waiting", "running")
    for row in rows:
        running = row.get("in_progress")
        table.add_row(
            Text(row["model"]),
            row["capability"],
            row["lane"],
            str(row["depth"]),
            "-" if running is None else str(running),
        )
    return table
