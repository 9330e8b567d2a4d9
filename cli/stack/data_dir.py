"""The data directory of `nexus up`: who runs there, the key, the logs, the servers' data.

```
.nexus/
  lock           held (flock) for as long as a stack runs here; says its pid and URL
  children.lock  held by its servers and their guard too: after a kill, until the last of them has ended
  state.json     0600: pid, URL, key and ports of the running stack; removed at its end
  key            0600: the bootstrap key, made once and kept
  ports.json     the ports of the parts, kept from one start to the next
  operator.json  aliases and service records, kept from one start to the next
  secrets/       0700: passwords and certificates of the running stack's servers, made anew at each start
  worker.env     0600: what another worker's shell reads to join the running stack; gateway.env: the same for a gateway
  logs/          0700: one file per part
  nats/ etcd/ redis/
```
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cli.errors import ConsoleError
from cli.private_files import open_private, private_folder, write_private
from cli.stack.process_identity import process_identity

DATA_DIR_VARIABLE = "NEXUS_DATA_DIR"
DEFAULT_DATA_DIR = Path(".nexus")
CHILDREN_PATIENCE_S = 10.0
"""How long a start waits for the processes of a killed stack: they are ended within 4 s."""


@dataclass(frozen=True, slots=True)
class StackState:
    """What `state.json` holds while a stack runs."""

    pid: int
    url: str
    key: str = field(repr=False)
    ports: dict[str, int] = field(default_factory=dict)
    """Of each part, by name."""
    pids: dict[str, int] = field(default_factory=dict)
    """Of each part's process, by name; rewritten when one is restarted."""
    start_id: str = ""
    """Another one at each start of the stack."""
    environments: dict[str, dict[str, str]] = field(default_factory=dict)
    """By role, `gateway` or `worker`: the variables by which another process of that role joins. No secrets, but their files."""


@dataclass(frozen=True, slots=True)
class LockHolder:
    """Who holds the lock."""

    pid: int = 0
    url: str = ""
    identity: str = ""
    """Tells the process from a later one with the same pid."""


