"""The folder of a backup: `manifest.json`, and a file for each part, whose size and SHA-256 the manifest lists.

The folder is written under another name and renamed once everything is on the disk: a folder with a manifest is complete,
unless it was changed since. It holds prompts, answers and secrets of webhooks: only its owner can read it.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

from cli.errors import ConsoleError

FORMAT = "nexus-backup"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
READ_CHUNK_BYTES = 256 * 1024
REPORT_EVERY_BYTES = 256 * 1024 * 1024
_FILE = re.compile(r"[A-Za-z0-9_.-]{1,100}")

Notify = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class BackupPart:
    """One file of a backup."""

    name: str
    """`etcd`, `redis`, a stream's name, or `<stream>+` for messages stored while the other parts were read."""
    file: str
    bytes: int
    sha256: str
    items: int
    """Number of keys, lines or messages."""
    began_at: str
    ended_at: str
    about: dict[str, Any] = field(default_factory=dict)
    """For a stream: JetStream's `config` and `state`."""

    @property
    def kind(self) -> str:
        """Its kind in `--only`."""
        return self.name if self.name in {"etcd", "redis"} else "streams"


@dataclass(frozen=True, slots=True)
class BackupManifest:
    """The content of a backup. `parts` are in the order in which they were written."""

    nexus: str
    began_at: str
    ended_at: str
    servers: dict[str, str]
    parts: tuple[BackupPart, ...]
    format: str = FORMAT
    version: int = FORMAT_VERSION

    def part(self, name: str) -> BackupPart | None:
        """Return a part by its name, None if it is missing."""
        return next((part for part in self.parts if part.name == name), None)

    @property
    def size(self) -> int:
        """Size of all parts in bytes."""
        return sum(part.bytes for part in self.parts)


class PartWriter:
    """Writes one file, and counts its size and digest."""

    def __init__(self, path: Path, notify: Notify) -> None:
        self.size = 0
        self.items = 0
        self.began_at = now()
        self._path = path
        self._notify = notify
        self._digest = sha256()
        self._file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")

    def write(self, data: bytes) -> int:
        """Append data and return its size."""
        self._file.write(data)
        self._digest.update(data)
        before, self.size = self.size, self.size + len(data)
        if before // REPORT_EVERY_BYTES != self.size // REPORT_EVERY_BYTES:
            self._notify(f"  {self._path.name}: {format_size(self.size)} so far")
        return len(data)

    def flush(self) -> None:
        """Do nothing; gzip requires it."""

    def close(self) -> None:
        """Write the file to the disk and close it."""
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def part(self, name: str, **about: Any) -> BackupPart:
        """Return the entry for the manifest."""
        return BackupPart(
            name, self._path.name, self.size, self._digest.hexdigest(), self.items, self.began_at, now(), about
        )


class BackupFolder:
    """A backup that is being written."""

    def __init__(self, path: Path, notify: Notify) -> None:
        self.path = path
        self.parts: list[BackupPart] = []
        self._notify = notify

    @contextmanager
    def file(self, name: str) -> Iterator[PartWriter]:
        """Open a new file."""
        writer = PartWriter(self.path / name, self._notify)
        try:
            yield writer
        finally:
            writer.close()

    @contextmanager
    def lines(self, name: str) -> Iterator[tuple[PartWriter, Callable[[bytes], None]]]:
        """Open a new compressed file of lines. Yields its writer and a function that appends a line."""
        with self.file(name) as writer, gzip.GzipFile("", "wb", 1, writer, mtime=0) as packed:

            def add(line: bytes) -> None:
                packed.write(line + b"\n")
                writer.items += 1

            yield writer, add

    def add(self, part: BackupPart) -> None:
        """List a complete part."""
        self.parts.append(part)
        self._notify(f"{part.name:<22} {format_size(part.bytes):>10}  {part.items:>9,} items")


