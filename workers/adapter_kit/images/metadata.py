"""Removal of metadata from images: texts, EXIF, XMP, comments, and all else that a server writes beside the pixels. Pure.

ComfyUI writes its workflow into each image, InvokeAI its graph, the WebUI its parameters, which only the operator may see. The
pixels stay untouched, and so do the parts that show them correctly: color profile, transparency, animation, resolution, and the
orientation, which is all that is left of an EXIF block. The remaining parts are listed here; unknown parts are removed, and so are the
bytes after an image's end.

Each format takes one pass over the bytes. A damaged image stays damaged; the metadata that is recognized in it is removed.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from zlib import crc32

MAX_PARTS = 500_000
"""The most chunks, segments or blocks of one image; real ones have some thousand."""
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
KEPT_PNG_CHUNKS = frozenset(
    b"tRNS cHRM gAMA iCCP sBIT sRGB cICP mDCV mDCv cLLI cLLi bKGD hIST pHYs sPLT acTL fcTL fdAT".split()
)
"""Chunks that change how the pixels look, beside the critical ones, whose names begin with a capital letter."""
PNG_CHUNK_NAME = re.compile(rb"[A-Za-z]{4}")
KEPT_WEBP_CHUNKS = frozenset((b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF", b"ICCP"))
WEBP_FRAME_HEADER_BYTES = 16
"""Bytes of a frame of an animated WebP before its chunks."""
WEBP_EXIF_FLAG, WEBP_XMP_FLAG = 0x08, 0x04
"""Flags of a WebP's header."""
KEPT_GIF_APPLICATIONS = frozenset((b"NETSCAPE2.0", b"ANIMEXTS1.0", b"ICCRGBG1012"))
"""Applications whose blocks hold the number of repetitions and the color profile."""
JPEG_MARKER = re.compile(rb"\xff[^\x00\xff]")
JPEG_DATA_END = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
"""The end of compressed data: any marker but a restart marker."""
EXIF_PREFIX = b"Exif\x00\x00"
ORIENTATION_TAG = 0x0112


class TooManyImageParts(ValueError):
    """An image has more parts than any real one."""


def remove_metadata(data: bytes) -> bytes:
    """Return a PNG, JPEG, WebP or GIF without its metadata; anything else as it is. Raises TooManyImageParts."""
    if data.startswith(PNG_SIGNATURE):
        return _join_parts(_png_parts(data), data)
    if data.startswith(b"\xff\xd8\xff"):
        return _join_parts(_jpeg_parts(data), data)
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return _strip_webp(data)
    if data.startswith((b"GIF87a", b"GIF89a")):
        return _join_parts(_gif_parts(data), data)
    return data


def _join_parts(parts: Iterator[bytes | memoryview], data: bytes) -> bytes:
    remaining = []
    for number, part in enumerate(parts):
        if number > MAX_PARTS:
            raise TooManyImageParts(f"the image has more than {MAX_PARTS} parts")
        remaining.append(part)
    joined = b"".join(remaining)
    return data if joined == data else joined


# PNG: chunks of length, name, data, checksum


def _png_parts(data: bytes) -> Iterator[bytes | memoryview]:
    view, at = memoryview(data), len(PNG_SIGNATURE)
    yield view[:at]
    while at + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, at)
        if PNG_CHUNK_NAME.fullmatch(name) is None:
            return
        end = at + 12 + length
        if name[:1].isupper() or name in KEPT_PNG_CHUNKS:
            yield view[at:end]
        else:
            yield _png_orientation(data[at + 8 : end - 4]) if name == b"eXIf" else b""
        if name == b"IEND":
            return
        at = end


def _png_orientation(tiff: bytes) -> bytes:
    exif = _make_exif(read_orientation(tiff))
    if not exif:
        return b""
    body = b"eXIf" + exif
    return struct.pack(">I", len(exif)) + body + struct.pack(">I", crc32(body))


# JPEG: segments, each a marker with a length, then compressed data


def _jpeg_parts(data: bytes) -> Iterator[bytes | memoryview]:
    view, at = memoryview(data), 2
    yield view[:at]
    while (found := JPEG_MARKER.search(data, at)) is not None:
        start, marker = found.start(), data[found.end() - 1]
        if marker == 0xD9:
            yield view[start : start + 2]
            return
        if marker in (0x01, *range(0xD0, 0xD9)):  # without a length
            yield view[start : start + 2]
            at = start + 2
            continue
        if start + 4 > len(data):
            return
        end = start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")
        yield _jpeg_segment(marker, view[start:end])
        at = max(end, start + 4)
        if marker == 0xDA:
            rest = JPEG_DATA_END.search(data, at)
            over = rest.start() if rest is not None else len(data)
            yield view[at:over]
            at = over


