"""Commands for records that an operator lists, writes and removes by name: the frame of aliases, services and keys."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer

from cli import options
from cli.gateway_client import ApiClient
from cli.views import fetch_list, show

if TYPE_CHECKING:
    from cli.tables import RenderableType


def resource_app(path: str, render: Callable[[Any], RenderableType], *, help_text: str, list_help: str) -> typer.Typer:
    """Return a group of commands that lists the records at `path`, by itself and as `list`."""
    app = typer.Typer(help=help_text)

    @options.gateway_command
    def list_records(api: ApiClient, *, as_json: options.Json = False) -> None:
        show(api, fetch_list(path), render, as_json=as_json, watch=False)

    @app.callback(invoke_without_command=True)
    def list_without_subcommand(
        ctx: typer.Context,
        as_json: options.Json = False,
        url: options.Url = None,
        key: options.Key = None,
        key_file: options.KeyFile = None,
        data_dir: options.Data = None,
    ) -> None:
        if ctx.invoked_subcommand is None:
            list_records(as_json=as_json, url=url, key=key, key_file=key_file, data_dir=data_dir)
        elif any(ctx.params.values()):  # the subcommand would ignore them
            raise typer.BadParameter(f"write options after `{ctx.invoked_subcommand}`", ctx=ctx)

    app.command("list", help=list_help)(list_records)
    return app


def add_remove_command(app: typer.Typer, path: str, *, help_text: str) -> None:
    """Add `remove NAME`, which deletes one record at `path`."""

    @app.command("remove", help=help_text)
    @options.gateway_command
    def remove_record(
        api: ApiClient,
        name: Annotated[str, typer.Argument(help="Its name.")],
        *,
        as_json: options.Json = False,
    ) -> None:
        print_answer(api.delete(record_path(path, name)), f"{name}: removed", as_json=as_json)


def record_path(path: str, name: str) -> str:
    """Return the path of one record, whatever characters its name holds."""
    return f"{path}/{quote(name, safe='')}"


def print_answer(answer: dict[str, Any], line: str, *, as_json: bool) -> None:
    """Print the gateway's answer as JSON, or the line that sums it up."""
    print(json.dumps(answer) if as_json else line)
