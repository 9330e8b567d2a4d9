"""Command line options that several commands share, and the client for the gateway that they name."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from getpass import getpass
from pathlib import Path
from typing import Annotated, Any, Concatenate, ParamSpec, TypeVar

import typer

from cli.errors import ConsoleError
from cli.gateway_client import ApiClient, find_target
from cli.stack.data_dir import data_dir_from

P = ParamSpec("P")
R = TypeVar("R")

Url = Annotated[
    str | None,
    typer.Option(
        "--url", help="The gateway's URL. Default: NEXUS_URL, else the running stack, else http://127.0.0.1:8800."
    ),
]


def warn_of_key(key: str | None) -> str | None:
    """Warn that every user of this machine can read an API key on the command line."""
    return _warn("--key", key, "--key-file FILE or an environment variable")


def warn_of_backend_key(key: str | None) -> str | None:
    """Warn that every user of this machine can read an inference server's key on the command line."""
    return _warn("--backend-key", key, "the variable WORKER_BACKEND_KEY")


def _warn(option: str, key: str | None, instead: str) -> str | None:
    if key:
        print(
            f"nexus: warning: {option} shows the key to every user who can list this machine's processes. Use {instead}.",
            file=sys.stderr,
        )
    return key


Key = Annotated[
    str | None,
    typer.Option(
        "--key",
        callback=warn_of_key,
        help="The API key. Process lists show it: prefer --key-file or NEXUS_API_KEY.",
    ),
]
KeyFile = Annotated[
    str | None,
    typer.Option(
        "--key-file",
        metavar="FILE",
        help="File with the API key; `-` asks for the key, or reads it from standard input. "
        "Default: NEXUS_API_KEY, NEXUS_API_KEY_FILE, GATEWAY_BEARER_TOKEN, else the running stack's key.",
    ),
]
Data = Annotated[
    Path | None,
    typer.Option("--data-dir", help="Data directory of `nexus up`. Default: NEXUS_DATA_DIR, else .nexus."),
]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="Id of the job.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Metadata = Annotated[
    list[str] | None, typer.Option("--metadata", metavar="NAME=VALUE", help="Metadata of the job; may be repeated.")
]
Watch = Annotated[bool, typer.Option("--watch", "-w", help="Refresh the view every second until Ctrl-C.")]


def client(url: str | None, key: str | None, data_dir: Path | None, key_file: str | None = None) -> ApiClient:
    """Return a client for the gateway that these options name."""
    return ApiClient(find_target(url, chosen_key(key, key_file), data_dir_from(data_dir)))


def _connection_options(
    *, url: Url = None, key: Key = None, key_file: KeyFile = None, data_dir: Data = None
) -> ApiClient:
    return client(url, key, data_dir, key_file)


def gateway_command(command: Callable[Concatenate[ApiClient, P], R]) -> Callable[..., R]:
    """Give a command the options that name a gateway, and pass it a client for that gateway as its first argument."""
    _, *own = inspect.signature(command, eval_str=True).parameters.values()
    shared = inspect.signature(_connection_options, eval_str=True).parameters
    names = frozenset(shared)

    @functools.wraps(command)
    def run(**values: Any) -> R:
        connection = {name: values.pop(name) for name in names & values.keys()}
        with _connection_options(**connection) as api:
            return command(api, **values)  # type: ignore[call-arg]  # the parser passes each of them by its name

    parameters = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in (*own, *shared.values())]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    return run


def chosen_key(key: str | None, key_file: str | None) -> str | None:
    """Return the key that the options give, None if they give none. Raises ConsoleError."""
    if key and key_file:
        raise ConsoleError("--key and --key-file are both given. Leave --key out.")
    return read_key(key_file) if key_file else key


def read_key(file: str) -> str:
    """Return the key in a file; for `-`, the key that the user types or that standard input holds. Raises ConsoleError."""
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
    """Split the NAME=VALUE arguments of an option, in order. Raises BadParameter."""
    found = []
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise typer.BadParameter(f"{option} expects NAME=VALUE, not '{text}'")
        found.append((name, value))
    return found
