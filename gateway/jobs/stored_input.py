"""The request of a job, kept with its first event: as one more field of the record's JSON, which readers of the record skip."""

from __future__ import annotations

import orjson

from backbone.bus.job_log import EventLog
from schemas.errors import NotFound
from schemas.frames import decode_frame
from schemas.job_events import QUEUED
from schemas.jobs import Envelope, JobRecord

MAX_INPUT_BYTES = 64 * 1024
"""Larger requests are not kept."""
MAX_EVENTS_READ = 32
"""QUEUED is stored after the job itself, so a fast worker's first events may precede it."""
_FIELD = b',"input":'


class InputNotKept(NotFound):
    """The request of this job is not stored (any more)."""

    code = "input_not_kept"


def encode_queued(record: JobRecord, envelope: Envelope, body: bytes) -> bytes:
    """Return the payload of a job's QUEUED event: the record, and its request.

    The request is left out where it is sealed, is a line of a batch's file, or is larger than `MAX_INPUT_BYTES`.
    """
    encoded = record.encode()
    request = body if envelope.body_size is None else body[: envelope.body_size]
    if envelope.sealed or envelope.batch or envelope.body_blob or not 0 < len(request) <= MAX_INPUT_BYTES:
        return encoded
    return b"".join((encoded[:-1], _FIELD, request, b"}"))


async def read_input(log: EventLog, record: JobRecord) -> object:
    """Return the request of the job's latest run as JSON. Raises InputNotKept, Unavailable."""
    found = None
    for event in await log.first_events(record.job, MAX_EVENTS_READ):
        frame = decode_frame(event.data)
        if frame.kind == QUEUED:
            found = orjson.loads(frame.payload).get("input", found)
    if found is None:
        raise InputNotKept(
            "The request of this job is not stored: it was large, encrypted or a line of a batch, or its events have expired."
        )
    return found
