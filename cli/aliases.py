"""`nexus aliases`: names that route to the first of several models that has a live worker."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cli import options
from cli.gateway_client import ApiClient
from cli.resources import add_remove_command, print_answer, record_path, resource_app

if TYPE_CHECKING:
    from cli.tables import RenderableType

PATH = "/v1/aliases"


def render_aliases(answer: dict[str, Any]) -> RenderableType:
    """Return a table with a line for each alias."""
    from cli.tables import Text, new_table

    rows = answer["data"]
    if not rows:
        return Text("There are no aliases. Create one: nexus aliases set NAME MODEL [MODEL…]")
    lines = new_table("alias", "targets", "now")
    for row in rows:
        lines.add_row(Text(row["id"]), Text(", ".join(row["targets"])), Text(row["resolves_to"] or "-"))
    return lines


app = resource_app(
    PATH,
    render_aliases,
    help_text="Names that route to the first of several models that has a live worker.",
    list_help="List the aliases, and the model that each routes to now.",
)


@app.command("set")
@options.gateway_command
def set_alias(
    api: ApiClient,
    name: Annotated[str, typer.Argument(help="Name of the alias.")],
    targets: Annotated[list[str], typer.Argument(help="Models, in order of preference.")],
    *,
    unsupported_parameters: Annotated[
        Literal["refuse", "adapt"] | None,
        typer.Option(
            help="Refuse requests with parameters that the model's server lacks, or adapt them. "
            "Default: the worker's setting."
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Create an alias, or replace its models.

    New requests follow at once. A target that is no known model is a warning, not an error.
    """
    body: dict[str, Any] = {"targets": targets}
    if unsupported_parameters is not None:
        body["unsupported_parameters"] = unsupported_parameters
    answer = api.put(record_path(PATH, name), body)
    resolves_to = answer["resolves_to"] or "none has a live worker"
    print_answer(answer, f"{name}: {', '.join(answer['targets'])} (now: {resolves_to})", as_json=as_json)
    if not as_json:
        for warning in answer.get("warnings", ()):
            print(f"nexus: warning: {warning}", file=sys.stderr)


add_remove_command(app, PATH, help_text="Remove an alias.")
