"""The data directory of `nexus up`: the lock, the state of the running stack, the key, logs and servers' data.

```
.nexus/
  lock           locked (flock) while a stack runs here; contains its pid and URL
  children.lock  locked by its processes too: after a kill, until the last of them has ended
  state.json     0600: pid, URL, key and ports of the running stack; removed at its end
  key            0600: the bootstrap key, made at the first start
  ports.json     the ports of the components, reused by the next start
  operator.json  aliases, service records and holds, restored by the next start
  secrets/       0700: passwords and certificates of the running stack's servers, new at each start
  worker.env     0600: variables with which another worker joins the running stack; gateway.env: the same for a gateway
  logs/          0700: one file per component
  ledger.db      0600: the usage ledger, a SQLite database; ledger.db-wal, ledger.db-shm: its journal and index
  usage/         0700: usage that gateways have written down and NATS has not stored yet
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
CHILDREN_TIMEOUT_S = 10.0
"""How long a start waits for the processes of a killed stack; the orphan guard ends them within 4 s."""


@dataclass(frozen=True, slots=True)
class StackState:
    """Content of `state.json` while a stack runs."""

    pid: int
    url: str
    key: str = field(repr=False)
    ports: dict[str, int] = field(default_factory=dict)
    """Ports, by component."""
    pids: dict[str, int] = field(default_factory=dict)
    """Process ids, by component; updated after each restart of one."""
    start_id: str = ""
    """Id of this start of the stack."""
    environments: dict[str, dict[str, str]] = field(default_factory=dict)
    """By role, `gateway` or `worker`: variables with which another process joins. They name files of secrets, not secrets."""


@dataclass(frozen=True, slots=True)
class LockHolder:
    """The process that holds the lock."""

    pid: int = 0
    url: str = ""
    identity: str = ""
    """Distinguishes the process from a later one with the same pid."""


class DataDir:
    """Paths in the data directory, and the operations on its files."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.lock_file = self.root / "lock"
        self.state_file = self.root / "state.json"
        self.children_file = self.root / "children.lock"
        self.ports_file = self.root / "ports.json"
        self.key_file = self.root / "key"
        self.operator_file = self.root / "operator.json"
        self.ledger = self.root / "ledger.db"
        self.logs = self.root / "logs"
        self.secrets = self.root / "secrets"

    def prepare(self) -> None:
        """Create the folders. Raises ConsoleError."""
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            private_folder(self.logs)
            (self.root / ".gitignore").write_text("*\n")
        except OSError as error:
            raise ConsoleError(f"Cannot use {self.root} ({error.strerror}). Choose another --data-dir.") from error

    def log(self, component: str) -> Path:
        """Return the log file of a component."""
        return self.logs / f"{component}.log"

    def folder(self, name: str) -> Path:
        """Create and return the folder of one server."""
        return private_folder(self.root / name)

    def environment_file(self, role: str) -> Path:
        """Return the file that a shell reads so that another process of this role joins the running stack."""
        return self.root / f"{role}.env"

    @contextmanager
    def locked(self, url: str) -> Iterator[None]:
        """Lock the directory for one stack. Raises ConsoleError, with pid and URL, if another stack runs here."""
        with open(self.lock_file, "a+", opener=open_private) as lock:
            if not _lock(lock.fileno()):
                raise ConsoleError(self._describe_holder())
            self.clear_state()  # a killed stack leaves its files
            lock.truncate(0)
            json.dump(asdict(LockHolder(os.getpid(), url, process_identity(os.getpid()))), lock)
            lock.flush()
            try:
                yield
            finally:
                self.clear_state()

    @contextmanager
    def children_locked(self, notify: Callable[[str], None]) -> Iterator[int]:
        """Lock the directory for the stack's processes: they inherit the descriptor, and must end before the next start.

        Waits for the processes of a killed stack. Raises ConsoleError if they do not end.
        """
        with open(self.children_file, "a", opener=open_private) as lock:
            deadline = time.monotonic() + CHILDREN_TIMEOUT_S
            notified = False
            while not _lock(lock.fileno()):
                if time.monotonic() > deadline:
                    raise ConsoleError(
                        f"Processes of an earlier `nexus up` still use {self.root}. End them and try again; "
                        f"`pgrep -f {shlex.quote(str(self.root))}` finds them by the folder in their command lines."
                    )
                if not notified:
                    notify("Waiting for the processes of an earlier, killed `nexus up` to end…")
                    notified = True
            yield lock.fileno()

    def wait_for_children(self) -> bool:
        """Wait for the last stack's processes to end. Returns whether they have ended in time."""
        deadline = time.monotonic() + CHILDREN_TIMEOUT_S
        with open(self.children_file, "a", opener=open_private) as lock:
            while not (ended := _lock(lock.fileno())) and time.monotonic() < deadline:
                pass  # `_lock` waits between its tries
        return ended

    def _describe_holder(self) -> str:
        """Return a message that names the running stack, and how to stop it."""
        holder = self.holder()
        location = f" at {holder.url}" if holder.url else ""
        return (
            f"Nexus already runs on {self.root}: pid {holder.pid or 'unknown'}{location}\n"
            "Stop it with `nexus down` or with Ctrl-C in its terminal, or choose another --data-dir."
        )

    def holder(self) -> LockHolder:
        """Return the process that holds the lock, or held it last."""
        try:
            return LockHolder(**_read_json(self.lock_file))
        except (OSError, ValueError, TypeError):
            return LockHolder()

    def is_held(self) -> bool:
        """Return whether a stack runs here now."""
        try:
            with self.lock_file.open("r") as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except OSError:
            return True
        return False

    def save_state(self, state: StackState) -> None:
        """Write `state.json` and the file of variables for each role, each atomically."""
        write_private(self.state_file, json.dumps(asdict(state), indent=2) + "\n")
        for role, variables in state.environments.items():
            write_private(self.environment_file(role), self._exports(role, variables), durable=False)

    def _exports(self, role: str, variables: Mapping[str, str]) -> str:
        exported = {**variables, DATA_DIR_VARIABLE: str(self.root)}
        head = f"# For a {role} beside the running stack:  . {shlex.quote(str(self.environment_file(role)))}\n"
        return head + "".join(f"export {name}={shlex.quote(value)}\n" for name, value in exported.items())

    def clear_state(self) -> None:
        """Remove `state.json`, the files of variables and the secrets."""
        for file in (self.state_file, *map(self.environment_file, ("gateway", "worker"))):
            with suppress(OSError):
                file.unlink()
        shutil.rmtree(self.secrets, ignore_errors=True)

    def running(self) -> StackState | None:
        """Return the stack that runs here, None if none runs. The file of a killed stack does not count."""
        if not self.is_held():
            return None
        try:
            return StackState(**_read_json(self.state_file))
        except (OSError, ValueError, TypeError):
            return None

    def ports(self) -> dict[str, int]:
        """Return the ports of the last start, by component."""
        try:
            read = _read_json(self.ports_file)
        except (OSError, ValueError, TypeError):
            return {}
        return {name: port for name, port in read.items() if isinstance(port, int) and 0 < port <= 65535}

    def save_ports(self, ports: Mapping[str, int]) -> None:
        """Write the ports for the next start."""
        if self.ports() != dict(ports):
            write_private(self.ports_file, json.dumps(dict(ports), indent=2) + "\n", durable=False)

    def key(self) -> str:
        """Return the key, which the first call makes. Raises ConsoleError."""
        try:
            key = self.key_file.read_text().strip()
        except FileNotFoundError:
            key = ""
        except OSError as error:
            raise ConsoleError(f"Cannot read the key in {self.key_file} ({error.strerror}).") from error
        if key:
            return key
        key = "nexus-" + secrets.token_urlsafe(24)
        write_private(self.key_file, key + "\n")
        return key

    def operator_data(self) -> dict[str, dict[str, Any]]:
        """Return aliases, service records and holds by kind and name. Raises ConsoleError if their file cannot be read."""
        try:
            read = _read_json(self.operator_file)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError) as error:
            raise ConsoleError(self._describe_unreadable(error)) from error
        for kind, values in read.items():
            if not isinstance(values, dict):
                raise ConsoleError(self._describe_unreadable(f"{kind} is not an object"))
        return read

    def _describe_unreadable(self, reason: object) -> str:
        return f"Cannot read aliases and services from {self.operator_file} ({reason}). Fix the file, or move it away."

    def save_operator_data(self, data: dict[str, dict[str, Any]]) -> None:
        """Replace the file atomically. Raises OSError."""
        write_private(self.operator_file, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def _read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raises OSError, ValueError or TypeError."""
    read = json.loads(path.read_text())
    if not isinstance(read, dict):
        raise TypeError(f"{path} does not hold a JSON object")
    return read


def _lock(fd: int) -> bool:
    """Lock a file and return whether that succeeded. Retries: `is_held` takes the lock for a moment."""
    for _ in range(5):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            time.sleep(0.05)
        else:
            return True
    return False


def data_dir_from(option: Path | None) -> DataDir:
    """Return the directory of the flag, else of `NEXUS_DATA_DIR`, else `.nexus`."""
    return DataDir(option or Path(os.environ.get(DATA_DIR_VARIABLE) or DEFAULT_DATA_DIR))
