"""Decode the Content-Encodings of request bodies as they arrive, within bounds.

| bound | protects |
|---|---|
| output is produced in slices of `SLICE_BYTES` | memory: a decompression bomb is never whole in it |
| each coding's output is at most the body's limit | memory and time, also of nested codings |
| beyond `FREE_OUTPUT_BYTES` each coding expands its input at most `MAX_RATIO` times | time |
| at most `MAX_CODINGS` codings, `MAX_MEMBERS` gzip members or zstd frames | time |
| a zstd window is at most `ZSTD_WINDOW_BYTES`, as RFC 9659 requires | memory |
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Protocol

from schemas.errors import ACCEPTED_ENCODINGS, InvalidRequest, RequestTooLarge, UnsupportedEncoding

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

SLICE_BYTES = 64 * 1024
FREE_OUTPUT_BYTES = 1024 * 1024
MAX_RATIO = 100
MAX_CODINGS = 3
MAX_MEMBERS = 1024
ZSTD_WINDOW_LOG = 23
ZSTD_WINDOW_BYTES = 1 << ZSTD_WINDOW_LOG
"""Most bytes of earlier output that a zstd decoder keeps."""
INFLATE_WINDOW_BYTES = 32 * 1024
ERROR_CODE = "invalid_content_encoding"


class BodyDecoder:
    """Decodes the codings of one body."""

    def __init__(self, encoding: bytes, limit: int) -> None:
        """Parse `encoding`, the header Content-Encoding. `limit`: bytes of the decoded body. Raises UnsupportedEncoding."""
        names = _parse_names(encoding)
        self._codings = [_CodingDecoder(name, limit) for name in reversed(names)]
        self.window = sum(coding.window for coding in self._codings)
        """Most bytes of memory that the decoders take beside their output."""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield the decoded bytes of `data`, in slices. Raises InvalidRequest, RequestTooLarge."""
        return self._decode(data, 0)

    def finish(self) -> None:
        """Check that the body is complete. Raises InvalidRequest."""
        for coding in self._codings:
            coding.finish()

    def _decode(self, data: bytes, level: int) -> Iterator[bytes]:
        if level == len(self._codings):
            yield data
            return
        for piece in self._codings[level].feed(data):
            yield from self._decode(piece, level + 1)


def _parse_names(encoding: bytes) -> list[str]:
    names = [name.strip().lower() for name in encoding.decode("latin-1").split(",")]
    names = [name for name in names if name and name != "identity"]
    for name in names:
        if name not in _DECODERS:
            raise UnsupportedEncoding(
                f"The Content-Encoding {name[:40]!r} is not supported. Send the body in one of these: "
                f"{ACCEPTED_ENCODINGS}, or without any."
            )
    if len(names) > MAX_CODINGS:
        raise UnsupportedEncoding(f"The body has more than {MAX_CODINGS} Content-Encodings. Send it with one.")
    return names


class _MemberDecoder(Protocol):
    """Decodes one gzip member, deflate stream or zstd frame."""

    @property
    def ended(self) -> bool:
        """Whether the member is complete."""

    @property
    def rest(self) -> bytes:
        """Bytes behind the member."""

    def decode(self, data: bytes) -> bytes:
        """Return at most `SLICE_BYTES` of output; `b""` as input continues with buffered output."""

    @property
    def has_more(self) -> bool:
        """Whether output is buffered that needs no more input."""


class _InflateDecoder:
    def __init__(self, window_bits: int) -> None:
        self._inner = zlib.decompressobj(window_bits)
        self._full = False

    @property
    def ended(self) -> bool:
        return self._inner.eof

    @property
    def rest(self) -> bytes:
        return self._inner.unused_data

    def decode(self, data: bytes) -> bytes:
        out = self._inner.decompress(self._inner.unconsumed_tail + data, SLICE_BYTES)
        self._full = len(out) == SLICE_BYTES
        return out

    @property
    def has_more(self) -> bool:
        return bool(self._inner.unconsumed_tail) or self._full


class _ZstdDecoder:
    def __init__(self) -> None:
        self._inner = zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: ZSTD_WINDOW_LOG})

    @property
    def ended(self) -> bool:
        return self._inner.eof

    @property
    def rest(self) -> bytes:
        return self._inner.unused_data

    def decode(self, data: bytes) -> bytes:
        return self._inner.decompress(data, SLICE_BYTES)

    @property
    def has_more(self) -> bool:
        return not self._inner.needs_input


class _CodingDecoder:
    """Decodes one coding, member after member, within its bounds."""

    def __init__(self, name: str, limit: int) -> None:
        self._name = name
        self._limit = limit
        self._decoder: _MemberDecoder | None = None
        self._members = 0
        self._input_size = self._output_size = 0
        self.window = ZSTD_WINDOW_BYTES if name == "zstd" else INFLATE_WINDOW_BYTES

    def feed(self, data: bytes) -> Iterator[bytes]:
        self._input_size += len(data)
        while data:
            if self._decoder is None or self._decoder.ended:
                self._decoder = self._next(data)
            decoder = self._decoder
            yield from self._member(decoder, data)
            if not decoder.ended:
                return
            data = decoder.rest

    def _member(self, decoder: _MemberDecoder, data: bytes) -> Iterator[bytes]:
        try:
            out = decoder.decode(data)
            while True:
                if out:
                    self._count(len(out))
                    yield out
                if decoder.ended or not decoder.has_more:
                    return
                out = decoder.decode(b"")
                if not out and not decoder.ended:
                    return
        except (zlib.error, zstd.ZstdError) as error:
            raise InvalidRequest(f"The request's body is not valid {self._name}: {error}.", code=ERROR_CODE) from error

    def _next(self, data: bytes) -> _MemberDecoder:
        self._members += 1
        if self._members > MAX_MEMBERS:
            raise InvalidRequest(
                f"The request's body has more than {MAX_MEMBERS} {self._name} members.", code=ERROR_CODE
            )
        if self._members > 1 and self._name == "deflate":
            raise InvalidRequest("The request's body has bytes behind its deflate stream.", code=ERROR_CODE)
        return _DECODERS[self._name](data)

    def _count(self, size: int) -> None:
        self._output_size += size
        if self._output_size > self._limit:
            raise RequestTooLarge(f"The request's body decodes to more than the limit of {self._limit} bytes.")
        if self._output_size > FREE_OUTPUT_BYTES and self._output_size > MAX_RATIO * self._input_size:
            raise RequestTooLarge(
                f"The request's body decodes to more than {MAX_RATIO} times its size. Send it without Content-Encoding."
            )

    def finish(self) -> None:
        if self._decoder is not None and not self._decoder.ended:
            raise InvalidRequest(
                f"The request's body ended before its {self._name} data was complete. Send all of it.", code=ERROR_CODE
            )


def _deflate(data: bytes) -> _MemberDecoder:
    """Return a decoder for `deflate`: zlib's format as RFC 9110 says, or raw deflate as some clients send. The first bytes tell."""
    zlib_header = data[0] & 0x0F == 8 and data[0] >> 4 <= 7 and (len(data) < 2 or (data[0] * 256 + data[1]) % 31 == 0)
    return _InflateDecoder(zlib.MAX_WBITS if zlib_header else -zlib.MAX_WBITS)


def _gzip(_data: bytes) -> _MemberDecoder:
    return _InflateDecoder(16 + zlib.MAX_WBITS)


_DECODERS: dict[str, Callable[[bytes], _MemberDecoder]] = {
    "gzip": _gzip,
    "x-gzip": _gzip,
    "deflate": _deflate,
    "zstd": lambda _data: _ZstdDecoder(),
}