class DataDir:
    """Paths in the data directory, and what is done to them."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.lock_file = self.root / "lock"
        self.state_file = self.root / "state.json"
        self.children_file = self.root / "children.lock"
        self.ports_file = self.root / "ports.json"
        self.key_file = self.root / "key"
        self.operator_file = self.root / "operator.json"
        self.logs = self.root / "logs"
        self.secrets = self.root / "secrets"

    def prepare(self) -> None:
        """Make the folders. Raises ConsoleError when that cannot be."""
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            private_folder(self.logs)
            (self.root / ".gitignore").write_text("*\n")
        except OSError as error:
            raise ConsoleError(f"cannot use {self.root} ({error.strerror}); choose another --data-dir") from error

    def log(self, part: str) -> Path:
        """The log file of a part."""
        return self.logs / f"{part}.log"

    def sub(self, name: str) -> Path:
        """A server's own folder."""
        return private_folder(self.root / name)

    def environment_file(self, role: str) -> Path:
        """The file that a shell reads so that another process of this role joins the running stack."""
        return self.root / f"{role}.env"

    @contextmanager
    def locked(self, url: str) -> Iterator[None]:
        """Hold the directory for one stack. Raises ConsoleError, naming pid and URL, when another one does."""
        with open(self.lock_file, "a+", opener=open_private) as lock:
            if not _lock(lock.fileno()):
                raise ConsoleError(self.already())
            self.forget()  # what a killed one has left means nobody
            lock.truncate(0)
            json.dump(asdict(LockHolder(os.getpid(), url, process_identity(os.getpid()))), lock)
            lock.flush()
            try:
                yield
            finally:
                self.forget()

    @contextmanager
    def children_locked(self, notify: Callable[[str], None]) -> Iterator[int]:
        """A descriptor to be inherited by processes that must have ended before the next stack starts here.

        Waits for those of an earlier stack that was killed. Raises ConsoleError where they do not end.
        """
        with open(self.children_file, "a", opener=open_private) as lock:
            deadline = time.monotonic() + CHILDREN_PATIENCE_S
            told = False
            while not _lock(lock.fileno()):
                if time.monotonic() > deadline:
                    raise ConsoleError(
                        f"processes of an earlier `nexus up` still use {self.root}: end them (their folder is in "
                        f"their command lines: `pgrep -f {shlex.quote(str(self.root))}`), and try again"
                    )
                if not told:
                    notify("Waiting for the processes of an earlier, killed `nexus up` to end…")
                    told = True
            yield lock.fileno()

    def wait_for_children(self) -> bool:
        """Return whether the last stack's processes have ended, after a while at the latest."""
        deadline = time.monotonic() + CHILDREN_PATIENCE_S
        with open(self.children_file, "a", opener=open_private) as lock:
            while not (ended := _lock(lock.fileno())) and time.monotonic() < deadline:
                pass  # it takes its time
        return ended

    def already(self) -> str:
        """Say who runs here, and what to do."""
        holder = self.holder()
        where = f" at {holder.url}" if holder.url else ""
        return (
            f"Nexus already runs on {self.root}: pid {holder.pid or 'unknown'}{where}\n"
            "Stop it with `nexus down`, or with Ctrl-C in its terminal; or choose another --data-dir."
        )

    def holder(self) -> LockHolder:
        """Return what the lock's file says of the process that holds it, or held it last."""
        try:
            return LockHolder(**_read_json(self.lock_file))
        except (OSError, ValueError, TypeError):
            return LockHolder()

    def is_held(self) -> bool:
        """Whether a stack runs here now."""
        try:
            with self.lock_file.open("r") as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except OSError:
            return True
        return False

    def remember(self, state: StackState) -> None:
        """Write `state.json`, and a file of variables for each role, each whole or not at all."""
        write_private(self.state_file, json.dumps(asdict(state), indent=2) + "\n")
        for role, variables in state.environments.items():
            write_private(self.environment_file(role), self._exports(role, variables), durable=False)

    def _exports(self, role: str, variables: Mapping[str, str]) -> str:
        joining = {**variables, DATA_DIR_VARIABLE: str(self.root)}
        head = f"# For a {role} beside the running stack:  . {shlex.quote(str(self.environment_file(role)))}\n"
        return head + "".join(f"export {name}={shlex.quote(value)}\n" for name, value in joining.items())

    def forget(self) -> None:
        """Remove `state.json`, and what lets others join."""
        for file in (self.state_file, *map(self.environment_file, ("gateway", "worker"))):
            with suppress(OSError):
                file.unlink()
        shutil.rmtree(self.secrets, ignore_errors=True)

    def running(self) -> StackState | None:
        """The stack that runs here, None when there is none (a file left by a killed one does not count)."""
        if not self.is_held():
            return None
        try:
            return StackState(**_read_json(self.state_file))
        except (OSError, ValueError, TypeError):
            return None

    def ports(self) -> dict[str, int]:
        """The ports of the last start, by part."""
        try:
            read = _read_json(self.ports_file)
        except (OSError, ValueError, TypeError):
            return {}
        return {name: port for name, port in read.items() if isinstance(port, int) and 0 < port <= 65535}

    def keep_ports(self, ports: Mapping[str, int]) -> None:
        """Write them for the next start."""
        if self.ports() != dict(ports):
            write_private(self.ports_file, json.dumps(dict(ports), indent=2) + "\n", durable=False)

    def key(self) -> str:
        """The kept key; made at the first call."""
        try:
            kept = self.key_file.read_text().strip()
        except FileNotFoundError:
            kept = ""
        except OSError as error:
            raise ConsoleError(f"cannot read the key in {self.key_file} ({error.strerror})") from error
        if kept:
            return kept
        made = "nexus-" + secrets.token_urlsafe(24)
        write_private(self.key_file, made + "\n")
        return made

    def operator_data(self) -> dict[str, dict[str, Any]]:
        """Aliases and service records by kind and name. Raises ConsoleError when they are there but cannot be read."""
        try:
            read = _read_json(self.operator_file)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError) as error:
            raise ConsoleError(self._unreadable(error)) from error
        for kind, values in read.items():
            if not isinstance(values, dict):
                raise ConsoleError(self._unreadable(f"{kind} is not an object"))
        return read

    def _unreadable(self, why: object) -> str:
        return f"cannot read aliases and services from {self.operator_file} ({why}); mend it, or move it away"

    def keep_operator_data(self, data: dict[str, dict[str, Any]]) -> None:
        """Replace the file; after a crash it is the old one or the new one. Raises OSError."""
        write_private(self.operator_file, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def _read_json(path: Path) -> dict[str, Any]:
    """An object from a file. Raises OSError or ValueError."""
    read = json.loads(path.read_text())
    if not isinstance(read, dict):
        raise TypeError(f"{path} holds no object")
    return read


def _lock(fd: int) -> bool:
    """Lock for ourselves. Tries again shortly: `is_held` takes the lock for a moment, to look."""
    for _ in range(5):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            time.sleep(0.05)
        else:
            return True
    return False


def data_dir_from(option: Path | None) -> DataDir:
    """The directory by flag, else by `NEXUS_DATA_DIR`, else `.nexus`."""
    return DataDir(option or Path(os.environ.get(DATA_DIR_VARIABLE) or DEFAULT_DATA_DIR))
