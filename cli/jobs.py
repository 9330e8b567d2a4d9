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
from cli.job_follower import job_path
from cli.views import show

if TYPE_CHECKING:
    from cli.tables import RenderableType

app = typer.Typer(help="Jobs: requests that run to their end without their caller.", no_args_is_help=True)

PAGE_SIZE = 100
STATUS_STYLES = {"completed": "green", "in_progress": "cyan", "failed": "red", "expired": "red", "cancelled": "yellow"}
JobIds = Annotated[list[str], typer.Argument(metavar="JOB…", help="Ids of jobs.")]


@app.command("list")
@options.gateway_command
def list_jobs(
    api: ApiClient,
    *,
    status: Annotated[
        str | None, typer.Option("--status", help="queued, in_progress, completed, failed, cancelled or expired.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Only jobs of this model.")] = None,
    endpoint: Annotated[str | None, typer.Option("--endpoint", help="Only jobs for this endpoint.")] = None,
    worker: Annotated[
        str | None, typer.Option("--worker", help="Only jobs that this worker runs, or ran last.")
    ] = None,
    error: Annotated[str | None, typer.Option("--error", help="Only failed jobs with this error code.")] = None,
    batch: Annotated[str | None, typer.Option("--batch", help="Only the jobs of this batch.")] = None,
    since: Annotated[
        str | None, typer.Option("--since", metavar="TIME", help="Only jobs created at this time or later (ISO 8601).")
    ] = None,
    metadata: Annotated[
        list[str] | None,
        typer.Option("--metadata", metavar="NAME=VALUE", help="Only jobs with this metadata; may be repeated."),
    ] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Most jobs to list.")] = 20,
    everything: Annotated[bool, typer.Option("--all", help="List all jobs.")] = False,
    as_json: options.Json = False,
    watch: options.Watch = False,
) -> None:
    """List jobs, newest first."""
    query = {"status": status, "model": model, "endpoint": endpoint, "worker": worker, "error": error, "batch": batch}
    query["created_from"] = since
    query |= {f"metadata[{name}]": value for name, value in options.pairs(metadata, "--metadata")}
    filters = {name: value for name, value in query.items() if value is not None}

    def fetch(api: ApiClient) -> dict[str, Any]:
        return fetch_pages(api, filters, None if everything else limit)

    show(api, fetch, render_jobs, as_json=as_json, watch=watch)


@app.command("show")
@options.gateway_command
def show_job(
    api: ApiClient, job: options.JobId, *, as_json: options.Json = False, watch: options.Watch = False
) -> None:
    """Show a job and the deliveries to its webhook."""
    show(api, lambda api: api.get(job_path(job)), render_job, as_json=as_json, watch=watch)


@app.command()
@options.gateway_command
def cancel(api: ApiClient, jobs: JobIds, *, as_json: options.Json = False) -> None:
    """Cancel jobs, whether they wait or run. A job that has ended stays as it is."""
    for_each_job(jobs, lambda job: api.post(job_path(job, "/cancel")), as_json=as_json)


@app.command()
@options.gateway_command
def retry(api: ApiClient, jobs: JobIds, *, as_json: options.Json = False) -> None:
    """Run failed jobs again."""
    for_each_job(jobs, lambda job: api.post(job_path(job, "/retry")), as_json=as_json)


def for_each_job(ids: list[str], action: Callable[[str], dict[str, Any]], *, as_json: bool) -> None:
    """Call `action` with each id and print a line on each. A failure does not stop the others, but exits with 1."""
    failed = False
    for one in ids:
        try:
            answer = action(one)
        except ConsoleError as error:
            print(f"nexus: {one}: {error}", file=sys.stderr)
            failed = True
        else:
            print(json.dumps(answer) if as_json else f"{one}: {answer.get('status', 'deleted')}", flush=True)
    if failed:
        raise typer.Exit(1)


def fetch_pages(api: ApiClient, query: dict[str, str], limit: int | None) -> dict[str, Any]:
    """Return at most `limit` jobs that match the query, or all of them."""
    rows: list[dict[str, Any]] = []
    after: dict[str, str] = {}
    while True:
        size = PAGE_SIZE if limit is None else min(PAGE_SIZE, limit - len(rows))
        page = api.get(f"/v1/jobs?{urlencode({**query, **after, 'limit': str(size)})}")
        rows += page["data"]
        if not page.get("next_after") or (limit is not None and len(rows) >= limit):
            return {"object": "list", "data": rows, "has_more": page["has_more"]}
        after = {"after": page["next_after"]}


def render_jobs(answer: dict[str, Any]) -> RenderableType:
    """Return a table with a line for each job."""
    from cli.tables import Text, new_table

    if not answer["data"]:
        return Text("There are no such jobs. Submit one: nexus submit ENDPOINT FILE")
    table = new_table("job", "age", "endpoint", "model", "lane", "status", "", ids=True)
    for job in answer["data"]:
        table.add_row(
            Text(job["id"], no_wrap=True),
            format_age(job["created_at"]),
            job["endpoint"],
            Text(job["model"]),
            job["service_tier"],
            Text(job["status"], style=STATUS_STYLES.get(job["status"], "")),
            Text(_remark(job)),
        )
    return table


def _remark(job: dict[str, Any]) -> str:
    """Return the error of a job, its queue position or its progress."""
    if job.get("error"):
        return str(job["error"].get("message") or "")
    if job["status"] == "queued" and job.get("queue_position") is not None:
        return f"{job['queue_position']} before it"
    if job["status"] == "in_progress" and job.get("progress") is not None:
        return f"{job['progress']:.0%}"
    return ""


def render_job(job: dict[str, Any]) -> RenderableType:
    """Return a table with a line for each field that has a value."""
    from cli.tables import Table, Text

    table = Table.grid(padding=(0, 3, 0, 0))
    for name, value in job.items():
        if name == "object" or value is None or value in ({}, []):
            continue
        lines = [_format_time(value)] if name.endswith("_at") else _value_lines(value)
        for number, line in enumerate(lines):
            table.add_row(Text("" if number else name.removesuffix("_at").replace("_", " "), "dim"), Text(line))
    return table


def _format_time(at: int) -> str:
    return f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(at))} ({format_age(at)})"


def _value_lines(value: Any) -> list[str]:
    """Return a value as text: one line, or a line for each nested field."""
    if isinstance(value, dict):
        return [
            f"{key}: {line}"
            for key, item in value.items()
            if item is not None and item != []
            for line in _value_lines(item)
        ]
    if isinstance(value, list):
        return [json.dumps(item) for item in value]
    return [value] if isinstance(value, str) else [json.dumps(value)]


def format_age(at: int | None) -> str:
    """Return the time since `at`, in Unix seconds, in words: `5 min`."""
    if at is None:
        return "-"
    seconds = time.time() - at
    if seconds < 0:
        return f"in {-seconds:.0f} s"
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
