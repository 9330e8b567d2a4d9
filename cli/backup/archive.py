"""The folder of a backup: `manifest.json`, and one file for each part, which the manifest names with its size and SHA-256.

It is written beside its place under another name, and takes its name once everything is on the disk: a folder with a
manifest is whole, or was changed since. Prompts, answers and webhooks' secrets are in it: only its owner can read it.
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
    """One file."""

    name: str
    """`etcd`, `redis`, a stream's name, or `<stream>+`: what was stored in it while the others were read."""
    file: str
    bytes: int
    sha256: str
    items: int
    """Keys, lines or messages."""
    began_at: str
    ended_at: str
    about: dict[str, Any] = field(default_factory=dict)
    """Of a stream: `config` and `state`, as JetStream said them."""

    @property
    def kind(self) -> str:
        """What `--only` calls it."""
        return self.name if self.name in {"etcd", "redis"} else "streams"


@dataclass(frozen=True, slots=True)
class BackupManifest:
    """What the folder holds. `parts` are in the order in which they were taken."""

    nexus: str
    began_at: str
    ended_at: str
    servers: dict[str, str]
    parts: tuple[BackupPart, ...]
    format: str = FORMAT
    version: int = FORMAT_VERSION

    def part(self, name: str) -> BackupPart | None:
        """By its name."""
        return next((part for part in self.parts if part.name == name), None)

    @property
    def size(self) -> int:
        """Bytes of all parts."""
        return sum(part.bytes for part in self.parts)


class PartWriter:
    """One file as it is written; its size and digest."""

    def __init__(self, path: Path, notify: Notify) -> None:
        self.size = 0
        self.items = 0
        self.began_at = now()
        self._path = path
        self._notify = notify
        self._digest = sha256()
        self._file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")

    def write(self, data: bytes) -> int:
        """Append."""
        self._file.write(data)
        self._digest.update(data)
        before, self.size = self.size, self.size + len(data)
        if before // REPORT_EVERY_BYTES != self.size // REPORT_EVERY_BYTES:
            self._notify(f"  {self._path.name}: {format_size(self.size)} so far")
        return len(data)

    def flush(self) -> None:
        """For gzip."""

    def close(self) -> None:
        """Onto the disk."""
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def part(self, name: str, **about: Any) -> BackupPart:
        """What the manifest says of it."""
        return BackupPart(
            name, self._path.name, self.size, self._digest.hexdigest(), self.items, self.began_at, now(), about
        )


class BackupFolder:
    """A folder on its way."""

    def __init__(self, path: Path, notify: Notify) -> None:
        self.path = path
        self.parts: list[BackupPart] = []
        self._notify = notify

    @contextmanager
    def file(self, name: str) -> Iterator[PartWriter]:
        """A new file in it."""
        writer = PartWriter(self.path / name, self._notify)
        try:
            yield writer
        finally:
            writer.close()

    @contextmanager
    def lines(self, name: str) -> Iterator[tuple[PartWriter, Callable[[bytes], None]]]:
        """A new compressed file of lines."""
        with self.file(name) as writer, gzip.GzipFile("", "wb", 1, writer, mtime=0) as packed:

            def add(line: bytes) -> None:
                packed.write(line + b"\n")
                writer.items += 1

            yield writer, add

    def add(self, part: BackupPart) -> None:
        """It is whole."""
        self.parts.append(part)
        self._notify(f"{part.name:<22} {format_size(part.bytes):>10}  {part.items:>9,} items")


