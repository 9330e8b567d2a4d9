"""`nexus up`: a whole Nexus on this machine, in one terminal."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from cli import options
from cli.errors import ConsoleError
from cli.serve import read_settings
from cli.stack.data_dir import DataDir, data_dir_from
from cli.stack.detached import ignore_hangup, is_detached, start_detached
from cli.stack.ports import RequestedPort, check_ports, free_port

if TYPE_CHECKING:
    from backbone.settings import GatewaySettings
    from cli.stack.stack import StackOptions
    from cli.stack.user_models import UserModel


def up(
    *,
    port: Annotated[
        int | None,
        typer.Option("--port", min=0, max=65535, help="[GATEWAY_PORT] the gateway's port; 0: a free one; default 8800"),
    ] = None,
    observability_port: Annotated[
        int | None,
        typer.Option(
            "--observability-port",
            min=0,
            max=65535,
            help="[OBSERVABILITY_PORT] metrics, documentation and readiness, without a key; 0: a free one; default 8801",
        ),
    ] = None,
    data_dir: options.Data = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            "-m",
            metavar="[NAME=]FILE",
            help="Serve this GGUF file, by llama.cpp; may be repeated. It takes the place of the small chat model.",
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            "--context",
            min=128,
            help="Tokens of a request to the models of --model, answer included; default 4096",
        ),
    ] = None,
    local_models: Annotated[
        bool | None,
        typer.Option(
            "--local-models/--no-local-models", help="Serve the small models that come along: all of them, or none."
        ),
    ] = None,
    discover: Annotated[
        bool, typer.Option("--discover/--no-discover", help="Look for inference servers that already run here.")
    ] = True,
    gateways: Annotated[
        int | None,
        typer.Option(
            "--gateways", min=1, max=64, help="[GATEWAY_WORKERS] gateway processes sharing the port; default 1"
        ),
    ] = None,
    host: Annotated[
        str | None,
        typer.Option("--host", help="[GATEWAY_HOST] address to listen on; 0.0.0.0 for all; default 127.0.0.1"),
    ] = None,
    detach: Annotated[
        bool,
        typer.Option(
            "--detach", "-d", help="Return when it is up; `nexus down` stops it, `nexus logs` shows its logs."
        ),
    ] = False,
    key: Annotated[
        str | None,
        typer.Option(
            "--key",
            callback=options.warn_of_key,
            help="The admin key, for all to see in process lists: better --key-file, or GATEWAY_BEARER_TOKEN.",
        ),
    ] = None,
    key_file: Annotated[
        str | None,
        typer.Option(
            "--key-file",
            metavar="FILE",
            help="Holds the admin key; `-`: ask for it. Default: GATEWAY_BEARER_TOKEN, else one made once and kept.",
        ),
    ] = None,
) -> None:
    """Start everything: NATS, etcd, Redis, gateway, workers for every backend found here. Ctrl-C stops all of it.

    Settings of the environment or .env, in brackets below, are beaten by flags.
    """
    from backbone.settings import GatewaySettings
    from cli.stack.display import StackDisplay
    from cli.stack.runner import run_stack
    from cli.stack.stack import StackOptions

    if is_detached():
        ignore_hangup()
    settings = read_settings(GatewaySettings)
    data = data_dir_from(data_dir)
    data.prepare()
    own, default_chat = chosen_models(model, context, local_models=local_models)
    host = host if host is not None else settings.gateway_host
    port = port if port is not None else settings.gateway_port
    side = observability_port if observability_port is not None else settings.observability_port
    chosen = StackOptions(
        host=host,
        port=port or free_port(host),
        observability_host=settings.observability_host,
        observability_port=side or free_port(),
        key=choose_key(options.chosen_key(key, key_file) or key_by_settings(settings), data),
        gateways=gateways or settings.gateway_workers,
        local_models=local_models is not False,
        default_chat=default_chat,
        user_models=tuple(own),
        context=context,
        discover=discover,
        etcd_prefix=settings.etcd_prefix,
    )
    with data.locked(chosen.url), data.children_locked(print) as children_lock:
        check_ports(*port_wishes(chosen))
        if not detach:
            code = asyncio.run(run_stack(chosen, data, StackDisplay(), children_lock))
    if detach:
        code = start_detached(arguments_for(chosen, data), chosen.key, data)
    _leave_quietly()
    raise typer.Exit(code)


def arguments_for(chosen: StackOptions, data: DataDir) -> list[str]:
    """The command line by which a process of its own does what was chosen here. The key comes another way."""
    return [
        *("--data-dir", str(data.root), "--host", chosen.host, "--port", str(chosen.port)),
        *("--observability-port", str(chosen.observability_port), "--gateways", str(chosen.gateways)),
        *(flag for one in chosen.user_models for flag in ("--model", one.flag)),
        *(("--context", str(chosen.context)) if chosen.context else ()),
        *local_flags(chosen),
        "--discover" if chosen.discover else "--no-discover",
    ]


def chosen_models(
    wanted: list[str] | None, context: int | None, *, local_models: bool | None
) -> tuple[list[UserModel], bool]:
    """The user's own models, and whether the small chat model is served too. Raises ConsoleError."""
    from cli.stack.user_models import read_user_models

    own = read_user_models(wanted or [], context, default_chat=local_models is True)
    return own, local_models is True or all(one.file.embeds for one in own)


def local_flags(chosen: StackOptions) -> tuple[str, ...]:
    """The flag that says which of the small models are served; none: the usual ones."""
    if not chosen.local_models:
        return ("--no-local-models",)
    return ("--local-models",) if chosen.default_chat else ()


def port_wishes(chosen: StackOptions) -> tuple[RequestedPort, RequestedPort]:
    """The ports that callers reach, with how to choose others."""
    return (
        RequestedPort("--port", chosen.host, chosen.port, variable="GATEWAY_PORT"),
        RequestedPort(
            "--observability-port",
            chosen.observability_host,
            chosen.observability_port,
            chosen.gateways,
            variable="OBSERVABILITY_PORT",
        ),
    )


def key_by_settings(settings: GatewaySettings) -> str:
    """Return what GATEWAY_BEARER_TOKEN or the file in GATEWAY_BEARER_TOKEN_FILE says; empty: nothing. Raises ConsoleError."""
    from backbone.secret_files import ConfigurationError
    from gateway.auth.bootstrap_key import load_bootstrap_key

    try:
        return load_bootstrap_key(settings)
    except ConfigurationError as error:
        raise ConsoleError(str(error)) from error


def choose_key(given: str, data: DataDir) -> str:
    """Return the key that was given, else the data directory's. Raises ConsoleError for a bad one."""
    key = given or data.key()
    if not key.isascii() or not key.isprintable() or any(one in key for one in " \"'`$\\"):
        raise ConsoleError("the key must be printable ASCII without spaces, quotes, $ and backslashes")
    return key


def _leave_quietly() -> None:
    """Flush, and where the terminal is gone keep the interpreter from stumbling over it at exit."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
