"""`nexus dlq`: dead letters, jobs that killed their workers or used up their retries."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer

from cli import options
from cli.gateway_client import ApiClient
from cli.jobs import Ids, ago, each, render_job
from cli.operations import show

if TYPE_CHECKING:
    from cli.tables import RenderableType

app = typer.Typer(help="Dead letters: jobs that killed their workers or used up their retries.", no_args_is_help=True)

PATH = "/v1/dlq"
PAGE = 100


@app.command("list")
def list_letters(
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="So many at most.")] = 50,
    url: options.Url = None,
    key: options.Key = None,
    key_file: options.KeyFile = None,
    data_dir: options.Data = None,
    as_json: options.Json = False,
    watch: options.Watch = False,
) -> None:
    """The dead letters, newest first."""
    with options.client(url, key, data_dir, key_file) as api:
        show(api, lambda api: fetch_letters(api, limit), render_letters, as_json=as_json, watch=watch)


@app.command("show")
def show_letter(
    job: Annotated[str, typer.Argument(help="The job's id.")],
    url: options.Url = None,
    key: options.Key = None,
    key_file: options.KeyFile = None,
    data_dir: options.Data = None,
    as_json: options.Json = False,
) -> None:
    """One dead letter, with its request."""
    with options.client(url, key, data_dir, key_file) as api:
        show(api, lambda api: api.get(_path(job)), render_job, as_json=as_json, watch=False)


@app.command()
def replay(
    jobs: Annotated[list[str] | None, typer.Argument(metavar="[JOB…]", help="Ids of jobs.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All that lie there now.")] = False,
    url: options.Url = None,
    key: options.Key = None,
    key_file: options.KeyFile = None,
    data_dir: options.Data = None,
    as_json: options.Json = False,
) -> None:
    """Run dead letters again, under their ids."""
    if bool(jobs) == everything:
        raise typer.BadParameter("name JOBs, or say --all")
    with options.client(url, key, data_dir, key_file) as api:
        ids = jobs or [letter["id"] for letter in fetch_letters(api, None)["data"]]
        each(ids, lambda job: api.post(_path(job, "/replay")), as_json=as_json)


@app.command()
def delete(
    jobs: Ids,
    url: options.Url = None,
    key: options.Key = None,
    key_file: options.KeyFile = None,
    data_dir: options.Data = None,
    as_json: options.Json = False,
) -> None:
    """Forget dead letters; their jobs stay failed."""
    with options.client(url, key, data_dir, key_file) as api:
        each(jobs, lambda job: api.delete(_path(job)), as_json=as_json)


def fetch_letters(api: ApiClient, limit: int | None) -> dict[str, Any]:
    """As many as there are, or `limit`; of a job that died twice, the newer one."""
    rows: dict[str, dict[str, Any]] = {}
    before = ""
    while True:
        size = PAGE if limit is None else min(PAGE, limit - len(rows))
        page = api.get(f"{PATH}?limit={size}{before}")
        for row in page["data"]:
            rows.setdefault(row["id"], row)
        if not page["has_more"] or not page["data"] or (limit is not None and len(rows) >= limit):
            return {"object": "list", "data": list(rows.values()), "has_more": page["has_more"]}
        before = f"&before={page['data'][-1]['seq']}"


def render_letters(answer: dict[str, Any]) -> RenderableType:
    """One line a dead letter."""
    from cli.tables import Text, new_table

    if not answer["data"]:
        return Text("There is no dead letter.")
    table = new_table("job", "died", "endpoint", "model", "owner", "attempts", "error", ids=True)
    for row in answer["data"]:
        table.add_row(
            Text(row["id"], no_wrap=True),
            ago(row["dead_at"]),
            row["endpoint"],
            Text(row["model"]),
            Text(row["owner"]),
            str(row["attempts"]),
            Text((row["error"] or {}).get("message") or ""),
        )
    return table


def _path(job: str, part: str = "") -> str:
    return f"{PATH}/{quote(job, safe='')}{part}"
