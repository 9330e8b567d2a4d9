"""`nexus models` and `nexus pull`: what can be used, and having a worker's server fetch another one."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from contextlib import closing
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import options
from cli.errors import GatewayError
from cli.gateway_client import ApiClient
from cli.operations import show

if TYPE_CHECKING:  # drawing tables takes time to import: `nexus --version` does without
    from cli.tables import RenderableType

INTERRUPTED_EXIT_CODE = 130
PULL = "/v1/models/pull"


def models(
    url: options.Url = None,
    key: options.Key = None,
    key_file: options.KeyFile = None,
    data_dir: options.Data = None,
    as_json: options.Json = False,
    watch: options.Watch = False,
) -> None:
    """The models and aliases, what each can do, and which workers serve it."""
    with options.client(url, key, data_dir, key_file) as api:
        show(api, fetch_models, render_models, as_json=as_json, watch=watch)


def pull(
    model: Annotated[str, typer.Argument(help="The server's own name for the model: llama3.2:1b.")],
    worker: Annotated[
        str | None, typer.Option("--worker", "-w", help="Whose server fetches it; needed where several can.")
    ] = None,
    *,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Print the job's id, and do not wait.")] = False,
    url: options.Url = None,
    key: options.Key = None,
    key_file: options.KeyFile = None,
    data_dir: options.Data = None,
    as_json: options.Json = False,
) -> None:
    """Have a worker's server (an Ollama) fetch a model. It is a job: it goes on when this command ends."""
    with options.client(url, key, data_dir, key_file) as api:
        body = {"model": model} | ({"worker": worker} if worker else {})
        job: dict[str, Any] = api.post("/v1/jobs", {"endpoint": PULL, "body": body})
        if detach:
            print(json.dumps(job) if as_json else job["id"])
            if not as_json:
                print(f"{job['status']}. To watch it: nexus watch {job['id']}", file=sys.stderr)
            return
        raise typer.Exit(_follow(api, job["id"], model, as_json=as_json))


def _follow(api: ApiClient, job: str, model: str, *, as_json: bool) -> int:
    """Show the pull's progress to its end; the exit code."""
    from cli.job_follower import JobFollower
    from cli.watch import JobViewer, follow

    if as_json:
        return follow(api, job, as_json=True)
    viewer = JobViewer(live_text=False)
    follower = JobFollower(api, job, viewer.note)
    try:
        for found in follower.queued(follower.look()):
            viewer.waiting(found)
        with closing(follower.events()) as events:
            for event in events:
                viewer.see(event)
    except KeyboardInterrupt:
        viewer.close()
        print(f"the pull goes on. To watch it: nexus watch {job}; to end it: nexus jobs cancel {job}", file=sys.stderr)
        return INTERRUPTED_EXIT_CODE
    finally:
        viewer.close()
    if viewer.end != "completed":
        print(f"nexus: '{model}' was not pulled; the server's own names are those of `ollama pull`", file=sys.stderr)
        return 1
    print(f"{model}: pulled")
    return 0


def fetch_models(api: ApiClient) -> dict[str, Any]:
    """Every model with its state and its workers; workers are for admin keys alone, others see the models."""
    rows = {row["id"]: row for row in api.get("/v1/models")["data"]}
    try:
        workers = api.get("/v1/workers")["data"]
    except GatewayError as error:
        if error.status not in (401, 403):
            raise
        return {"object": "list", "data": [_row(row, [], list(row.get("workers", ()))) for row in rows.values()]}
    serving = _serving(workers)
    for name, offers in serving.items():
        rows.setdefault(name, _away(name, offers))
    data = [
        _row(row, serving[name], [worker["id"] for worker, _ in serving[name]]) for name, row in sorted(rows.items())
    ]
    return {"object": "list", "data": data}


_Offers = list[tuple[dict[str, Any], dict[str, Any]]]


def _row(row: dict[str, Any], offers: _Offers, workers: list[str]) -> dict[str, Any]:
    """A model as this command shows it: `workers` by id, and in `loads` what each worker's server holds of it, where known."""
    return row | {"state": _state(row, offers), "workers": workers, "loads": row.get("workers") or {}}


def _serving(workers: list[dict[str, Any]]) -> defaultdict[str, _Offers]:
    """By model, the workers that offer it, with their offers."""
    found: defaultdict[str, _Offers] = defaultdict(list)
    for worker in workers:
        for offer in worker.get("models", ()):
            if set(offer["capabilities"]) != {"models"}:
                found[offer["name"]].append((worker, offer))
    return found


def _away(name: str, offers: _Offers) -> dict[str, Any]:
    """A model that no ready worker serves, in the shape of those that one does."""
    capabilities = sorted({one for _, offer in offers for one in offer["capabilities"]})
    length = next((offer["context_length"] for _, offer in offers if offer.get("context_length")), None)
    shape = {"id": name, "object": "model", "capabilities": capabilities}
    return shape | ({"context_length": length} if length else {})


def _state(row: dict[str, Any], offers: _Offers) -> str:
    """`ready`, or what the gateway says beyond that (`loaded`, …); without a ready worker what its workers are."""
    if row.get("alias_for"):
        return f"alias for {row['resolves_to']}" if row.get("resolves_to") else "alias"
    states = {worker["state"] for worker, _ in offers}
    if not states or "ready" in states:
        return str(row.get("state") or "ready")
    return ", ".join(sorted(states))


def render_models(answer: dict[str, Any]) -> RenderableType:
    """One line a model."""
    from cli.tables import Text, new_table, styled_state

    rows = answer["data"]
    if not rows:
        return Text("No model is served. Start a worker: nexus worker --backend openai --url http://HOST:PORT")
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
