"""Names of blobs: the path of a blob, and the key that decrypts it.

A name is `<name>.<key>`, or `<worker>.<name>.<key>` for a worker's blob: only that worker and gateways may write there. A name
without a key belongs to a blob that was stored before blobs were encrypted.
"""

from __future__ import annotations

import base64
import os
import re
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from backbone.bus.subjects import is_blob_path
from backbone.ids import new_token

KEY_BYTES = 32
TAG_BYTES = 16
"""Bytes that encryption adds to each chunk."""
METADATA_NUMBER = (1 << 96) - 1
"""The number under which the metadata is encrypted; chunks count from 0."""
_KEY = re.compile(r"[A-Za-z0-9_-]{43}")


class InvalidBlobSeal(Exception):
    """These bytes are not what was written there."""


@dataclass(frozen=True, slots=True)
class BlobName:
    """The parts of a blob's name."""

    path: str
    """One or two tokens of a subject."""
    key: bytes | None
    """None: the blob is not encrypted."""

    @classmethod
    def new(cls, writer: str = "") -> BlobName:
        """Return a new, unguessable name, below the name of the worker that writes."""
        return cls(f"{writer}.{new_token()}" if writer else new_token(), os.urandom(KEY_BYTES))

    @classmethod
    def parse(cls, text: str) -> BlobName | None:
        """Return the parts of a name; None where `text` is no name of a blob."""
        path, _, key = text.rpartition(".")
        if path and is_blob_path(path) and _KEY.fullmatch(key):
            return cls(path, base64.urlsafe_b64decode(key + "="))
        return cls(text, None) if is_blob_path(text) else None

    def __str__(self) -> str:
        if self.key is None:
            return self.path
        return f"{self.path}.{base64.urlsafe_b64encode(self.key).decode().rstrip('=')}"


class BlobCipher:
    """Encrypts one blob with AES-256-GCM, each chunk under its number, so that no chunk can be changed, moved, left out or read
    without the key.

    The key belongs to this blob alone, so that no number is used twice.
    """

    def __init__(self, key: bytes) -> None:
        self._cipher = AESGCM(key)

    def seal(self, number: int, data: bytes | bytearray | memoryview) -> bytes:
        """Encrypt chunk `number`."""
        return self._cipher.encrypt(number.to_bytes(12, "big"), data, None)

    def open(self, number: int, sealed: bytes) -> bytes:
        """Decrypt chunk `number`. Raises InvalidBlobSeal."""
        try:
            return self._cipher.decrypt(number.to_bytes(12, "big"), sealed, None)
        except InvalidTag as error:
            raise InvalidBlobSeal from error
