"""`nexus backup` and `nexus restore`: save the data of etcd, NATS and Redis to a folder, and write it back."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Coroutine
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from cli import options
from cli.backup.archive import BackupManifest, Notify, format_size, read_manifest, verify
from cli.errors import INTERRUPTED_EXIT_CODE, ConsoleError
from cli.serve import EtcdUrl, NatsUrl, RedisUrl, StackDir, read_settings, set_environment
from cli.stack.membership import join_running_stack

if TYPE_CHECKING:
    from backbone.settings import CommonSettings
    from cli.backup.restore import RestoreResult

T = TypeVar("T")
Only = Annotated[
    str,
    typer.Option(
        "--only", metavar="PARTS", help="Only some of etcd, redis, streams, separated by commas. Default: all."
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]
PARTIAL_RESTORE_EXIT_CODE = 4
"""Exit code of a restore that failed halfway: nothing may be started on these servers."""


def backup(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to create; it must not exist.")],
    *,
    check: Annotated[
        bool,
        typer.Option("--verify", help="Write no backup: compare the files of the backup in DIR with its manifest."),
    ] = False,
    only: Only = "",
    nats_url: NatsUrl = None,
    etcd_url: EtcdUrl = None,
    redis_url: RedisUrl = None,
    data_dir: StackDir = None,
    as_json: options.Json = False,
    quiet: Quiet = False,
) -> None:
    """Save aliases, services, jobs, results, files, keys and everything else to a folder, while Nexus runs.

    The servers are those of a gateway: NATS_URL, ETCD_URL, REDIS_URL and their credentials, from the environment or .env;
    without any, those of the `nexus up` that runs on the data directory.
    The folder holds prompts, answers and secrets in plain text: protect it like the servers themselves.
    """
    notify = _make_notify(as_json=as_json, quiet=quiet)
    if check:
        manifest = read_manifest(folder)
        verify(folder, manifest.parts, notify)
        _print_summary(manifest, "complete", as_json=as_json, quiet=quiet)
        return
    from cli.backup.connections import parse_kinds

    kinds = parse_kinds(only)
    set_environment({"NATS_URL": nats_url, "ETCD_URL": etcd_url, "REDIS_URL": redis_url})
    join_running_stack("gateway", data_dir)
    settings = _settings()
    began = time.monotonic()
    manifest = _run(_backup(settings, folder, kinds, notify), "nothing was saved")
    _print_summary(manifest, f"saved in {time.monotonic() - began:.1f} s", as_json=as_json, quiet=quiet)


def restore(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that `nexus backup` created.")],
    *,
    force: Annotated[
        bool, typer.Option("--force", help="First delete the data of these servers: jobs, results and keys.")
    ] = False,
    replicas: Annotated[
        int | None,
        typer.Option(
            "--replicas", min=1, max=5, help="Replicas of the streams, as in STREAM_REPLICAS. Default: as saved."
        ),
    ] = None,
    only: Only = "",
    nats_url: NatsUrl = None,
    etcd_url: EtcdUrl = None,
    redis_url: RedisUrl = None,
    as_json: options.Json = False,
    quiet: Quiet = False,
) -> None:
    """Restore a backup into empty servers. Stop all gateways and workers before, and start them afterwards."""
    from cli.backup.connections import parse_kinds

    notify = _make_notify(as_json=as_json, quiet=quiet)
    kinds = parse_kinds(only)
    manifest = read_manifest(folder)
    parts = [part for part in manifest.parts if part.kind in kinds]
    if not parts:
        raise ConsoleError(f"{folder} has no data of {', '.join(sorted(kinds))}.")
    verify(folder, parts, notify)
    set_environment({"NATS_URL": nats_url, "ETCD_URL": etcd_url, "REDIS_URL": redis_url})
    settings = _settings()
    remains = "the servers hold a part of the backup: restore it again with --force"
    restored = _run(_restore(settings, folder, manifest, kinds, force=force, replicas=replicas, notify=notify), remains)
    for warning in restored.warnings:
        print(f"nexus: {warning}", file=sys.stderr)
    if as_json:
        print(json.dumps(asdict(restored)))
    elif not quiet:
        print(f"RestoreResult {folder}, as it was at {manifest.began_at}. Start gateways and workers now.")


async def _backup(settings: CommonSettings, folder: Path, kinds: frozenset[str], notify: Notify) -> BackupManifest:
    from cli.backup.connections import open_servers
    from cli.backup.create import BackupCreator

    async with open_servers(settings) as servers:
        return await BackupCreator(servers, kinds, notify).run(folder)


async def _restore(
    settings: CommonSettings,
    folder: Path,
    manifest: BackupManifest,
    kinds: frozenset[str],
    *,
    force: bool,
    replicas: int | None,
    notify: Notify,
) -> RestoreResult:
    from cli.backup.connections import open_servers, translate_errors
    from cli.backup.restore import BackupRestorer

    async with open_servers(settings) as servers:
        restorer = BackupRestorer(servers, folder, manifest, kinds, notify)
        await restorer.check(force=force)
        try:
            with translate_errors():
                return await restorer.run(replicas)
        except Exception as error:  # after a bug, too, the user must know that data was changed
            message = error if isinstance(error, ConsoleError) else repr(error)
            raise ConsoleError(
                f"{message}\nThe servers hold a part of the backup now. Fix the cause, and restore it again with --force.",
                exit_code=PARTIAL_RESTORE_EXIT_CODE,
            ) from error


def _run(work: Coroutine[Any, Any, T], remains: str) -> T:
    """Run to the end, or until SIGTERM or Ctrl-C, which clean up. `remains` tells the user what an interruption leaves."""

    async def run() -> T:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        return await work

    try:
        return asyncio.run(run())
    except (KeyboardInterrupt, asyncio.CancelledError):
        raise ConsoleError(f"Interrupted: {remains}.", exit_code=INTERRUPTED_EXIT_CODE) from None


def _settings() -> CommonSettings:
    from backbone.logging import configure_logging
    from backbone.settings import CommonSettings

    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    configure_logging("console", "error")
    return read_settings(CommonSettings)


def _make_notify(*, as_json: bool, quiet: bool) -> Notify:
    def notify(line: str) -> None:
        if not quiet:
            print(line, file=sys.stderr if as_json else sys.stdout, flush=True)

    return notify


def _print_summary(manifest: BackupManifest, result: str, *, as_json: bool, quiet: bool) -> None:
    if as_json:
        summary = asdict(manifest)
        for part in summary["parts"]:
            del part["about"]
        print(json.dumps(summary | {"bytes": manifest.size}))
    elif not quiet:
        print(f"{len(manifest.parts)} parts, {format_size(manifest.size)}: {result}")
