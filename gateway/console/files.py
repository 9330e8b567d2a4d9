"""Read the built console into memory: each file as gzip, with the headers that browsers need."""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

APP = Path(__file__).parent / "app"
INDEX = "index.html"
ASSETS = "assets/"
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".wasm": "application/wasm",
}
DIRECTIVES = (
    "default-src 'none'",
    "script-src 'self'",
    "style-src 'self'",
    "img-src 'self' blob: data:",  # pictures that models make
    "media-src 'self' blob: data:",
    "connect-src 'self'",
    "worker-src 'self'",
    "base-uri 'none'",
    "form-action 'self'",
    "frame-ancestors 'none'",
)
POLICY = "; ".join(DIRECTIVES)
IMMUTABLE = "public, max-age=31536000, immutable"
"""For files whose name holds a hash of their content."""


class ConsoleFile(NamedTuple):
    """One file of the console."""

    compressed: bytes
    """Its content as gzip."""
    headers: Mapping[str, str]

    @property
    def content(self) -> bytes:
        """The content itself, for the few clients that do not accept gzip."""
        return gzip.decompress(self.compressed)


class ConsoleFiles:
    """Finds the files by their path below `/ui/`. Only what was built is found: a path never reaches the file system."""

    def __init__(self, folder: Path = APP) -> None:
        self._folder = folder
        self._index = folder / f"{INDEX}.gz"
        self._built_at: int | None = None
        self._files: dict[str, ConsoleFile] = {}

    def find(self, path: str) -> ConsoleFile | None:
        """Return a file, or the page for the path of a screen; None: there is no such file, or no console was built."""
        self._refresh()
        return self._files.get(path) or (None if path.startswith(ASSETS) else self._files.get(INDEX))

    @property
    def is_built(self) -> bool:
        """Whether there is a console."""
        self._refresh()
        return INDEX in self._files

    def _refresh(self) -> None:
        """Read the files when they are first needed, and again after a build."""
        try:
            built_at = self._index.stat().st_mtime_ns
        except OSError:
            built_at = None
        if built_at == self._built_at:
            return
        self._built_at = built_at
        found = self._folder.rglob("*.gz") if built_at is not None else ()
        self._files = dict(self._read(path) for path in found)

    def _read(self, path: Path) -> tuple[str, ConsoleFile]:
        name = path.relative_to(self._folder).as_posix().removesuffix(".gz")
        headers = {
            "content-type": MEDIA_TYPES.get(Path(name).suffix, "application/octet-stream"),
            "cache-control": IMMUTABLE if name.startswith(ASSETS) else "no-store",
            "vary": "accept-encoding",
        }
        if name == INDEX:
            headers["content-security-policy"] = POLICY
            headers["referrer-policy"] = "same-origin"
        return name, ConsoleFile(path.read_bytes(), headers)
