"""`nexus services`: HTTP services that are served without knowing of Nexus."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer

from cli import options
from cli.operations import fetch_list, show

if TYPE_CHECKING:
    from cli.tables import RenderableType

app = typer.Typer(help="HTTP services that are served without knowing of Nexus.")

PATH = "/v1/services"
Name = Annotated[str, typer.Argument(help="The service's name.")]


@app.callback(invoke_without_command=True)
def services(
    ctx: typer.Context,
    url: options.Url = None,
    key: options.Key = None,
    key_file: options.KeyFile = None,
    data_dir: options.Data = None,
    as_json: options.Json = False,
) -> None:
    """The services that are entered, and the state of each as the worker that serves it says."""
    if options.listing(ctx):
        with options.client(url, key, data_dir, key_file) as api:
            show(api, fetch_list(PATH), render_services, as_json=as_json, watch=False)


@app.command("add")
def add_service(
    name: Name,
    base_url: Annotated[str, typer.Argument(help="Where it is, as http://HOST:PORT.")],
    metadata_url: Annotated[
        str, typer.Option("--metadata-url", help="Where it says what it serves. Default: BASE_URL/v1/metadata.")
    ] = "",
    url: options.Url = None,
    key: options.Key = None,
    key_file: options.KeyFile = None,
    data_dir: options.Data = None,
    as_json: options.Json = False,
) -> None:
    """Enter a service; one that is there under this name has moved to this URL."""
    with options.client(url, key, data_dir, key_file) as api:
        answer = api.put(f"{PATH}/{quote(name, safe='')}", {"base_url": base_url, "metadata_url": metadata_url})
    print(json.dumps(answer) if as_json else f"{name}: {answer['base_url']}")


@app.command("remove")
def remove_service(
    name: Name,
    url: options.Url = None,
    key: options.Key = None,
    key_file: options.KeyFile = None,
    data_dir: options.Data = None,
    as_json: options.Json = False,
) -> None:
    """Remove a service's record; the service itself is left alone."""
    with options.client(url, key, data_dir, key_file) as api:
        answer = api.delete(f"{PATH}/{quote(name, safe='')}")
    print(json.dumps(answer) if as_json else f"{name}: removed")


def render_services(answer: dict[str, Any]) -> RenderableType:
    """One line a service."""
    from cli.tables import Text, new_table, styled_state

    rows = answer["data"]
    if not rows:
        return Text("No service is entered. Enter one: nexus services add NAME http://HOST:PORT")
    lines = new_table("service", "URL", "state")
    for row in rows:
        lines.add_row(Text(row["id"]), Text(row["base_url"]), styled_state(row["state"] or "not served"))
    return lines
