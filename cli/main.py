"""The `nexus` command."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from backbone.version import VERSION
from cli import (
    aliases,
    backup,
    chat,
    console,
    dlq,
    jobs,
    keys,
    models,
    permissions,
    processes,
    services,
    submit,
    up,
    watch,
)
from cli.errors import ConsoleError

app = typer.Typer(
    name="nexus",
    help="One OpenAI-compatible door in front of every AI server a team owns.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"nexus {VERSION}")
        raise typer.Exit


@app.callback()
def _root(
    _: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    """Nothing before the command itself."""


app.command()(up.up)
app.command()(processes.gateway)
app.command()(processes.worker)
app.command()(console.status)
app.command()(console.workers)
app.command()(console.queues)
app.command()(models.models)
app.command()(models.pull)
app.command()(console.drain)
app.command()(chat.chat)
app.command()(submit.submit)
app.command()(watch.watch)
app.command()(backup.backup)
app.command()(backup.restore)
app.add_typer(jobs.app, name="jobs")
app.add_typer(dlq.app, name="dlq")
app.add_typer(aliases.app, name="aliases")
app.add_typer(services.app, name="services")
app.add_typer(keys.app, name="keys")
app.add_typer(permissions.app, name="permissions")


def main() -> None:
    """Run the command line. A ConsoleError is a message and an exit code, never a traceback."""
    try:
        app()
    except ConsoleError as error:
        print(f"nexus: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)


if __name__ == "__main__":
    main()
