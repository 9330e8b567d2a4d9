"""`nexus gateway` and `nexus worker`: one process each, by flags or environment variables. A flag beats its variable."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import typer

from cli.errors import ConsoleError
from cli.options import warn_of_backend_key
from cli.stack.membership import join_running_stack

if TYPE_CHECKING:  # pydantic takes half a second: `nexus status` does without
    from backbone.settings import CommonSettings
    from cli.stack.membership import StackMembership

Settings = TypeVar("Settings", bound="CommonSettings")

NatsUrl = Annotated[str | None, typer.Option("--nats-url", help="[NATS_URL] default nats://127.0.0.1:4222")]
EtcdUrl = Annotated[str | None, typer.Option("--etcd-url", help="[ETCD_URL] default http://127.0.0.1:2379")]
RedisUrl = Annotated[str | None, typer.Option("--redis-url", help="[REDIS_URL] default redis://127.0.0.1:6379/0")]
StackDir = Annotated[
    Path | None,
    typer.Option(
        "--data-dir",
        help="Of a running `nexus up`, to join it unless URLs name other servers. Default: NEXUS_DATA_DIR, else .nexus.",
    ),
]
ObservabilityPort = Annotated[
    int | None,
    typer.Option(
        "--observability-port", help="Port for /metrics without a key; a gateway has /health and /readyz there too."
    ),
]


def read_settings(kind: type[Settings], flags: Collection[str] = ()) -> Settings:
    """Settings from the environment and `.env`. `flags`: variables that this command's flags have set.

    Raises ConsoleError, naming each variable that is wrong.
    """
    from backbone.secret_files import ConfigurationError
    from backbone.setting_errors import read_settings as read

    try:
        return read(kind, flags)
    except ConfigurationError as error:
        raise ConsoleError(str(error), exit_code=2) from None


def set_environment(values: dict[str, object | None]) -> set[str]:
    """Make flags into variables, so that processes started below see them too. None: the flag was not given.

    Returns the variables that were set.
    """
    given = {name: str(value) for name, value in values.items() if value is not None}
    os.environ.update(given)
    return set(given)


def gateway(
    *,
    host: Annotated[str | None, typer.Option("--host", help="[GATEWAY_HOST] default 127.0.0.1")] = None,
    port: Annotated[int | None, typer.Option("--port", help="[GATEWAY_PORT] default 8800")] = None,
    observability_port: ObservabilityPort = None,
    processes: Annotated[
        int | None, typer.Option("--gateways", min=1, help="[GATEWAY_WORKERS] processes sharing the port; default 1")
    ] = None,
    nats_url: NatsUrl = None,
    etcd_url: EtcdUrl = None,
    redis_url: RedisUrl = None,
    data_dir: StackDir = None,
) -> None:
    """Run one gateway. Its admin key is the variable GATEWAY_BEARER_TOKEN; .env.example lists all settings."""
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
    from backbone.settings import GatewaySettings

    read_settings(GatewaySettings, flags)  # all that is wrong at once, before any of it is used
    joined = join_running_stack("gateway", data_dir)
    from gateway.server import run

    settings = read_settings(GatewaySettings, flags)
    raise typer.Exit(run_joined(joined, lambda: run(settings), has_children=settings.gateway_workers > 1))


def worker(
    *,
    backend: Annotated[
        str | None,
        typer.Option(
            "--backend",
            "-b",
            help="[WORKER_BACKEND] kind of inference server, built in or from a package; default echo",
        ),
    ] = None,
    url: Annotated[str | None, typer.Option("--url", help="[WORKER_BACKEND_URL] where that server is")] = None,
    model: Annotated[
        list[str] | None,
        typer.Option("--model", "-m", help="[WORKER_MODELS] serve only this model; may be repeated; default all"),
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option("--concurrency", "-c", min=0, help="[WORKER_CONCURRENCY] jobs at once; 0: as it says")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="[WORKER_NAME] the worker's id; default: made up")] = None,
    backend_key: Annotated[
        str | None,
        typer.Option(
            "--backend-key",
            callback=warn_of_backend_key,
            help="[WORKER_BACKEND_KEY] API key of the inference server, for all to see in process lists: better the variable",
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option", "-o", metavar="NAME=VALUE", help="[WORKER_BACKEND_OPTIONS] for the adapter; may be repeated"
        ),
    ] = None,
    unsupported_parameters: Annotated[
        Literal["adapt", "refuse"] | None,
        typer.Option(
            help="[WORKER_UNSUPPORTED_PARAMETERS] for parameters that a model's server lacks: the nearest equivalent, named"
            " in x-nexus-adapted, or 400"
        ),
    ] = None,
    observability_port: ObservabilityPort = None,
    nats_url: NatsUrl = None,
    etcd_url: EtcdUrl = None,
    data_dir: StackDir = None,
) -> None:
    """Run one worker beside an inference server: it takes jobs for the models that the server has."""
    flags = set_environment(
        {
            "WORKER_BACKEND": backend,
            "WORKER_BACKEND_URL": url,
            "WORKER_MODELS": ",".join(model) if model else None,
            "WORKER_CONCURRENCY": concurrency,
            "WORKER_NAME": name,
            "WORKER_BACKEND_KEY": backend_key,
            "WORKER_BACKEND_OPTIONS": _joined(option) if option else None,
            "WORKER_UNSUPPORTED_PARAMETERS": unsupported_parameters,
            "WORKER_OBSERVABILITY_PORT": observability_port,
            "NATS_URL": nats_url,
            "ETCD_URL": etcd_url,
        }
    )
    from backbone.settings import WorkerSettings

    check_kind(read_settings(WorkerSettings, flags).worker_backend)  # all that is wrong, before any of it is used
    joined = join_running_stack("worker", data_dir)
    from workers.main import run

    settings = read_settings(WorkerSettings, flags)
    raise typer.Exit(run_joined(joined, lambda: run(settings)))


def run_joined(joined: StackMembership | None, run: Callable[[], int], *, has_children: bool = False) -> int:
    """Run the process, and follow the stack that it has joined through restarts. Returns the exit status."""
    if joined is None:
        return run()
    joined.follow(has_children=has_children)
    code = run()
    if code:  # it may have begun while the stack ended, and with it passwords and certificates
        joined.rejoin_if_ended()
    if has_children:
        joined.rejoin_if_restarted()
    return code


def check_kind(kind: str) -> None:
    """Raise ConsoleError, naming the kinds there are, when `kind` is none of them."""
    from workers.backends.base import load_adapters, unknown_adapter_message

    try:
        kinds = load_adapters()
    except ImportError as error:
        raise ConsoleError(str(error), exit_code=2) from error
    if kind not in kinds:
        raise ConsoleError(unknown_adapter_message(kind, kinds), exit_code=2)


def _joined(options: list[str]) -> str:
    """`--option` values as one variable. Raises ConsoleError for one that is none."""
    from workers.backend_options import join_options

    for one in options:
        if "=" not in one.strip("="):
            raise ConsoleError(f"--option wants NAME=VALUE, not {one!r}", exit_code=2)
    return join_options(options)