def _jpeg_segment(marker: int, segment: memoryview) -> bytes | memoryview:
    """Return a segment if the image needs it; of EXIF, only the orientation."""
    content = bytes(segment[4:20])
    if marker == 0xE1 and content.startswith(EXIF_PREFIX):
        exif = _make_exif(read_orientation(bytes(segment[10:])))
        return b"\xff\xe1" + struct.pack(">H", 2 + len(EXIF_PREFIX) + len(exif)) + EXIF_PREFIX + exif if exif else b""
    if 0xE0 <= marker <= 0xEF:
        needed = (
            (marker == 0xE0 and content.startswith(b"JFIF\x00"))
            or (marker == 0xE2 and content.startswith(b"ICC_PROFILE\x00"))
            or (marker == 0xEE and content.startswith(b"Adobe"))
        )
        return segment if needed else b""
    return b"" if marker == 0xFE else segment


# WebP: chunks of name, length, data, filled to an even length


def _strip_webp(data: bytes) -> bytes:
    end = min(len(data), 8 + int.from_bytes(data[4:8], "little"))
    body = bytearray(_join_parts(_webp_chunks(data, 12, end), data[12:]))
    if body == data[12:]:
        return data
    if body[:4] == b"VP8X" and len(body) > 8:
        exif = _make_exif(_webp_orientation(data, end))
        body[8] = body[8] & ~(WEBP_EXIF_FLAG | WEBP_XMP_FLAG) | (WEBP_EXIF_FLAG if exif else 0)
        body += struct.pack("<4sI", b"EXIF", len(exif)) + exif if exif else b""
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + bytes(body)


def _webp_chunks(data: bytes, at: int, end: int, *, in_frame: bool = False) -> Iterator[bytes | memoryview]:
    view = memoryview(data)
    for name, begin, over in _iter_webp_chunks(data, at, end):
        if name == b"ANMF" and not in_frame and over - begin >= WEBP_FRAME_HEADER_BYTES:
            inner = begin + WEBP_FRAME_HEADER_BYTES
            frame = data[begin:inner] + _join_parts(_webp_chunks(data, inner, over, in_frame=True), data[inner:over])
            yield struct.pack("<4sI", name, len(frame)) + frame + b"\0" * (len(frame) % 2)
        elif name in KEPT_WEBP_CHUNKS:
            yield view[begin - 8 : min(end, over + (over - begin) % 2)]
        else:
            yield b""


def _webp_orientation(data: bytes, end: int) -> int:
    blocks = (data[begin:over] for name, begin, over in _iter_webp_chunks(data, 12, end) if name == b"EXIF")
    return read_orientation(next(blocks, b"").removeprefix(EXIF_PREFIX))


def _iter_webp_chunks(data: bytes, at: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield each chunk's name, and where its data begin and end."""
    while at + 8 <= end:
        name, length = struct.unpack_from("<4sI", data, at)
        over = min(end, at + 8 + length)
        yield name, at + 8, over
        at = over + length % 2


# GIF: blocks, of sub-blocks of at most 255 bytes


def _gif_parts(data: bytes) -> Iterator[bytes | memoryview]:
    view, at = memoryview(data), 13
    if len(data) > 10 and data[10] & 0x80:
        at += 3 << ((data[10] & 7) + 1)
    yield view[:at]
    while at < len(data):
        kind = data[at]
        if kind == 0x3B:
            yield view[at : at + 1]
            return
        if kind == 0x2C:
            head = at + 10
            if len(data) > at + 9 and data[at + 9] & 0x80:
                head += 3 << ((data[at + 9] & 7) + 1)
            end = _find_gif_end(data, head + 1)
            yield view[at:end]
        elif kind == 0x21:
            end = _find_gif_end(data, at + 2)
            label = data[at + 1 : at + 2]
            remaining = label == b"\xf9" or (label == b"\xff" and data[at + 3 : at + 14] in KEPT_GIF_APPLICATIONS)
            yield view[at:end] if remaining else b""
        else:
            return
        at = end


def _find_gif_end(data: bytes, at: int) -> int:
    """Return where the sub-blocks that begin at `at` end."""
    while at < len(data) and data[at]:
        at += data[at] + 1
    return min(len(data), at + 1)


# EXIF


def read_orientation(tiff: bytes) -> int:
    """Return the orientation of an EXIF block, 2 to 8; 1 where it has none, or cannot be read."""
    order = {b"II*\x00": "<", b"MM\x00*": ">"}.get(tiff[:4])
    if order is None or len(tiff) < 8:
        return 1
    (at,) = struct.unpack_from(f"{order}I", tiff, 4)
    if at + 2 > len(tiff):
        return 1
    (count,) = struct.unpack_from(f"{order}H", tiff, at)
    for number in range(count):
        entry = at + 2 + 12 * number
        if entry + 12 > len(tiff):
            return 1
        tag, kind, values, value = struct.unpack_from(f"{order}HHIH", tiff, entry)
        if tag == ORIENTATION_TAG:
            return value if (kind, values) == (3, 1) and 2 <= value <= 8 else 1
    return 1


def _make_exif(orientation: int) -> bytes:
    """Return an EXIF block with only an orientation; empty for the default orientation."""
    if orientation == 1:
        return b""
    return b"II*\x00" + struct.pack("<IHHHIHHI", 8, 1, ORIENTATION_TAG, 3, 1, orientation, 0, 0)
