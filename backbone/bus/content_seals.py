"""Encrypt the content of a job, so that what is stored of it cannot be read without the job's key.

Content is what the caller and the server wrote: the request's body and files, the pieces of the answer, the result. It is
encrypted with AES-256-GCM under a random key that belongs to one job. Each sealed message has a random nonce of 96 bits, and is
bound to its job and its place in it: it cannot be changed, cut off, or put in the place of another.

The key is never stored beside the content. A gateway gives it to a worker with the start grant, over core NATS, which stores
nothing; only a worker that was given the job's message can ask for it.
"""

from __future__ import annotations

import base64
import binascii
import os

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from pydantic import BaseModel, ConfigDict, ValidationError

from backbone.bus.blob_names import BlobName
from schemas.errors import BackendFailed
from schemas.frames import BlobRef, Frame, FrameKind, decode_frame, encode_frame
from schemas.jobs import Envelope, Upload
from schemas.outcome import Outcome

KEY_BYTES = 32
NONCE_BYTES = 12
REQUEST_PLACE = "request"


class ContentUnreadable(BackendFailed):
    """The content of this job cannot be decrypted: it was damaged, or its key does not belong to it."""

    code = "content_unreadable"


class ContentKey:
    """The key of one job's content."""

    def __init__(self, key: bytes) -> None:
        """Use 32 bytes. Raises ValueError for another number of them."""
        if len(key) != KEY_BYTES:
            raise ValueError(f"A content key has {KEY_BYTES} bytes, not {len(key)}.")
        self.bytes = key
        self._cipher = AESGCM(key)

    @classmethod
    def new(cls) -> ContentKey:
        """Return a random key."""
        return cls(os.urandom(KEY_BYTES))

    @classmethod
    def parse(cls, text: str) -> ContentKey:
        """Return the key that `str` has encoded. Raises ValueError."""
        try:
            return cls(base64.b64decode(text, validate=True))
        except binascii.Error as error:
            raise ValueError("A content key is 32 bytes in Base64.") from error

    def __str__(self) -> str:
        return base64.b64encode(self.bytes).decode()

    def seal(self, job: str, place: str, data: bytes) -> bytes:
        """Encrypt data of a job. `place`: where in the job it stands."""
        nonce = os.urandom(NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, data, f"{job} {place}".encode())

    def open(self, job: str, place: str, sealed: bytes) -> bytes:
        """Decrypt data of a job that was sealed for this place. Raises ContentUnreadable."""
        try:
            return self._cipher.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], f"{job} {place}".encode())
        except (InvalidTag, ValueError):
            raise ContentUnreadable(
                "The content of this job cannot be decrypted: it was damaged, or its key does not belong to it. Send the request again."
            ) from None


class _RequestParts(BaseModel):
    """The fields of an envelope that lead to content: names of blobs hold their keys."""

    model_config = ConfigDict(frozen=True)

    body_size: int | None = None
    body_blob: str | None = None
    uploads: tuple[Upload, ...] = ()


def seal_request(key: ContentKey, envelope: Envelope, body: bytes) -> tuple[Envelope, bytes]:
    """Return the envelope without what leads to content, and the sealed body that follows it."""
    parts = _RequestParts(body_size=envelope.body_size, body_blob=envelope.body_blob, uploads=envelope.uploads)
    content = b"%b\n%b" % (parts.model_dump_json(exclude_defaults=True).encode(), body)
    return bare_envelope(envelope), key.seal(envelope.job, REQUEST_PLACE, content)


def bare_envelope(envelope: Envelope) -> Envelope:
    """Return the envelope as `seal_request` does."""
    own = tuple(blob_path(name) for name in envelope.own_blobs)
    bare = {"sealed": True, "body_size": None, "body_blob": None, "uploads": (), "sealed_blobs": own}
    return envelope.model_copy(update=bare)


def open_request(key: ContentKey, envelope: Envelope, sealed: bytes) -> tuple[Envelope, bytes]:
    """Return the envelope and the body that `seal_request` was given. Raises ContentUnreadable."""
    line, _, body = key.open(envelope.job, REQUEST_PLACE, sealed).partition(b"\n")
    parts = _RequestParts.model_validate_json(line)
    return envelope.model_copy(update=dict(parts) | {"sealed": False, "sealed_blobs": ()}), body


class _ResultParts(BaseModel):
    """The field of an outcome that leads to content."""

    model_config = ConfigDict(frozen=True)

    blob: BlobRef | None = None


def seal_result(key: ContentKey, outcome: Outcome, payload: bytes) -> tuple[Outcome, bytes]:
    """Return the outcome of a completed job without what leads to content, and the sealed payload that follows it."""
    parts = _ResultParts(blob=outcome.blob)
    content = b"%b\n%b" % (parts.model_dump_json(exclude_defaults=True).encode(), payload)
    bare = outcome.model_copy(update={"blob": None, "sealed": True})
    return bare, key.seal(outcome.job, _result_place(outcome), content)


def open_result(key: ContentKey, outcome: Outcome, sealed: bytes) -> tuple[Outcome, bytes]:
    """Return the outcome and the payload that `seal_result` was given. Raises ContentUnreadable."""
    line, _, payload = key.open(outcome.job, _result_place(outcome), sealed).partition(b"\n")
    try:
        parts = _ResultParts.model_validate_json(line)
    except ValidationError:
        raise ContentUnreadable from None
    return outcome.model_copy(update={"blob": parts.blob}), payload


def _result_place(outcome: Outcome) -> str:
    return f"result {outcome.run} {outcome.delivery} {outcome.token}"


def seal_frame(key: ContentKey, job: str, frame: Frame) -> bytes:
    """Return a sealed frame in the place of `frame`."""
    content = frame.kind.encode() + frame.payload
    sealed = key.seal(job, _frame_place(frame), content)
    return encode_frame(FrameKind.SEALED, frame.run, frame.delivery, frame.seq, frame.token, sealed)


def open_frame(key: ContentKey, job: str, data: bytes) -> bytes:
    """Return the frame that `seal_frame` was given. Raises ContentUnreadable, and ValueError for what is no frame."""
    frame = decode_frame(data)
    content = key.open(job, _frame_place(frame), frame.payload)
    return encode_frame(content[:1].decode("latin-1"), *frame[1:5], content[1:])


def _frame_place(frame: Frame) -> str:
    return f"event {frame.run} {frame.delivery} {frame.seq} {frame.token}"


def blob_path(name: str) -> str:
    """Return a blob's name without its key: enough to remove the blob, and too little to read it."""
    parsed = BlobName.parse(name)
    return parsed.path if parsed is not None else name
