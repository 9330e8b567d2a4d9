"""Command line options that several commands share."""

from __future__ import annotations

import sys
from getpass import getpass
from pathlib import Path
from typing import Annotated

import typer

from cli.errors import ConsoleError
from cli.gateway_client import ApiClient, find_target
from cli.stack.data_dir import data_dir_from

Url = Annotated[
    str | None,
    typer.Option("--url", help="The gateway. Default: NEXUS_URL, else the running stack, else http://127.0.0.1:8800."),
]


def warn_of_key(key: str | None) -> str | None:
    """Say that a key on the command line is no secret on this machine."""
    return _warn("--key", key, "--key-file FILE or an environment variable")


def warn_of_backend_key(key: str | None) -> str | None:
    """The same of an inference server's key."""
    return _warn("--backend-key", key, "the variable WORKER_BACKEND_KEY")


def _warn(option: str, key: str | None, instead: str) -> str | None:
    if key:
        print(
            f"nexus: {option} shows the key to everybody who can list this machine's processes; use {instead}",
            file=sys.stderr,
        )
    return key


Key = Annotated[
    str | None,
    typer.Option(
        "--key",
        callback=warn_of_key,
        help="The API key, for all to see in process lists: better --key-file, or NEXUS_API_KEY.",
    ),
]
KeyFile = Annotated[
    str | None,
    typer.Option(
        "--key-file",
        metavar="FILE",
        help="Holds the API key; `-`: ask for it, or read it from standard input. "
        "Default: NEXUS_API_KEY, NEXUS_API_KEY_FILE, GATEWAY_BEARER_TOKEN, else the running stack's.",
    ),
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


def client(url: str | None, key: str | None, data_dir: Path | None, key_file: str | None = None) -> ApiClient:
    """A client for the gateway that these options mean."""
    return ApiClient(find_target(url, chosen_key(key, key_file), data_dir_from(data_dir)))


def chosen_key(key: str | None, key_file: str | None) -> str | None:
    """Return the key that the options give; None: they give none. Raises ConsoleError."""
    if key and key_file:
        raise ConsoleError("--key and --key-file are both given: leave --key out")
    return read_key(key_file) if key_file else key


def read_key(file: str) -> str:
    """Return the key in a file; of `-`, what is typed or comes on standard input. Raises ConsoleError."""
    try:
        if file == "-":
            text = getpass("API key: ") if sys.stdin.isatty() else sys.stdin.readline()
        else:
            text = Path(file).read_text()
    except (OSError, UnicodeDecodeError, EOFError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ConsoleError(f"--key-file: the key cannot be read from {file}: {reason}") from error
    if not (key := text.strip()):
        raise ConsoleError(f"--key-file: {'no key was given' if file == '-' else f'{file} is empty'}")
    return key


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