@contextmanager
def create_folder(target: Path, notify: Notify) -> Iterator[BackupFolder]:
    """A folder that is there once `finish` was called and this has ended well; otherwise nothing is. Raises ConsoleError."""
    target = target.absolute()
    fresh = target.with_name(f".{target.name}.partial-{os.getpid()}")
    if os.path.lexists(target):
        raise ConsoleError(f"{target} is there already: a backup never replaces anything; choose another name")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh.mkdir(mode=0o700)
    except OSError as error:
        raise ConsoleError(f"cannot write to {target.parent}: {error.strerror}") from error
    try:
        folder = BackupFolder(fresh, notify)
        yield folder
        _sync(fresh)
        if os.path.lexists(target):  # a rename would replace an empty folder
            raise ConsoleError(f"{target} was made by somebody else meanwhile; choose another name")
        fresh.rename(target)
        _sync(target.parent)
    except OSError as error:
        raise ConsoleError(f"cannot write to {target.parent}: {error.strerror}; nothing was kept") from error
    finally:
        with suppress(OSError):
            shutil.rmtree(fresh)


def write_manifest(folder: BackupFolder, manifest: BackupManifest) -> None:
    """The last file."""
    with folder.file(MANIFEST) as writer:
        writer.write(json.dumps(asdict(manifest), indent=1).encode() + b"\n")


def read_manifest(source: Path) -> BackupManifest:
    """What a folder says that it holds. Raises ConsoleError."""
    path = source / MANIFEST
    try:
        said = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ConsoleError(f"{source} is no backup, or one that was never finished: it has no {MANIFEST}") from None
    except OSError as error:
        raise ConsoleError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConsoleError(f"{path} is damaged: {error}") from error
    if not isinstance(said, dict) or said.get("format") != FORMAT:
        raise ConsoleError(f"{path} is no manifest of a Nexus backup")
    if said.get("version") != FORMAT_VERSION:
        raise ConsoleError(
            f"{source} is of format {said.get('version')}, and this Nexus reads {FORMAT_VERSION}: "
            f"use Nexus {said.get('nexus')}, which wrote it"
        )
    try:
        manifest = BackupManifest(**{**said, "parts": tuple(BackupPart(**part) for part in said["parts"])})
    except (TypeError, KeyError) as error:
        raise ConsoleError(f"{path} is damaged: {error}") from error
    for part in manifest.parts:
        if not _FILE.fullmatch(part.file):
            raise ConsoleError(f"{path} is damaged: {part.file!r} is no name of a part")
    return manifest


def verify(source: Path, parts: Iterable[BackupPart], notify: Notify) -> None:
    """Compare files with what the manifest says. Raises ConsoleError, naming everything that is wrong."""
    wrong = []
    for part in parts:
        problem = _problem(source / part.file, part)
        notify(f"{part.name:<22} {problem or 'ok'}")
        if problem:
            wrong.append(f"  {part.file}: {problem}")
    if wrong:
        raise ConsoleError(f"{source} is damaged, and nothing was restored from it:\n" + "\n".join(wrong))


def _problem(path: Path, part: BackupPart) -> str:
    digest, size = sha256(), 0
    try:
        for chunk in read_chunks(path):
            digest.update(chunk)
            size += len(chunk)
    except OSError as error:
        return error.strerror or str(error)
    if size != part.bytes:
        return f"{size} bytes in the place of {part.bytes}"
    return "" if digest.hexdigest() == part.sha256 else "another SHA-256 than the manifest's"


def read_chunks(path: Path, size: int = READ_CHUNK_BYTES) -> Iterator[bytes]:
    """A file's bytes, a piece at a time."""
    with path.open("rb") as file:
        while chunk := file.read(size):
            yield chunk


def read_lines(path: Path) -> Iterator[bytes]:
    """The lines of a compressed file."""
    with gzip.open(path, "rb") as file:
        for line in file:
            yield line.rstrip(b"\n")


def read_exactly(file: IO[bytes], size: int) -> bytes:
    """So many bytes. Raises ConsoleError where the file ends before."""
    data = file.read(size)
    if len(data) != size:
        raise ConsoleError("a part of the backup ends in the middle of a message")
    return data


def now() -> str:
    """UTC, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def format_size(size: int) -> str:
    """For people."""
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
