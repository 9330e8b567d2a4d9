"""Content-Encodings of request bodies, decoded as they arrive and within bounds.

| bound | protects |
|---|---|
| the output is made in slices of `SLICE` bytes | memory: a bomb is never whole |
| each coding's output is at most the body's limit | memory and time, also where one coding is inside another |
| beyond `FREE_OUTPUT` bytes each coding grows its input at most `MAX_RATIO` times | time |
| at most `MAX_CODINGS` codings, `MAX_MEMBERS` gzip members or zstd frames | time |
| a zstd window is at most `WINDOW` bytes, as RFC 9659 wants it | memory |
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

SLICE = 64 * 1024
FREE_OUTPUT = 1024 * 1024
MAX_RATIO = 100
MAX_CODINGS = 3
MAX_MEMBERS = 1024
WINDOW_LOG = 23
WINDOW = 1 << WINDOW_LOG
"""Bytes of earlier output that a zstd decoder holds at most."""
INFLATE_WINDOW = 32 * 1024
CODE = "invalid_content_encoding"


class BodyDecoder:
    """One body's codings, the outermost first."""

    def __init__(self, encoding: bytes, limit: int) -> None:
        """`encoding`: the header's value. Raises UnsupportedEncoding."""
        names = _names(encoding)
        self._layers = [_Layer(name, limit) for name in reversed(names)]
        self.window = sum(layer.window for layer in self._layers)
        """Bytes of memory that the decoders may hold beside their output."""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield what `data` adds to the decoded body, in slices. Raises InvalidRequest, RequestTooLarge."""
        return self._through(data, 0)

    def finish(self) -> None:
        """Check that the body is complete. Raises InvalidRequest."""
        for layer in self._layers:
            layer.finish()

    def _through(self, data: bytes, level: int) -> Iterator[bytes]:
        if level == len(self._layers):
            yield data
            return
        for piece in self._layers[level].feed(data):
            yield from self._through(piece, level + 1)


def _names(encoding: bytes) -> list[str]:
    names = [name.strip().lower() for name in encoding.decode("latin-1").split(",")]
    names = [name for name in names if name and name != "identity"]
    for name in names:
        if name not in _DECODERS:
            raise UnsupportedEncoding(
                f"the Content-Encoding {name[:40]!r} is not supported; send the body in one of these: "
                f"{ACCEPTED_ENCODINGS}, or without any"
            )
    if len(names) > MAX_CODINGS:
        raise UnsupportedEncoding(f"the body has more than {MAX_CODINGS} Content-Encodings; send it with one of them")
    return names


class _Decoder(Protocol):
    """What zlib's and zstd's decoders have in common once wrapped."""

    @property
    def ended(self) -> bool:
        """The member is complete."""

    @property
    def rest(self) -> bytes:
        """What follows the member."""

    def decode(self, data: bytes) -> bytes:
        """Return at most `SLICE` bytes; with `b""` give what is still inside."""

    @property
    def has_more(self) -> bool:
        """There is output that needs no more input."""


class _Inflate:
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
        out = self._inner.decompress(self._inner.unconsumed_tail + data, SLICE)
        self._full = len(out) == SLICE
        return out

    @property
    def has_more(self) -> bool:
        return bool(self._inner.unconsumed_tail) or self._full


class _Zstd:
    def __init__(self) -> None:
        self._inner = zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: WINDOW_LOG})

    @property
    def ended(self) -> bool:
        return self._inner.eof

    @property
    def rest(self) -> bytes:
        return self._inner.unused_data

    def decode(self, data: bytes) -> bytes:
        return self._inner.decompress(data, SLICE)

    @property
    def has_more(self) -> bool:
        return not self._inner.needs_input


class _Layer:
    """One coding: its members one after another, and its bounds."""

    def __init__(self, name: str, limit: int) -> None:
        self._name = name
        self._limit = limit
        self._decoder: _Decoder | None = None
        self._members = 0
        self._taken = self._made = 0
        self.window = WINDOW if name == "zstd" else INFLATE_WINDOW

    def feed(self, data: bytes) -> Iterator[bytes]:
        self._taken += len(data)
        while data:
            if self._decoder is None or self._decoder.ended:
                self._decoder = self._next(data)
            decoder = self._decoder
            yield from self._member(decoder, data)
            if not decoder.ended:
                return
            data = decoder.rest

    def _member(self, decoder: _Decoder, data: bytes) -> Iterator[bytes]:
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
            raise InvalidRequest(f"the request's body is not valid {self._name}: {error}", code=CODE) from error

    def _next(self, data: bytes) -> _Decoder:
        self._members += 1
        if self._members > MAX_MEMBERS:
            raise InvalidRequest(f"the request's body has more than {MAX_MEMBERS} {self._name} members", code=CODE)
        if self._members > 1 and self._name == "deflate":
            raise InvalidRequest("the request's body goes on after its deflate stream ended", code=CODE)
        return _DECODERS[self._name](data)

    def _count(self, size: int) -> None:
        self._made += size
        if self._made > self._limit:
            raise RequestTooLarge(f"the request's body decodes to more than the limit of {self._limit} bytes")
        if self._made > FREE_OUTPUT and self._made > MAX_RATIO * self._taken:
            raise RequestTooLarge(
                f"the request's body decodes to more than {MAX_RATIO} times its size; send it without Content-Encoding"
            )

    def finish(self) -> None:
        if self._decoder is not None and not self._decoder.ended:
            raise InvalidRequest(
                f"the request's body ended before its {self._name} data was complete; send all of it", code=CODE
            )


def _deflate(data: bytes) -> _Decoder:
    """RFC 9110 means zlib's format; some clients send raw deflate all the same. A header of two bytes tells."""
    zlib_header = data[0] & 0x0F == 8 and data[0] >> 4 <= 7 and (len(data) < 2 or (data[0] * 256 + data[1]) % 31 == 0)
    return _Inflate(zlib.MAX_WBITS if zlib_header else -zlib.MAX_WBITS)


def _gzip(_data: bytes) -> _Decoder:
    return _Inflate(16 + zlib.MAX_WBITS)


_DECODERS: dict[str, Callable[[bytes], _Decoder]] = {
    "gzip": _gzip,
    "x-gzip": _gzip,
    "deflate": _deflate,
    "zstd": lambda _data: _Zstd(),
}
