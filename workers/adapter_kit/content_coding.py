"""Decoding of compressed responses of inference servers, as they arrive and within bounds.

The worker requests `identity`; some servers and proxies compress all the same. A response is decoded in slices of `SLICE_BYTES`
bytes, so that a decompression bomb never fills the memory; beyond `UNCHECKED_OUTPUT_BYTES` bytes it may be at most `MAX_RATIO`
times as large as its compressed form.
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
"""The largest window of zstd: 8 MiB, as RFC 9659 requires."""
CODINGS = frozenset({"gzip", "x-gzip", "deflate", "zstd"})


class ResponseDecoder:
    """Decodes the body of one response. Feed it with `decode`, then call `more` until it returns nothing."""

    def __init__(self, encoding: str, origin: str, *, whole: bool = True) -> None:
        """Create a decoder. `encoding`: the header's value. Raises BackendError for an encoding that cannot be decoded.

        Without `whole` the body is only the text of an error, and is dropped where it cannot be decoded.
        """
        self._coding = encoding.strip().lower()
        self._origin = origin
        self._dropped = not whole and self._coding not in CODINGS
        if self._coding not in CODINGS and whole:
            raise BackendError(
                f"{origin} answered in the Content-Encoding {encoding[:40]!r}, which the worker did not request and cannot decode;"
                " turn compression off at the server or the proxy before it"
            )
        self._inner: _Decompressor | None = None
        self._input = b""
        self._bytes_in = self._bytes_out = 0

    def decode(self, data: bytes) -> bytes:
        """Add `data`; return the next slice of the decoded body. Raises BackendError."""
        if self._dropped:
            return b""
        self._bytes_in += len(data)
        self._input += data
        return self.more()

    def more(self) -> bytes:
        """Return the next slice of the decoded body; b"" when more input is needed. Raises BackendError."""
        try:
            while True:
                if self._inner is None and not self._begin_member():
                    return b""
                assert self._inner is not None
                data, self._input = self._input, b""
                out = self._inner.decode(data)
                if self._inner.eof:  # another member may follow
                    self._input, self._inner = self._inner.unused_data, None
                if out:
                    return self._check_ratio(out)
                if self._inner is not None or not self._input:
                    return b""
        except (zlib.error, zstd.ZstdError) as error:
            raise BackendError(f"the answer of {self._origin} is not valid {self._coding}: {error}") from error

    def finish(self) -> None:
        """Check that the body is complete at the end of the connection. Raises BackendError where it is not."""
        if self._inner is not None or (self._input and not self._bytes_out):
            message = f"the answer of {self._origin} ended before its {self._coding} data was complete"
            raise BackendError(message, transient=True)

    def _begin_member(self) -> bool:
        """Create a decompressor for the member that begins here."""
        rest = self._input
        if self._coding == "zstd":
            if rest:
                self._inner = _ZstdDecompressor()
        elif self._coding == "deflate":
            # The standard means zlib's format; some servers send raw deflate. The first two bytes show which.
            if len(rest) >= 2 and not self._bytes_out:
                is_zlib = rest[0] & 0x0F == 8 and (rest[0] * 256 + rest[1]) % 31 == 0
                self._inner = _ZlibDecompressor(zlib.MAX_WBITS if is_zlib else -zlib.MAX_WBITS)
        elif rest and (not self._bytes_out or rest[0] == 0x1F):  # other bytes after a gzip member are padding
            self._inner = _ZlibDecompressor(16 + zlib.MAX_WBITS)
        return self._inner is not None

    def _check_ratio(self, out: bytes) -> bytes:
        self._bytes_out += len(out)
        if self._bytes_out > UNCHECKED_OUTPUT_BYTES and self._bytes_out > MAX_RATIO * self._bytes_in:
            raise BackendError(
                f"the {self._coding} answer of {self._origin} is more than {MAX_RATIO} times as large as what was sent;"
                " turn compression off at the server or the proxy before it"
            )
        return out


class _Decompressor(Protocol):
    """What zlib's and zstd's decompressors have in common."""

    @property
    def eof(self) -> bool:
        """Whether the member is complete."""

    @property
    def unused_data(self) -> bytes:
        """The bytes that follow the member."""

    def decode(self, data: bytes) -> bytes:
        """Return at most `SLICE_BYTES` bytes; with b"", of the input that is left inside."""


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
