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
        typer.Option(
            "--port", min=0, max=65535, help="[GATEWAY_PORT] Port of the gateway; 0 takes a free one. Default: 8800."
        ),
    ] = None,
    observability_port: Annotated[
        int | None,
        typer.Option(
            "--observability-port",
            min=0,
            max=65535,
            help="[OBSERVABILITY_PORT] Port of metrics, documentation and readiness, which need no key; "
            "0 takes a free one. Default: 8801.",
        ),
    ] = None,
    data_dir: options.Data = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            "-m",
            metavar="[NAME=]FILE",
            help="Serve this GGUF file with llama.cpp, in place of the small bundled chat model; may be repeated.",
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            "--context",
            min=128,
            help="Most tokens of a request to the models of --model, including the answer. Default: 4096.",
        ),
    ] = None,
    local_models: Annotated[
        bool | None,
        typer.Option(
            "--local-models/--no-local-models",
            help="Serve all of the small bundled models, or none. Default: all; with --model, no chat model.",
        ),
    ] = None,
    discover: Annotated[
        bool,
        typer.Option(
            "--discover/--no-discover", help="Find inference servers that already run on this machine, and serve them."
        ),
    ] = True,
    gateways: Annotated[
        int | None,
        typer.Option(
            "--gateways", min=1, max=64, help="[GATEWAY_WORKERS] Gateway processes that share the port. Default: 1."
        ),
    ] = None,
    host: Annotated[
        str | None,
        typer.Option("--host", help="[GATEWAY_HOST] Address to listen on; 0.0.0.0 for all. Default: 127.0.0.1."),
    ] = None,
    detach: Annotated[
        bool,
        typer.Option(
            "--detach", "-d", help="Return once Nexus is up. `nexus down` stops it, `nexus logs` shows its logs."
        ),
    ] = False,
    key: Annotated[
        str | None,
        typer.Option(
            "--key",
            callback=options.warn_of_key,
            help="The admin key. Process lists show it: prefer --key-file or GATEWAY_BEARER_TOKEN.",
        ),
    ] = None,
    key_file: Annotated[
        str | None,
        typer.Option(
            "--key-file",
            metavar="FILE",
            help="File with the admin key; `-` asks for it. "
            "Default: GATEWAY_BEARER_TOKEN, else a key that the first start makes.",
        ),
    ] = None,
) -> None:
    """Start everything on this machine: NATS, etcd, Redis, the gateway, and workers for every backend found.

    Ctrl-C stops all of it. Flags override the settings in brackets, which come from the environment or .env.
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
    own, default_chat = choose_models(model, context, local_models=local_models)
    host = host if host is not None else settings.gateway_host
    port = port if port is not None else settings.gateway_port
    metrics_port = observability_port if observability_port is not None else settings.observability_port
    chosen = StackOptions(
        host=host,
        port=port or free_port(host),
        observability_host=settings.observability_host,
        observability_port=metrics_port or free_port(),
        key=choose_key(options.chosen_key(key, key_file) or key_from_settings(settings), data),
        gateways=gateways or settings.gateway_workers,
        local_models=local_models is not False,
        default_chat=default_chat,
        user_models=tuple(own),
        context=context,
        discover=discover,
        etcd_prefix=settings.etcd_prefix,
    )
    with data.locked(chosen.url), data.children_locked(print) as children_lock:
        check_ports(*requested_ports(chosen))
        if not detach:
            code = asyncio.run(run_stack(chosen, data, StackDisplay(), children_lock))
    if detach:
        code = start_detached(arguments_for(chosen, data), chosen.key, data)
    _flush_output()
    raise typer.Exit(code)


def arguments_for(chosen: StackOptions, data: DataDir) -> list[str]:
    """Return the arguments with which a detached process makes the same choices. The key goes to its standard input."""
    return [
        *("--data-dir", str(data.root), "--host", chosen.host, "--port", str(chosen.port)),
        *("--observability-port", str(chosen.observability_port), "--gateways", str(chosen.gateways)),
        *(flag for one in chosen.user_models for flag in ("--model", one.flag)),
        *(("--context", str(chosen.context)) if chosen.context else ()),
        *local_flags(chosen),
        "--discover" if chosen.discover else "--no-discover",
    ]


def choose_models(
    wanted: list[str] | None, context: int | None, *, local_models: bool | None
) -> tuple[list[UserModel], bool]:
    """Return the models of `--model`, and whether the bundled chat model is served too. Raises ConsoleError."""
    from cli.stack.user_models import read_user_models

    own = read_user_models(wanted or [], context, default_chat=local_models is True)
    return own, local_models is True or all(one.file.embeds for one in own)


def local_flags(chosen: StackOptions) -> tuple[str, ...]:
    """Return the flag that chooses the bundled models; none for the default choice."""
    if not chosen.local_models:
        return ("--no-local-models",)
    return ("--local-models",) if chosen.default_chat else ()


def requested_ports(chosen: StackOptions) -> tuple[RequestedPort, RequestedPort]:
    """Return the ports of the gateway, with the flags and variables that choose them."""
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


def key_from_settings(settings: GatewaySettings) -> str:
    """Return the key of GATEWAY_BEARER_TOKEN or GATEWAY_BEARER_TOKEN_FILE; empty if neither is set. Raises ConsoleError."""
    from backbone.secret_files import ConfigurationError
    from gateway.auth.bootstrap_key import load_bootstrap_key

    try:
        return load_bootstrap_key(settings)
    except ConfigurationError as error:
        raise ConsoleError(str(error)) from error


def choose_key(given: str, data: DataDir) -> str:
    """Return the given key, else the data directory's. Raises ConsoleError for a key that HTTP or a shell would break."""
    key = given or data.key()
    if not key.isascii() or not key.isprintable() or any(one in key for one in " \"'`$\\"):
        raise ConsoleError("The key must be printable ASCII without spaces, quotes, `, $ and backslashes.")
    return key


def _flush_output() -> None:
    """Flush standard output; if the terminal is lost, keep the interpreter from failing on it at exit."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
