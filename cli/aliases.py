"""`nexus aliases`: names that stand for the first of several models that is live."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import quote

import typer

from cli import options
from cli.operations import fetch_list, show

if TYPE_CHECKING:
    from cli.tables import RenderableType

app = typer.Typer(help="Names that stand for the first of several models that is live.")

PATH = "/v1/aliases"
Name = Annotated[str, typer.Argument(help="The alias.")]


@app.callback(invoke_without_command=True)
def aliases(
    ctx: typer.Context,
    url: options.Url = None,
    key: options.Key = None,
    key_file: options.KeyFile = None,
    data_dir: options.Data = None,
    as_json: options.Json = False,
) -> None:
    """The aliases, and the model that each stands for now."""
    if options.listing(ctx):
        with options.client(url, key, data_dir, key_file) as api:
            show(api, fetch_list(PATH), render_aliases, as_json=as_json, watch=False)


@app.command("set")
def set_alias(
    name: Name,
    targets: Annotated[list[str], typer.Argument(help="Models, in order of preference.")],
    url: options.Url = None,
    key: options.Key = None,
    key_file: options.KeyFile = None,
    data_dir: options.Data = None,
    as_json: options.Json = False,
    unsupported_parameters: Annotated[
        Literal["refuse", "adapt"] | None,
        typer.Option(
            help="For parameters that a model's server lacks: refuse them, or adapt them. Default: as the worker does."
        ),
    ] = None,
) -> None:
    """Make a name stand for models, or for other ones than before; requests follow at once. A target that is no model's name is a warning."""
    with options.client(url, key, data_dir, key_file) as api:
        body: dict[str, Any] = {"targets": targets}
        if unsupported_parameters is not None:
            body["unsupported_parameters"] = unsupported_parameters
        answer = api.put(f"{PATH}/{quote(name, safe='')}", body)
    if as_json:
        print(json.dumps(answer))
    else:
        print(f"{name}: {', '.join(answer['targets'])} (now: {answer['resolves_to'] or 'none of them serves'})")
        for warning in answer.get("warnings", ()):
            print(f"nexus: warning: {warning}", file=sys.stderr)


@app.command("remove")
def remove_alias(
    name: Name,
    url: options.Url = None,
    key: options.Key = None,
    key_file: options.KeyFile = None,
    data_dir: options.Data = None,
    as_json: options.Json = False,
) -> None:
    """Remove an alias."""
    with options.client(url, key, data_dir, key_file) as api:
        answer = api.delete(f"{PATH}/{quote(name, safe='')}")
    print(json.dumps(answer) if as_json else f"{name}: removed")


def render_aliases(answer: dict[str, Any]) -> RenderableType:
    """One line an alias."""
    from cli.tables import Text, new_table

    rows = answer["data"]
    if not rows:
        return Text("There is no alias. Make one: nexus aliases set NAME MODEL [MODEL…]")
    lines = new_table("alias", "targets", "now")
    for row in rows:
        lines.add_row(Text(row["id"]), Text(", ".join(row["targets"])), Text(row["resolves_to"] or "-"))
    return lines
