"""Sealed content: readable with its key, in its place, and nowhere else."""

from __future__ import annotations

import pytest

from backbone.bus.blob_names import BlobName
from backbone.bus.content_seals import ContentKey, ContentUnreadable, open_request, seal_request
from schemas.jobs import Capability, Envelope, Upload


def envelope(**fields: object) -> Envelope:
    names = {"job": "job_1", "endpoint": "/e", "model": "m", "public_model": "m", "reply": "r"}
    return Envelope.model_validate(names | {"capability": Capability.CHAT} | fields)


def test_a_sealed_request_opens_as_it_was() -> None:
    """Its envelope reveals no key of a blob, and no name of a file."""
    body, kept = str(BlobName.new()), str(BlobName.new())
    upload = Upload(field="file", filename="marie.wav", size=3, blob=str(BlobName.new()))
    given = envelope(
        body_blob=body, body_size=4, uploads=(upload, upload.model_copy(update={"blob": kept, "kept": True}))
    )
    key = ContentKey.new()
    bare, sealed = seal_request(key, given, b"text\nand\nbytes")
    message = bare.encode(sealed)
    assert b"marie" not in message
    for name in (body, upload.blob, kept):
        assert name is not None
        assert name.rpartition(".")[2].encode() not in message
    assert bare.own_blobs == tuple(name.rpartition(".")[0] for name in given.own_blobs)
    read, rest = Envelope.decode(message)
    assert open_request(ContentKey.parse(str(key)), read, rest) == (given, b"text\nand\nbytes")


def test_nothing_else_opens_it() -> None:
    """Another key, job or place, a cut, or a changed byte."""
    key, given = ContentKey.new(), envelope()
    bare, sealed = seal_request(key, given, b"text")
    cut = (sealed[:-1], sealed[:20], b"", bytes([sealed[0] ^ 1]) + sealed[1:], sealed + b"x")
    wrong = [
        (ContentKey.new(), bare, sealed),
        (key, envelope(job="job_2"), sealed),
        *((key, bare, data) for data in cut),
    ]
    for other_key, other, data in wrong:
        with pytest.raises(ContentUnreadable):
            open_request(other_key, other, data)
    with pytest.raises(ContentUnreadable):
        key.open("job_1", "result", key.seal("job_1", "request", b""))
    assert seal_request(key, given, b"text")[1] != sealed
    for text in ("", "AAAA", "%"):
        with pytest.raises(ValueError, match="content key"):
            ContentKey.parse(text)
