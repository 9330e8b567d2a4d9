"""`nexus models` and `nexus pull`: list the models, show what one can be told, and download one to a worker's server."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import options
from cli.errors import INTERRUPTED_EXIT_CODE, GatewayError
from cli.gateway_client import ApiClient
from cli.resources import record_path
from cli.views import show

if TYPE_CHECKING:
    from cli.tables import RenderableType

PULL_PATH = "/v1/models/pull"


app = typer.Typer(help="Show the models and aliases, their capabilities, and the workers that serve them.")


@app.command("list")
@options.gateway_command
def list_models(api: ApiClient, *, as_json: options.Json = False, watch: options.Watch = False) -> None:
    """Show the models and aliases, their capabilities, and the workers that serve them."""
    show(api, fetch_models, render_models, as_json=as_json, watch=watch)


@app.callback(invoke_without_command=True)
def list_without_subcommand(
    ctx: typer.Context,
    as_json: options.Json = False,
    watch: options.Watch = False,
    url: options.Url = None,
    key: options.Key = None,
    key_file: options.KeyFile = None,
    data_dir: options.Data = None,
) -> None:
    """Show the models and aliases, their capabilities, and the workers that serve them."""
    if ctx.invoked_subcommand is None:
        list_models(as_json=as_json, watch=watch, url=url, key=key, key_file=key_file, data_dir=data_dir)
    elif any(ctx.params.values()):  # the subcommand would ignore them
        raise typer.BadParameter(f"write options after `{ctx.invoked_subcommand}`", ctx=ctx)


@app.command("show")
@options.gateway_command
def show_model(
    api: ApiClient,
    name: Annotated[str, typer.Argument(help="Name of the model or alias.")],
    *,
    as_json: options.Json = False,
) -> None:
    """Show a model's state, its workers, its parameters, and a first request for each of its endpoints."""
    from cli.parameters import render_model

    show(api, lambda api: api.get(record_path("/v1/catalog", name)), render_model, as_json=as_json, watch=False)


@options.gateway_command
def pull(
    api: ApiClient,
    model: Annotated[str, typer.Argument(help="The server's own name for the model, such as llama3.2:1b.")],
    worker: Annotated[
        str | None,
        typer.Option("--worker", "-w", help="Worker whose server downloads the model; required if several can."),
    ] = None,
    *,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Print the job's id and return at once.")] = False,
    as_json: options.Json = False,
) -> None:
    """Download a model to a worker's server (Ollama).

    The download is a job: it continues after Ctrl-C.
    """
    body = {"model": model} | ({"worker": worker} if worker else {})
    job: dict[str, Any] = api.post("/v1/jobs", {"endpoint": PULL_PATH, "body": body})
    if detach:
        print(json.dumps(job) if as_json else job["id"])
        if not as_json:
            print(f"{job['status']}. To watch it: nexus watch {job['id']}", file=sys.stderr)
        return
    raise typer.Exit(_follow(api, job["id"], model, as_json=as_json))


def _follow(api: ApiClient, job: str, model: str, *, as_json: bool) -> int:
    """Show the progress of the download to its end. Returns the exit code."""
    from cli.watch import JobViewer, follow, show_events

    if as_json:
        return follow(api, job, as_json=True)
    viewer = JobViewer(live_text=False)
    try:
        show_events(api, job, viewer)
    except KeyboardInterrupt:
        print(
            f"The download continues. To watch it: nexus watch {job}; to stop it: nexus jobs cancel {job}",
            file=sys.stderr,
        )
        return INTERRUPTED_EXIT_CODE
    if viewer.end != "completed":
        print(
            f"nexus: '{model}' was not downloaded. Use the server's own name for it, as in `ollama pull NAME`.",
            file=sys.stderr,
        )
        return 1
    print(f"{model}: pulled")
    return 0


def fetch_models(api: ApiClient) -> dict[str, Any]:
    """Return every model with its state and its workers. Keys that may not list workers get the models alone."""
    rows = {row["id"]: row for row in api.get("/v1/models")["data"]}
    try:
        workers = api.get("/v1/workers")["data"]
    except GatewayError as error:
        if error.status not in (401, 403):
            raise
        return {"object": "list", "data": [_row(row, [], list(row.get("workers", ()))) for row in rows.values()]}
    offers = _offers_by_model(workers)
    for name, found in offers.items():
        rows.setdefault(name, _unavailable_model(name, found))
    data = [_row(row, offers[name], [worker["id"] for worker, _ in offers[name]]) for name, row in sorted(rows.items())]
    return {"object": "list", "data": data}


_Offers = list[tuple[dict[str, Any], dict[str, Any]]]


def _row(row: dict[str, Any], offers: _Offers, workers: list[str]) -> dict[str, Any]:
    """Return a model as this command shows it: the ids of its `workers`, and its load state per worker in `loads`."""
    return row | {"state": _state(row, offers), "workers": workers, "loads": row.get("workers") or {}}


def _offers_by_model(workers: list[dict[str, Any]]) -> defaultdict[str, _Offers]:
    """Return, by model, the workers that offer the model, each with its offer."""
    found: defaultdict[str, _Offers] = defaultdict(list)
    for worker in workers:
        for offer in worker.get("models", ()):
            if set(offer["capabilities"]) != {"models"}:
                found[offer["name"]].append((worker, offer))
    return found


def _unavailable_model(name: str, offers: _Offers) -> dict[str, Any]:
    """Return a model without a ready worker, in the shape of /v1/models."""
    capabilities = sorted({one for _, offer in offers for one in offer["capabilities"]})
    length = next((offer["context_length"] for _, offer in offers if offer.get("context_length")), None)
    shape = {"id": name, "object": "model", "capabilities": capabilities}
    return shape | ({"context_length": length} if length else {})


def _state(row: dict[str, Any], offers: _Offers) -> str:
    """Return the model's state; without a ready worker, the states of its workers."""
    if row.get("alias_for"):
        return f"alias for {row['resolves_to']}" if row.get("resolves_to") else "alias"
    states = {worker["state"] for worker, _ in offers}
    if not states or "ready" in states:
        return str(row.get("state") or "ready")
    return ", ".join(sorted(states))


def render_models(answer: dict[str, Any]) -> RenderableType:
    """Return a table with a line for each model."""
    from cli.tables import Text, new_table, styled_state

    rows = answer["data"]
    if not rows:
        return Text("There are no models. Start a worker: nexus worker --backend openai --url http://HOST:PORT")
    table = new_table("model", "capabilities", "state", "workers", "context", ids=True)
    for row in rows:
        workers = [f"{one} ({row['loads'][one]})" if one in row["loads"] else one for one in row["workers"]]
        table.add_row(
            Text(row["id"]),
            Text(", ".join(row.get("capabilities", ()))),
            styled_state(row["state"]),
            Text(", ".join(workers) or "-"),
            str(row.get("context_length") or "-"),
        )
    return table