@contextmanager
def create_folder(target: Path, notify: Notify) -> Iterator[BackupFolder]:
    """Create a folder that appears once the block ends without an error; otherwise nothing remains. Raises ConsoleError."""
    target = target.absolute()
    fresh = target.with_name(f".{target.name}.partial-{os.getpid()}")
    if os.path.lexists(target):
        raise ConsoleError(f"{target} already exists, and a backup never replaces anything. Choose another name.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh.mkdir(mode=0o700)
    except OSError as error:
        raise ConsoleError(f"Cannot write to {target.parent}: {error.strerror}") from error
    try:
        folder = BackupFolder(fresh, notify)
        yield folder
        _sync(fresh)
        if os.path.lexists(target):  # a rename would replace an empty folder
            raise ConsoleError(f"{target} was created by another process meanwhile. Choose another name.")
        fresh.rename(target)
        _sync(target.parent)
    except OSError as error:
        raise ConsoleError(f"Cannot write to {target.parent}: {error.strerror}. Nothing was saved.") from error
    finally:
        with suppress(OSError):
            shutil.rmtree(fresh)


def write_manifest(folder: BackupFolder, manifest: BackupManifest) -> None:
    """Write the manifest, which must be the last file."""
    with folder.file(MANIFEST) as writer:
        writer.write(json.dumps(asdict(manifest), indent=1).encode() + b"\n")


def read_manifest(source: Path) -> BackupManifest:
    """Read the manifest of a folder. Raises ConsoleError."""
    path = source / MANIFEST
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ConsoleError(f"{source} is not a backup, or an unfinished one: it has no {MANIFEST}.") from None
    except OSError as error:
        raise ConsoleError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConsoleError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ConsoleError(f"{path} is not the manifest of a Nexus backup.")
    if content.get("version") != FORMAT_VERSION:
        raise ConsoleError(
            f"{source} has format {content.get('version')}, and this Nexus reads format {FORMAT_VERSION}. "
            f"Use Nexus {content.get('nexus')}, which wrote it."
        )
    try:
        manifest = BackupManifest(**{**content, "parts": tuple(BackupPart(**part) for part in content["parts"])})
    except (TypeError, KeyError) as error:
        raise ConsoleError(f"{path} is damaged: {error}") from error
    for part in manifest.parts:
        if not _FILE.fullmatch(part.file):
            raise ConsoleError(f"{path} is damaged: {part.file!r} is not a valid file name of a part")
    return manifest


def verify(source: Path, parts: Iterable[BackupPart], notify: Notify) -> None:
    """Compare files with the manifest. Raises ConsoleError, naming every damaged file."""
    damaged = []
    for part in parts:
        problem = _find_problem(source / part.file, part)
        notify(f"{part.name:<22} {problem or 'ok'}")
        if problem:
            damaged.append(f"  {part.file}: {problem}")
    if damaged:
        raise ConsoleError(f"{source} is damaged, and nothing was restored from it:\n" + "\n".join(damaged))


def _find_problem(path: Path, part: BackupPart) -> str:
    digest, size = sha256(), 0
    try:
        for chunk in read_chunks(path):
            digest.update(chunk)
            size += len(chunk)
    except OSError as error:
        return error.strerror or str(error)
    if size != part.bytes:
        return f"{size} bytes instead of {part.bytes}"
    return "" if digest.hexdigest() == part.sha256 else "its SHA-256 differs from the manifest's"


def read_chunks(path: Path, size: int = READ_CHUNK_BYTES) -> Iterator[bytes]:
    """Yield the content of a file in chunks."""
    with path.open("rb") as file:
        while chunk := file.read(size):
            yield chunk


def read_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a compressed file."""
    with gzip.open(path, "rb") as file:
        for line in file:
            yield line.rstrip(b"\n")


def read_exactly(file: IO[bytes], size: int) -> bytes:
    """Return `size` bytes. Raises ConsoleError if the file ends before."""
    data = file.read(size)
    if len(data) != size:
        raise ConsoleError(
            "A part of the backup ends in the middle of a message. Check it with `nexus backup --verify`."
        )
    return data


def now() -> str:
    """Return the time in UTC as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def format_size(size: int) -> str:
    """Return a size in B, KB, MB or GB."""
    value = float(size)
    for unit in ("B", "KB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
