"""`nexus gateway` and `nexus worker`: run one process. A flag overrides its environment variable."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import typer

from backbone.lean_imports import lean_imports
from cli.errors import ConsoleError
from cli.options import warn_of_backend_key
from cli.stack.membership import join_running_stack

if TYPE_CHECKING:  # pydantic takes half a second to import, and `--help` does not need it
    from backbone.settings import CommonSettings
    from cli.stack.membership import StackMembership

Settings = TypeVar("Settings", bound="CommonSettings")

NatsUrl = Annotated[str | None, typer.Option("--nats-url", help="[NATS_URL] Default: nats://127.0.0.1:4222.")]
EtcdUrl = Annotated[str | None, typer.Option("--etcd-url", help="[ETCD_URL] Default: http://127.0.0.1:2379.")]
RedisUrl = Annotated[str | None, typer.Option("--redis-url", help="[REDIS_URL] Default: redis://127.0.0.1:6379/0.")]
StackDir = Annotated[
    Path | None,
    typer.Option(
        "--data-dir",
        help="Data directory of a running `nexus up` to join, unless URLs name other servers. "
        "Default: NEXUS_DATA_DIR, else .nexus.",
    ),
]
ObservabilityPort = Annotated[
    int | None,
    typer.Option(
        "--observability-port",
        help="Port of /metrics, which needs no key; a gateway also serves /health and /readyz there.",
    ),
]


def read_settings(kind: type[Settings], flags: Collection[str] = ()) -> Settings:
    """Read settings from the environment and `.env`. `flags` are the variables that this command's flags have set.

    Raises ConsoleError, naming each invalid variable.
    """
    from backbone.secret_files import ConfigurationError
    from backbone.setting_errors import read_settings as read

    try:
        return read(kind, flags)
    except ConfigurationError as error:
        raise ConsoleError(str(error), exit_code=2) from None


def set_environment(values: dict[str, object | None]) -> set[str]:
    """Set variables from flags, so that child processes see them too. None is a flag that was not given.

    Returns the names of the variables that were set.
    """
    given = {name: str(value) for name, value in values.items() if value is not None}
    os.environ.update(given)
    return set(given)


def gateway(
    *,
    host: Annotated[
        str | None, typer.Option("--host", help="[GATEWAY_HOST] Address to listen on. Default: 127.0.0.1.")
    ] = None,
    port: Annotated[int | None, typer.Option("--port", help="[GATEWAY_PORT] Port to listen on. Default: 8800.")] = None,
    observability_port: ObservabilityPort = None,
    processes: Annotated[
        int | None,
        typer.Option("--gateways", min=1, help="[GATEWAY_WORKERS] Processes that share the port. Default: 1."),
    ] = None,
    nats_url: NatsUrl = None,
    etcd_url: EtcdUrl = None,
    redis_url: RedisUrl = None,
    data_dir: StackDir = None,
) -> None:
    """Run a gateway.

    The variable GATEWAY_BEARER_TOKEN holds its admin key. .env.example lists all settings.
    """
    flags = set_environment(
        {
            "GATEWAY_HOST": host,
            "GATEWAY_PORT": port,
            "OBSERVABILITY_PORT": observability_port,
            "GATEWAY_WORKERS": processes,
            "NATS_URL": nats_url,
            "ETCD_URL": etcd_url,
            "REDIS_URL": redis_url,
        }
    )
    with lean_imports():
        from backbone.settings import GatewaySettings
        from gateway.server import run

    read_settings(GatewaySettings, flags)  # reports all invalid settings before any is used
    membership = join_running_stack("gateway", data_dir)
    settings = read_settings(GatewaySettings, flags)
    raise typer.Exit(run_as_member(membership, lambda: run(settings), has_children=settings.gateway_workers > 1))


def worker(
    *,
    backend: Annotated[
        str | None,
        typer.Option(
            "--backend",
            "-b",
            help="[WORKER_BACKEND] Kind of inference server, built in or from a package. Default: echo.",
        ),
    ] = None,
    url: Annotated[str | None, typer.Option("--url", help="[WORKER_BACKEND_URL] URL of that server.")] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model", "-m", help="[WORKER_MODELS] Serve only this model; may be repeated. Default: all models."
        ),
    ] = None,
    concurrency: Annotated[
        int | None,
        typer.Option(
            "--concurrency",
            "-c",
            min=0,
            help="[WORKER_CONCURRENCY] Jobs to run at once. Default: 0, the server's own number.",
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="[WORKER_NAME] Id of the worker. Default: generated.")
    ] = None,
    backend_key: Annotated[
        str | None,
        typer.Option(
            "--backend-key",
            callback=warn_of_backend_key,
            help="[WORKER_BACKEND_KEY] API key of the inference server. Process lists show it: prefer the variable.",
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            "-o",
            metavar="NAME=VALUE",
            help="[WORKER_BACKEND_OPTIONS] Option of the adapter; may be repeated.",
        ),
    ] = None,
    unsupported_parameters: Annotated[
        Literal["adapt", "refuse"] | None,
        typer.Option(
            help="[WORKER_UNSUPPORTED_PARAMETERS] Adapt parameters that a model's server lacks, and name them in "
            "x-nexus-adapted, or refuse them with status 400."
        ),
    ] = None,
    observability_port: ObservabilityPort = None,
    nats_url: NatsUrl = None,
    etcd_url: EtcdUrl = None,
    data_dir: StackDir = None,
) -> None:
    """Run a worker beside an inference server. It takes jobs for the models of the server."""
    flags = set_environment(
        {
            "WORKER_BACKEND": backend,
            "WORKER_BACKEND_URL": url,
            "WORKER_MODELS": ",".join(model) if model else None,
            "WORKER_CONCURRENCY": concurrency,
            "WORKER_NAME": name,
            "WORKER_BACKEND_KEY": backend_key,
            "WORKER_BACKEND_OPTIONS": _join_options(option) if option else None,
            "WORKER_UNSUPPORTED_PARAMETERS": unsupported_parameters,
            "WORKER_OBSERVABILITY_PORT": observability_port,
            "NATS_URL": nats_url,
            "ETCD_URL": etcd_url,
        }
    )
    with lean_imports():
        from backbone.settings import WorkerSettings
        from workers.main import run

    check_backend_kind(
        read_settings(WorkerSettings, flags).worker_backend
    )  # reports all invalid settings before any is used
    membership = join_running_stack("worker", data_dir)
    settings = read_settings(WorkerSettings, flags)
    raise typer.Exit(run_as_member(membership, lambda: run(settings)))


def run_as_member(membership: StackMembership | None, run: Callable[[], int], *, has_children: bool = False) -> int:
    """Run the process, and rejoin the stack whenever it is started again. Returns the exit code."""
    if membership is None:
        return run()
    membership.follow(has_children=has_children)
    code = run()
    if has_children:  # it restarts its children until a signal comes, from its user or from itself
        if membership.leaving.is_set():
            membership.rejoin_if_restarted()
    elif code:  # it may have started with credentials of a stack that was just ending
        membership.rejoin_if_ended()
    return code


def check_backend_kind(kind: str) -> None:
    """Raise ConsoleError, which names all kinds, when `kind` is unknown."""
    from schemas.errors import NotFound
    from workers.backends.base import load_adapter

    try:
        load_adapter(kind)
    except (ImportError, NotFound) as error:
        raise ConsoleError(str(error), exit_code=2) from error


def _join_options(options: list[str]) -> str:
    """Return the `--option` values as one variable. Raises ConsoleError for one that is not NAME=VALUE."""
    from workers.backend_options import join_options

    for one in options:
        if "=" not in one.strip("="):
            raise ConsoleError(f"--option expects NAME=VALUE, not {one!r}", exit_code=2)
    return join_options(options)
