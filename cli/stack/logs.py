"""`nexus logs`: what the parts of the stack on the data directory have written."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, BinaryIO

import typer

from cli import options
from cli.errors import ConsoleError
from cli.stack.data_dir import DataDir, data_dir_from

FOLLOW_INTERVAL_S = 0.2
TAIL_BLOCK = 64 * 1024


def logs(
    part: Annotated[
        str | None, typer.Argument(help="As `nexus up` calls it: nats, gateway, worker-smollm2, …; default: all.")
    ] = None,
    *,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what comes, until Ctrl-C.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="The last lines of each part.")] = 20,
    data_dir: options.Data = None,
) -> None:
    """Show the logs of the stack that runs, or ran last, on the data directory; each line with its part where it is several."""
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
    """The logs by part. Raises ConsoleError."""
    found = {path.stem: path for path in sorted(data.logs.glob("*.log")) if path.exists()}
    if not found:
        raise ConsoleError(
            f"there are no logs in {data.logs}: no `nexus up` has run on {data.root}; give the --data-dir of one"
        )
    if part is None:
        return found
    if part not in found:
        raise ConsoleError(f"there is no log of {part!r}; there are: {', '.join(found)}")
    return {part: found[part]}


class LogTail:
    """One log, shown from somewhere on. A file that is moved aside, or made new, is followed."""

    def __init__(self, path: Path, prefix: str) -> None:
        self._path = path
        self._prefix = prefix
        self._place = 0
        self._inode = 0
        self._part_of_line = b""

    def show_last(self, lines: int) -> None:
        """Print the last lines; what comes later is new."""
        with self._path.open("rb") as log:
            self._inode = self._path.stat().st_ino
            self._place = _start_of_last(log, lines)
        self.show_new()

    def show_new(self) -> None:
        """Print what has been written since the last call, by whole lines."""
        try:
            stat = self._path.stat()
        except OSError:
            return
        if stat.st_ino != self._inode or stat.st_size < self._place:
            self._inode, self._place, self._part_of_line = stat.st_ino, 0, b""
        if stat.st_size == self._place:
            return
        with self._path.open("rb") as log:
            log.seek(self._place)
            new = log.read()
        self._place += len(new)
        *whole, self._part_of_line = (self._part_of_line + new).split(b"\n")
        for line in whole:
            print(self._prefix + line.decode(errors="replace"))
        sys.stdout.flush()


def _start_of_last(log: BinaryIO, lines: int) -> int:
    """Return where the last `lines` whole lines begin."""
    place = end = log.seek(0, 2)
    found = b""
    while place > 0 and found.count(b"\n") <= lines:
        size = min(TAIL_BLOCK, place)
        place -= size
        log.seek(place)
        found = log.read(size) + found
    kept = found.split(b"\n")
    last = kept[-1]  # a line that is not finished is shown when it is
    shown = kept[:-1][-lines:] if lines else []
    return end - len(last) - sum(len(line) + 1 for line in shown)
