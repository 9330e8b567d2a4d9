"""`nexus services`: HTTP services that a worker serves through the gateway; they need not know of Nexus."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import options
from cli.gateway_client import ApiClient
from cli.resources import add_remove_command, print_answer, record_path, resource_app

if TYPE_CHECKING:
    from cli.tables import RenderableType

PATH = "/v1/services"


def render_services(answer: dict[str, Any]) -> RenderableType:
    """Return a table with a line for each service."""
    from cli.tables import Text, new_table, styled_state

    rows = answer["data"]
    if not rows:
        return Text("There are no services. Add one: nexus services add NAME http://HOST:PORT")
    lines = new_table("service", "URL", "state")
    for row in rows:
        lines.add_row(Text(row["id"]), Text(row["base_url"]), styled_state(row["state"] or "not served"))
    return lines


app = resource_app(
    PATH,
    render_services,
    help_text="HTTP services that a worker serves through the gateway; they need not know of Nexus.",
    list_help="List the services, and the state that the worker reports of each.",
)


@app.command("add")
@options.gateway_command
def add_service(
    api: ApiClient,
    name: Annotated[str, typer.Argument(help="Name of the service.")],
    base_url: Annotated[str, typer.Argument(help="Its URL: http://HOST:PORT.")],
    *,
    metadata_url: Annotated[
        str,
        typer.Option("--metadata-url", help="URL of the service's metadata. Default: BASE_URL/v1/metadata."),
    ] = "",
    as_json: options.Json = False,
) -> None:
    """Add a service, or change the URL of one with this name."""
    answer = api.put(record_path(PATH, name), {"base_url": base_url, "metadata_url": metadata_url})
    print_answer(answer, f"{name}: {answer['base_url']}", as_json=as_json)


add_remove_command(app, PATH, help_text="Remove the record of a service. The service itself keeps running.")
