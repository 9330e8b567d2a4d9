"""`nexus dlq`: dead letters, jobs that killed their workers or used up their retries."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer

from cli import options
from cli.gateway_client import ApiClient
from cli.jobs import JobIds, for_each_job, format_age, render_job
from cli.views import show

if TYPE_CHECKING:
    from cli.tables import RenderableType

app = typer.Typer(help="Dead letters: jobs that killed their workers or used up their retries.", no_args_is_help=True)

PATH = "/v1/dlq"
PAGE_SIZE = 100


@app.command("list")
@options.gateway_command
def list_letters(
    api: ApiClient,
    *,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Most dead letters to list.")] = 50,
    as_json: options.Json = False,
    watch: options.Watch = False,
) -> None:
    """List dead letters, newest first."""
    show(api, lambda api: fetch_letters(api, limit), render_letters, as_json=as_json, watch=watch)


@app.command("show")
@options.gateway_command
def show_letter(api: ApiClient, job: options.JobId, *, as_json: options.Json = False) -> None:
    """Show a dead letter and its request."""
    show(api, lambda api: api.get(_path(job)), render_job, as_json=as_json, watch=False)


@app.command()
@options.gateway_command
def replay(
    api: ApiClient,
    jobs: Annotated[list[str] | None, typer.Argument(metavar="[JOB…]", help="Ids of jobs.")] = None,
    *,
    everything: Annotated[bool, typer.Option("--all", help="Replay all dead letters that there are now.")] = False,
    as_json: options.Json = False,
) -> None:
    """Run dead letters again, under the same ids."""
    if bool(jobs) == everything:
        raise typer.BadParameter("name the JOBs to replay, or pass --all")
    ids = jobs or [letter["id"] for letter in fetch_letters(api, None)["data"]]
    for_each_job(ids, lambda job: api.post(_path(job, "/replay")), as_json=as_json)


@app.command()
@options.gateway_command
def delete(api: ApiClient, jobs: JobIds, *, as_json: options.Json = False) -> None:
    """Delete dead letters. Their jobs stay failed."""
    for_each_job(jobs, lambda job: api.delete(_path(job)), as_json=as_json)


def fetch_letters(api: ApiClient, limit: int | None) -> dict[str, Any]:
    """Return at most `limit` dead letters, or all of them: the newest one of each job."""
    rows: dict[str, dict[str, Any]] = {}
    before = ""
    while True:
        size = PAGE_SIZE if limit is None else min(PAGE_SIZE, limit - len(rows))
        page = api.get(f"{PATH}?limit={size}{before}")
        for row in page["data"]:
            rows.setdefault(row["id"], row)
        if not page["has_more"] or not page["data"] or (limit is not None and len(rows) >= limit):
            return {"object": "list", "data": list(rows.values()), "has_more": page["has_more"]}
        before = f"&before={page['data'][-1]['seq']}"


def render_letters(answer: dict[str, Any]) -> RenderableType:
    """Return a table with a line for each dead letter."""
    from cli.tables import Text, new_table

    if not answer["data"]:
        return Text("There are no dead letters.")
    table = new_table("job", "died", "endpoint", "model", "owner", "attempts", "error", ids=True)
    for row in answer["data"]:
        table.add_row(
            Text(row["id"], no_wrap=True),
            format_age(row["dead_at"]),
            row["endpoint"],
            Text(row["model"]),
            Text(row["owner"]),
            str(row["attempts"]),
            Text((row["error"] or {}).get("message") or ""),
        )
    return table


def _path(job: str, part: str = "") -> str:
    return f"{PATH}/{quote(job, safe='')}{part}"
