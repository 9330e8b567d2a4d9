"""Compressed answers of inference servers, decoded as they arrive and within bounds.

The worker asks for `identity`; some servers and proxies compress all the same. An answer is decoded in slices of `SLICE_BYTES` bytes, so
that a bomb is never whole in memory; beyond `UNCHECKED_OUTPUT_BYTES` bytes it may be at most `MAX_RATIO` times as large as what came.
"""

from __future__ import annotations

import sys
import zlib
from typing import Protocol

from workers.backends.base import BackendError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

SLICE_BYTES = 256 * 1024
UNCHECKED_OUTPUT_BYTES = 16 * 1024 * 1024
MAX_RATIO = 200
WINDOW_LOG = 23
"""Of zstd: 8 MiB, as RFC 9659 wants it."""
CODINGS = frozenset({"gzip", "x-gzip", "deflate", "zstd"})


class ResponseDecoder:
    """Decodes one answer's body. Feed it with `decode`, and take what is left inside with `more` until that is empty."""

    def __init__(self, encoding: str, origin: str, *, whole: bool = True) -> None:
        """`encoding`: the header's value. Raises BackendError, which names it, for one that cannot be decoded.

        Without `whole` the body is only the text of an error: one that cannot be decoded is dropped.
        """
        self._coding = encoding.strip().lower()
        self._origin = origin
        self._dropped = not whole and self._coding not in CODINGS
        if self._coding not in CODINGS and whole:
            raise BackendError(
                f"{origin} answered in the Content-Encoding {encoding[:40]!r}, which was not asked for and cannot be decoded;"
                " turn compression off at the server or the proxy before it"
            )
        self._inner: _Decompressor | None = None
        self._rest = b""
        self._taken = self._made = 0

    def decode(self, data: bytes) -> bytes:
        """Return the next slice of what the answer holds with `data`. Raises BackendError."""
        if self._dropped:
            return b""
        self._taken += len(data)
        self._rest += data
        return self.more()

    def more(self) -> bytes:
        """Return the next slice; b"" when more input is needed. Raises BackendError."""
        try:
            while True:
                if self._inner is None and not self._begin():
                    return b""
                assert self._inner is not None
                data, self._rest = self._rest, b""
                out = self._inner.decode(data)
                if self._inner.eof:  # another member may follow
                    self._rest, self._inner = self._inner.unused_data, None
                if out:
                    return self._counted(out)
                if self._inner is not None or not self._rest:
                    return b""
        except (zlib.error, zstd.ZstdError) as error:
            raise BackendError(f"the answer of {self._origin} is not valid {self._coding}: {error}") from error

    def finish(self) -> None:
        """The connection brings no more. Raises BackendError where the answer is not complete."""
        if self._inner is not None or (self._rest and not self._made):
            message = f"the answer of {self._origin} ended before its {self._coding} data was complete"
            raise BackendError(message, transient=True)

    def _begin(self) -> bool:
        """Make a decoder for the member that begins here."""
        rest = self._rest
        if self._coding == "zstd":
            if rest:
                self._inner = _ZstdDecompressor()
        elif self._coding == "deflate":
            # The standard means zlib's format; some servers send raw deflate. The first two bytes tell.
            if len(rest) >= 2 and not self._made:
                is_zlib = rest[0] & 0x0F == 8 and (rest[0] * 256 + rest[1]) % 31 == 0
                self._inner = _ZlibDecompressor(zlib.MAX_WBITS if is_zlib else -zlib.MAX_WBITS)
        elif rest and (not self._made or rest[0] == 0x1F):  # what else follows a gzip member is padding
            self._inner = _ZlibDecompressor(16 + zlib.MAX_WBITS)
        return self._inner is not None

    def _counted(self, out: bytes) -> bytes:
        self._made += len(out)
        if self._made > UNCHECKED_OUTPUT_BYTES and self._made > MAX_RATIO * self._taken:
            raise BackendError(
                f"the {self._coding} answer of {self._origin} is more than {MAX_RATIO} times as large as what was sent;"
                " turn compression off at the server or the proxy before it"
            )
        return out


class _Decompressor(Protocol):
    """What zlib's and zstd's decoders have in common."""

    @property
    def eof(self) -> bool:
        """The member is complete."""

    @property
    def unused_data(self) -> bytes:
        """What follows it."""

    def decode(self, data: bytes) -> bytes:
        """At most `SLICE_BYTES` bytes; with b"", what is left inside."""


class _ZlibDecompressor:
    def __init__(self, window_bits: int) -> None:
        self._inner = zlib.decompressobj(window_bits)

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    def decode(self, data: bytes) -> bytes:
        return self._inner.decompress(self._inner.unconsumed_tail + data, SLICE_BYTES)


class _ZstdDecompressor:
    def __init__(self) -> None:
        self._inner = zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: WINDOW_LOG})

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    def decode(self, data: bytes) -> bytes:
        return self._inner.decompress(data, SLICE_BYTES)
