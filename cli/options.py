"""Command line options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.api import ApiClient, find_target
from cli.datadir import data_dir_from

Url = Annotated[
    str | None,
    typer.Option("--url", help="The gateway. Default: NEXUS_URL, else the running stack, else http://127.0.0.1:8800."),
]
Key = Annotated[
    str | None,
    typer.Option("--key", help="The API key. Default: NEXUS_API_KEY, GATEWAY_BEARER_TOKEN, else the running stack's."),
]
Data = Annotated[
    Path | None,
    typer.Option("--data-dir", help="Where `nexus up` keeps its state. Default: NEXUS_DATA_DIR, else .nexus."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Metadata = Annotated[
    list[str] | None, typer.Option("--metadata", metavar="NAME=VALUE", help="Metadata of the job; may be repeated.")
]
Watch = Annotated[bool, typer.Option("--watch", "-w", help="Keep the view up to date until Ctrl-C.")]


def client(url: str | None, key: str | None, data_dir: Path | None) -> ApiClient:
    """A client for the gateway that these options mean."""
    return ApiClient(find_target(url, key, data_dir_from(data_dir)))


def pairs(texts: list[str] | None, option: str) -> list[tuple[str, str]]:
    """What was given as NAME=VALUE, in order."""
    found = []
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise typer.BadParameter(f"{option} wants NAME=VALUE, not '{text}'")
        found.append((name, value))
    return found


def listing(ctx: typer.Context) -> bool:
    """Whether a group was called by itself, which lists. Its options belong to the list alone: before another
    subcommand they would be ignored, so that is an error.
    """
    if ctx.invoked_subcommand is None:
        return True
    if any(value for value in ctx.params.values()):
        raise typer.BadParameter(f"options go behind `{ctx.invoked_subcommand}`", ctx=ctx)
    return False
