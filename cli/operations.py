"""`nexus status`, `workers`, `queues` and `drain`: commands with which an operator looks at a running gateway."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer

from cli import options
from cli.errors import ConsoleError
from cli.gateway_client import ApiClient
from cli.views import fetch_list, show

if TYPE_CHECKING:
    from cli.tables import RenderableType


@options.gateway_command
def status(api: ApiClient, *, as_json: options.Json = False, watch: options.Watch = False) -> None:
    """Show the gateway's dependencies, the workers and the queues.

    Exit code 1 if the gateway cannot serve requests.
    """
    view = show(api, fetch_status, render_status, as_json=as_json, watch=watch)
    if view["ready"].get("status") == "unavailable":
        raise typer.Exit(1)


@options.gateway_command
def workers(api: ApiClient, *, as_json: options.Json = False, watch: options.Watch = False) -> None:
    """Show the workers, their slots and their models."""
    show(api, fetch_list("/v1/workers"), render_workers, as_json=as_json, watch=watch)


@options.gateway_command
def queues(api: ApiClient, *, as_json: options.Json = False, watch: options.Watch = False) -> None:
    """Show how many jobs wait and run, per model and lane."""
    show(api, fetch_list("/v1/queues"), render_queues, as_json=as_json, watch=watch)


@options.gateway_command
def drain(
    api: ApiClient,
    worker: Annotated[str, typer.Argument(help="Id of the worker, from `nexus workers`.")],
    *,
    as_json: options.Json = False,
) -> None:
    """Let a worker finish its jobs and take no new ones."""
    answer = api.post(f"/v1/workers/{quote(worker, safe='')}/drain")
    if as_json:
        print(json.dumps(answer))
    else:
        print(f"{answer.get('id', worker)}: {answer.get('state', 'draining')}")


def fetch_status(api: ApiClient) -> dict[str, Any]:
    """Return readiness, workers and queues together."""
    ready = api.get("/readyz", accept=(503,))
    if not isinstance(ready, dict) or "status" not in ready:
        raise ConsoleError(f"{api.target.url} is not a Nexus gateway: its answer to /readyz has no status.")
    found: dict[str, Any] = {"url": api.target.url, "ready": ready, "workers": [], "queues": []}
    if ready["status"] != "unavailable":
        found["workers"] = api.get("/v1/workers")["data"]
        found["queues"] = api.get("/v1/queues")["data"]
    return found


def render_status(found: dict[str, Any]) -> RenderableType:
    """Return the status of the gateway, the workers and the queues as one view."""
    from cli.tables import Group, Text, new_table, styled_state

    ready = found["ready"]
    head = Text.assemble(("Nexus ", "bold"), found["url"], "  ", styled_state(ready["status"]))
    parts = new_table("part", "state", "ms", "")
    for name, part in ready.get("parts", {}).items():
        milliseconds = f"{part['ms']:.1f}" if isinstance(part.get("ms"), int | float) else "-"
        parts.add_row(
            name, styled_state("ok" if part.get("ok") else "down"), milliseconds, Text(part.get("error") or "")
        )
    out: list[RenderableType] = [head, parts]
    if ready["status"] != "unavailable":
        out += [Text(), render_workers({"data": found["workers"]}), Text(), render_queues({"data": found["queues"]})]
    return Group(*out)


def render_workers(answer: dict[str, Any]) -> RenderableType:
    """Return a table with a line for each worker."""
    from cli.tables import Text, new_table, styled_state

    rows = answer["data"]
    if not rows:
        return Text("There are no workers. Start one: nexus worker --backend openai --url http://HOST:PORT")
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
    """Yield the problems of a worker, its paused models and the features that its models lack."""
    yield from row.get("problems", ())
    for one in row.get("pauses", ()):
        yield f"{one['model']} paused until {_clock(one['until'])}: {one['reason']}"
    for one in row.get("limitations", ()):
        yield f"{one['model']} lacks {one['feature']} (until {_clock(one['until'])})"


def _clock(at: int) -> str:
    return time.strftime("%H:%M:%S", time.localtime(at))


def render_queues(answer: dict[str, Any]) -> RenderableType:
    """Return a table with a line for each queue."""
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
