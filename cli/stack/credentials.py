"""StackCredentials of the stack that `nexus up` runs here, for commands that connect to its servers themselves."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from cli.errors import ConsoleError
from cli.stack.data_dir import data_dir_from
from cli.stack.rejoin import StackMembership, wait_for_stack

if TYPE_CHECKING:
    from backbone.settings import CommonSettings

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
SERVERS = ("NATS", "ETCD", "REDIS")


def join_running_stack(role: str, data_dir: Path | None = None) -> StackMembership | None:
    """Set the variables by which a `gateway` or a `worker` joins the stack that runs on the data directory.

    Returns what was joined, None where nothing was set: settings that name other servers, or other users, are left as they are,
    and a line says so. Raises ConsoleError where `data_dir`, the flag, is all that names servers, and no stack runs there.
    """
    data = data_dir_from(data_dir)
    state = wait_for_stack(data)
    variables = state.environments.get(role) if state else None
    if not state or not variables:
        _say_that_none_runs(data.root, named=data_dir is not None)
        return None
    if not _mean(variables):
        _notify(f"not joining the stack that runs on {data.root}: NATS_URL, ETCD_URL or a user is set to another one's")
        return None
    _notify(f"joining the stack that runs on {data.root}")
    found = StackMembership(data, state.start_id, _environment_without(variables))
    os.environ.update(variables)
    if role == "gateway":
        _share_key(state.key)
    return found


def _environment_without(variables: dict[str, str]) -> dict[str, str]:
    """This process's environment without what means the joined start alone: a shell may have it from `worker.env`."""
    return {name: value for name, value in os.environ.items() if not _is_same(name, value, variables.get(name))}


def _is_same(name: str, value: str, joined: str | None) -> bool:
    return value == joined or (name.endswith("_URL") and joined is not None and _place(value) == _place(joined))


def _share_key(key: str) -> None:
    """Let a further gateway take the admin key that `nexus up` printed, unless settings give it one of its own."""
    from backbone.settings import GatewaySettings
    from cli.serve import read_settings

    if not read_settings(GatewaySettings).model_fields_set & {"gateway_bearer_token", "gateway_bearer_token_file"}:
        os.environ["GATEWAY_BEARER_TOKEN"] = key


def _say_that_none_runs(folder: Path, *, named: bool) -> None:
    """Unless settings name NATS: who set that means no stack of this machine."""
    from backbone.settings import CommonSettings
    from cli.serve import read_settings

    if "nats_url" in read_settings(CommonSettings).model_fields_set:
        return
    if named:
        raise ConsoleError(
            f"no `nexus up` runs on {folder}; give the folder with the `key` and `logs` of one that runs"
        )
    _notify(
        f"no `nexus up` runs on {folder}; trying NATS and etcd at their usual ports (or set --data-dir, or NATS_URL and ETCD_URL)"
    )


def _notify(text: str) -> None:
    print(f"nexus: {text}", file=sys.stderr)


def _mean(variables: dict[str, str]) -> bool:
    """Whether the settings as they are now, by the environment or `.env`, mean the servers of `variables`, or none."""
    from backbone.settings import CommonSettings
    from cli.serve import read_settings

    settings = read_settings(CommonSettings)
    return all(_means(settings, name, variables) for name in SERVERS) and not settings.nats_creds_file


def _means(settings: CommonSettings, server: str, variables: dict[str, str]) -> bool:
    url, user = f"{server}_URL", f"{server}_USER"
    if url not in variables:
        return True
    said = getattr(settings, url.lower()) if url.lower() in settings.model_fields_set else ""
    name = getattr(settings, user.lower(), "")
    return (not said or _place(said) == _place(variables[url])) and name in ("", variables.get(user, ""))


def _place(url: str) -> tuple[str, int | None]:
    """Host and port; all names of this machine's loopback interface are one. The scheme says nothing about the place."""
    try:
        parts = urlsplit(url)
        return ("127.0.0.1" if parts.hostname in LOOPBACK else parts.hostname or "", parts.port)
    except ValueError:
        return (url, None)
