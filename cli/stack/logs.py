"""`nexus logs`: show the logs of the stack on the data directory, or what all processes have logged about one request."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, BinaryIO

import typer

from cli import options
from cli.errors import ConsoleError
from cli.log_search import is_id, show_found
from cli.stack.data_dir import DataDir, data_dir_from

FOLLOW_INTERVAL_S = 0.2
READ_BLOCK_BYTES = 64 * 1024


def logs(
    part: Annotated[
        str | None,
        typer.Argument(
            metavar="[PART | ID]",
            help="One component (nats, gateway, worker-smollm2, …; default: all), or the id of a request or a job: req_…, job_….",
        ),
    ] = None,
    *,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Print new lines until Ctrl-C.")] = False,
    lines: Annotated[
        int | None,
        typer.Option("--lines", "-n", min=0, help="Number of last lines: of each log, 20; about an id, 1000."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="With an ID: print JSON.")] = False,
    url: options.Url = None,
    key: options.Key = None,
    key_file: options.KeyFile = None,
    data_dir: options.Data = None,
) -> None:
    """Show the logs of the stack that runs, or ran last, on the data directory.

    With several logs, each line begins with the name of its component. With an ID, a gateway asks all gateways and workers for
    their newest log lines about it; the key needs the scope admin:read.
    """
    if part is not None and is_id(part):
        if follow:
            raise typer.BadParameter("--follow shows parts, not an ID")
        with options.client(url, key, data_dir, key_file) as api:
            show_found(api, part, 1000 if lines is None else lines, as_json=as_json)
        return
    lines = 20 if lines is None else lines
    data = data_dir_from(data_dir)
    files = _files(data, part)
    width = max(map(len, files)) if part is None else 0
    opened = {name: LogTail(path, f"{name:<{width}} | " if width else "") for name, path in files.items()}
    try:
        for one in opened.values():
            one.show_last(lines)
        while follow:
            time.sleep(FOLLOW_INTERVAL_S)
            if part is None:
                for name, path in _files(data, None).items():
                    opened.setdefault(name, LogTail(path, f"{name:<{width}} | "))
            for one in opened.values():
                one.show_new()
    except KeyboardInterrupt:
        return


def _files(data: DataDir, part: str | None) -> dict[str, Path]:
    """Return the log files by component. Raises ConsoleError."""
    found = {path.stem: path for path in sorted(data.logs.glob("*.log")) if path.exists()}
    if not found:
        raise ConsoleError(
            f"There are no logs in {data.logs}: no `nexus up` has run on {data.root}. Pass the --data-dir of one that has."
        )
    if part is None:
        return found
    if part not in found:
        raise ConsoleError(f"There is no log of {part!r}. There are: {', '.join(found)}")
    return {part: found[part]}


class LogTail:
    """Prints one log from an offset on. A rotated or replaced file is followed."""

    def __init__(self, path: Path, prefix: str) -> None:
        self._path = path
        self._prefix = prefix
        self._offset = 0
        self._inode = 0
        self._partial_line = b""

    def show_last(self, lines: int) -> None:
        """Print the last lines; `show_new` prints those that follow."""
        with self._path.open("rb") as log:
            self._inode = self._path.stat().st_ino
            self._offset = _start_of_last(log, lines)
        self.show_new()

    def show_new(self) -> None:
        """Print the whole lines that were written since the last call."""
        try:
            stat = self._path.stat()
        except OSError:
            return
        if stat.st_ino != self._inode or stat.st_size < self._offset:
            self._inode, self._offset, self._partial_line = stat.st_ino, 0, b""
        if stat.st_size == self._offset:
            return
        with self._path.open("rb") as log:
            log.seek(self._offset)
            new = log.read()
        self._offset += len(new)
        *whole, self._partial_line = (self._partial_line + new).split(b"\n")
        for line in whole:
            print(self._prefix + line.decode(errors="replace"))
        sys.stdout.flush()


def _start_of_last(log: BinaryIO, lines: int) -> int:
    """Return the offset of the last `lines` whole lines."""
    offset = end = log.seek(0, 2)
    found = b""
    while offset > 0 and found.count(b"\n") <= lines:
        size = min(READ_BLOCK_BYTES, offset)
        offset -= size
        log.seek(offset)
        found = log.read(size) + found
    split = found.split(b"\n")
    last = split[-1]  # an unfinished line is printed once it ends
    last_lines = split[:-1][-lines:] if lines else []
    return end - len(last) - sum(len(line) + 1 for line in last_lines)
