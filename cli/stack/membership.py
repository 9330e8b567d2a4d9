"""Membership of a gateway or worker, started by hand, in the stack that `nexus up` runs on this machine.

A process joins with the stack's URLs and credentials. When the stack is started again, with new passwords, certificates and
perhaps ports, the process executes its own command line again in its place: same pid, terminal and arguments.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn
from urllib.parse import urlsplit

from cli.errors import ConsoleError
from cli.stack.data_dir import DataDir, StackState, data_dir_from

if TYPE_CHECKING:
    from backbone.settings import CommonSettings

POLL_INTERVAL_S = 0.5
REJOIN_VARIABLE = "NEXUS_REJOIN"
"""Set for a process that executes itself again: it waits until a stack runs."""
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
SERVERS = ("NATS", "ETCD", "REDIS")


@dataclass(frozen=True, slots=True)
class StackMembership:
    """One start of a stack that this process has joined, and the environment that the process was started with."""

    data: DataDir
    start_id: str
    environment: Mapping[str, str]
    leaving: threading.Event = field(default_factory=threading.Event)
    """Set if this process, and nobody else, told itself to stop."""

    def follow(self, *, has_children: bool) -> None:
        """Rejoin whenever the stack is started again, from now on. Returns at once.

        With `has_children`, this process gets SIGTERM, ends its work and its children, and calls `rejoin_if_restarted`.
        """
        watch = partial(self._watch, self._end_children if has_children else self._rejoin)
        threading.Thread(target=watch, name="rejoin", daemon=True).start()

    def rejoin_if_restarted(self) -> None:
        """Rejoin, without returning, if another start of the stack runs."""
        if self._is_restarted():
            self._rejoin()

    def rejoin_if_ended(self) -> None:
        """Rejoin, without returning, if the joined start has ended: the process waits for the next one."""
        state = self.data.running()
        if state is None:
            self._execute_again("has ended; waiting for its next start")
        if state.start_id != self.start_id:
            self._rejoin()

    def _watch(self, leave: Callable[[], object]) -> None:
        last = self._state_file_version()
        while True:
            time.sleep(POLL_INTERVAL_S)
            version = self._state_file_version()
            if version != last and self._is_restarted():
                leave()
                return
            last = version

    def _is_restarted(self) -> bool:
        state = self.data.running()
        return state is not None and state.start_id != self.start_id

    def _end_children(self) -> None:
        """Send this process SIGTERM: its children would keep the port that the next ones need."""
        self.leaving.set()
        os.kill(os.getpid(), signal.SIGTERM)

    def _state_file_version(self) -> tuple[int, int]:
        with suppress(OSError):
            stat = self.data.state_file.stat()
            return stat.st_ino, stat.st_mtime_ns
        return 0, 0

    def _rejoin(self) -> NoReturn:
        self._execute_again("has been started again; joining it")

    def _execute_again(self, reason: str) -> NoReturn:
        print(f"nexus: the stack on {self.data.root} {reason}", file=sys.stderr, flush=True)
        os.execve(sys.executable, sys.orig_argv, {**self.environment, REJOIN_VARIABLE: "1"})  # noqa: S606 - its own program


def join_running_stack(role: str, data_dir: Path | None = None) -> StackMembership | None:
    """Set the variables with which a `gateway` or a `worker` joins the stack that runs on the data directory.

    Returns None if nothing was set. Settings that name other servers or users stay as they are, and a line says so.
    Raises ConsoleError if only `data_dir`, the flag, names servers, and no stack runs there.
    """
    data = data_dir_from(data_dir)
    state = _wait_for_stack(data)
    variables = state.environments.get(role) if state else None
    if not state or not variables:
        _explain_no_stack(data.root, is_flag=data_dir is not None)
        return None
    if not _settings_allow(variables):
        _print_note(
            f"not joining the stack that runs on {data.root}: NATS_URL, ETCD_URL or a user is set to another one's"
        )
        return None
    _print_note(f"joining the stack that runs on {data.root}")
    membership = StackMembership(data, state.start_id, _environment_without(variables))
    os.environ.update(variables)
    if role == "gateway":
        _share_key(state.key)
    return membership


def _wait_for_stack(data: DataDir) -> StackState | None:
    """Return the stack that runs on the data directory, None if none runs. A process that rejoins waits for one."""
    rejoins = os.environ.pop(REJOIN_VARIABLE, "")
    while (state := data.running()) is None and rejoins:
        time.sleep(POLL_INTERVAL_S)
    return state


def _environment_without(variables: dict[str, str]) -> dict[str, str]:
    """Return this process's environment without values of the joined start, which a shell may have from `worker.env`."""
    return {name: value for name, value in os.environ.items() if not _is_same(name, value, variables.get(name))}


def _is_same(name: str, value: str, joined: str | None) -> bool:
    return value == joined or (name.endswith("_URL") and joined is not None and _address(value) == _address(joined))


def _share_key(key: str) -> None:
    """Give a further gateway the admin key that `nexus up` printed, unless settings give the gateway a key."""
    from backbone.settings import GatewaySettings
    from cli.serve import read_settings

    if not read_settings(GatewaySettings).model_fields_set & {"gateway_bearer_token", "gateway_bearer_token_file"}:
        os.environ["GATEWAY_BEARER_TOKEN"] = key


def _explain_no_stack(folder: Path, *, is_flag: bool) -> None:
    """Say that no stack runs here, unless NATS_URL is set: the process is not meant to join one then."""
    from backbone.settings import CommonSettings
    from cli.serve import read_settings

    if "nats_url" in read_settings(CommonSettings).model_fields_set:
        return
    if is_flag:
        raise ConsoleError(
            f"No `nexus up` runs on {folder}. Pass the data directory of a running one: the folder with `key` and `logs`."
        )
    _print_note(
        f"no `nexus up` runs on {folder}; trying NATS and etcd at their default ports. "
        "To use others, pass --data-dir, or set NATS_URL and ETCD_URL."
    )


def _print_note(text: str) -> None:
    print(f"nexus: {text}", file=sys.stderr)


def _settings_allow(variables: dict[str, str]) -> bool:
    """Return whether the settings, from the environment or `.env`, name the servers of `variables`, or no servers."""
    from backbone.settings import CommonSettings
    from cli.serve import read_settings

    settings = read_settings(CommonSettings)
    return all(_setting_allows(settings, name, variables) for name in SERVERS) and not settings.nats_creds_file


def _setting_allows(settings: CommonSettings, server: str, variables: dict[str, str]) -> bool:
    url, user = f"{server}_URL", f"{server}_USER"
    if url not in variables:
        return True
    configured = getattr(settings, url.lower()) if url.lower() in settings.model_fields_set else ""
    name = getattr(settings, user.lower(), "")
    is_same_server = not configured or _address(configured) == _address(variables[url])
    return is_same_server and name in ("", variables.get(user, ""))


def _address(url: str) -> tuple[str, int | None]:
    """Return host and port. All names of the loopback interface count as one; the scheme does not count."""
    try:
        parts = urlsplit(url)
        return ("127.0.0.1" if parts.hostname in LOOPBACK else parts.hostname or "", parts.port)
    except ValueError:
        return (url, None)
