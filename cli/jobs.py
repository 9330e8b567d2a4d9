"""`nexus jobs`: the caller's jobs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlencode

import typer

from cli import options
from cli.errors import ConsoleError
from cli.gateway_client import ApiClient
from cli.job_follower import path_of
from cli.operations import show

if TYPE_CHECKING:
    from cli.tables import RenderableType

app = typer.Typer(help="Jobs: requests that go on without their callers.", no_args_is_help=True)

PAGE = 100
STATE_STYLES = {"completed": "green", "in_progress": "cyan", "failed": "red", "expired": "red", "cancelled": "yellow"}
Ids = Annotated[list[str], typer.Argument(metavar="JOB…", help="Ids of jobs.")]


@app.command("list")
def list_jobs(
    status: Annotated[
        str | None, typer.Option("--status", help="queued, in_progress, completed, failed, cancelled or expired.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Those of this model.")] = None,
    metadata: options.Metadata = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="So many at most.")] = 20,
    everything: Annotated[bool, typer.Option("--all", help="All of them.")] = False,
    url: options.Url = None,
    key: options.Key = None,
    key_file: options.KeyFile = None,
    data_dir: options.Data = None,
    as_json: options.Json = False,
    watch: options.Watch = False,
) -> None:
    """The jobs, newest first."""
    query = {"status": status, "model": model}
    query |= {f"metadata[{name}]": value for name, value in options.pairs(metadata, "--metadata")}
    wanted = {name: value for name, value in query.items() if value is not None}

    def fetch(api: ApiClient) -> dict[str, Any]:
        return fetch_pages(api, wanted, None if everything else limit)

    with options.client(url, key, data_dir, key_file) as api:
        show(api, fetch, render_jobs, as_json=as_json, watch=watch)


@app.command("show")
def show_job(
    job: Annotated[str, typer.Argument(help="The job's id.")],
    url: options.Url = None,
    key: options.Key = None,
    key_file: options.KeyFile = None,
    data_dir: options.Data = None,
    as_json: options.Json = False,
    watch: options.Watch = False,
) -> None:
    """One job, with what its webhook was told."""
    with options.client(url, key, data_dir, key_file) as api:
        show(api, lambda api: api.get(path_of(job)), render_job, as_json=as_json, watch=watch)


@app.command()
def cancel(
    jobs: Ids,
    url: options.Url = None,
    key: options.Key = None,
    key_file: options.KeyFile = None,
    data_dir: options.Data = None,
    as_json: options.Json = False,
) -> None:
    """End jobs: those that wait never run, those that run are stopped. One that has ended stays as it is."""
    with options.client(url, key, data_dir, key_file) as api:
        each(jobs, lambda job: api.post(path_of(job, "/cancel")), as_json=as_json)


@app.command()
def retry(
    jobs: Ids,
    url: options.Url = None,
    key: options.Key = None,
    key_file: options.KeyFile = None,
    data_dir: options.Data = None,
    as_json: options.Json = False,
) -> None:
    """Run failed jobs again."""
    with options.client(url, key, data_dir, key_file) as api:
        each(jobs, lambda job: api.post(path_of(job, "/retry")), as_json=as_json)


def each(ids: list[str], act: Callable[[str], dict[str, Any]], *, as_json: bool) -> None:
    """Do something to each of `ids`, and print a line on it. One that fails stops no other, but the command ends with 1."""
    failed = False
    for one in ids:
        try:
            answer = act(one)
        except ConsoleError as error:
            print(f"nexus: {one}: {error}", file=sys.stderr)
            failed = True
        else:
            print(json.dumps(answer) if as_json else f"{one}: {answer.get('status', 'deleted')}", flush=True)
    if failed:
        raise typer.Exit(1)


def fetch_pages(api: ApiClient, query: dict[str, str], limit: int | None) -> dict[str, Any]:
    """As many jobs as there are, or `limit`."""
    rows: list[dict[str, Any]] = []
    after: dict[str, str] = {}
    while True:
        size = PAGE if limit is None else min(PAGE, limit - len(rows))
        page = api.get(f"/v1/jobs?{urlencode({**query, **after, 'limit': str(size)})}")
        rows += page["data"]
        if not page["has_more"] or not page["last_id"] or (limit is not None and len(rows) >= limit):
            return {"object": "list", "data": rows, "has_more": page["has_more"]}
        after = {"after": page["last_id"]}


def render_jobs(answer: dict[str, Any]) -> RenderableType:
    """One line a job."""
    from cli.tables import Text, new_table

    if not answer["data"]:
        return Text("There are no jobs to list. Submit one: nexus submit ENDPOINT FILE")
    table = new_table("job", "age", "endpoint", "model", "lane", "status", "", ids=True)
    for job in answer["data"]:
        table.add_row(
            Text(job["id"], no_wrap=True),
            ago(job["created_at"]),
            job["endpoint"],
            Text(job["model"]),
            job["service_tier"],
            Text(job["status"], style=STATE_STYLES.get(job["status"], "")),
            Text(_news(job)),
        )
    return table


def _news(job: dict[str, Any]) -> str:
    """What matters most about it now."""
    if job.get("error"):
        return str(job["error"].get("message") or "")
    if job["status"] == "queued" and job.get("queue_position") is not None:
        return f"{job['queue_position']} before it"
    if job["status"] == "in_progress" and job.get("progress") is not None:
        return f"{job['progress']:.0%}"
    return ""


def render_job(job: dict[str, Any]) -> RenderableType:
    """A line for each thing that is known."""
    from cli.tables import Table, Text

    table = Table.grid(padding=(0, 3, 0, 0))
    for name, value in job.items():
        if name == "object" or value is None or value in ({}, []):
            continue
        lines = [_moment(value)] if name.endswith("_at") else _lines(value)
        for number, line in enumerate(lines):
            table.add_row(Text("" if number else name.removesuffix("_at").replace("_", " "), "dim"), Text(line))
    return table


def _moment(at: int) -> str:
    return f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(at))} ({ago(at)})"


def _lines(value: Any) -> list[str]:
    """A value on one line; what is nested on more."""
    if isinstance(value, dict):
        return [
            f"{key}: {line}" for key, item in value.items() if item is not None and item != [] for line in _lines(item)
        ]
    if isinstance(value, list):
        return [json.dumps(item) for item in value]
    return [value] if isinstance(value, str) else [json.dumps(value)]


def ago(at: int | None) -> str:
    """How long ago that was; Unix seconds."""
    if at is None:
        return "-"
    seconds = time.time() - at
    if seconds < 0:
        return f"in {-seconds:.0f} s"
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
