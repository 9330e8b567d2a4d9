"""Make the usage event of a direct job."""

from __future__ import annotations

from time import monotonic

from gateway import clock
from gateway.sync.request_state import SyncRequest
from gateway.usage.events import Values, media_values, text, token_counts

COMPLETED, FAILED, CANCELLED = "completed", "failed", "cancelled"


def event_of_request(request: SyncRequest, endpoint: str, key: str, person: str, bytes_in: int) -> Values:
    """Return the event of a request that has ended, or is about to be abandoned; see `schemas.usage.UsageEvent`.

    `endpoint`: the path that the caller has called. `key`: id of the key, or of the person who signed in. `person`: id of the person behind it, or empty.
    """
    envelope, done, error, started_at = request.envelope, request.done, request.error, request.started_at
    now = monotonic()
    waited_s = (now if started_at is None else started_at) - request.submitted_at
    run_us = 0 if started_at is None else int(1e6 * (now - started_at))
    bytes_out = request.output_bytes
    if error is not None:
        status, code = FAILED, text(error.code or error.type)
    else:
        status, code = (COMPLETED if done is not None else CANCELLED), ""
    usage = media = None
    if done is not None:
        usage, media = done.usage, done.media
        if done.blob is not None:
            bytes_out += done.blob.size
    return (
        envelope.job,
        envelope.run,
        int(1000 * clock.now()),
        envelope.owner,
        key if key != person else "",
        person,
        envelope.model,
        envelope.public_model,
        request.worker,
        endpoint,
        envelope.capability,
        envelope.lane,
        status,
        code,
        False,
        False,
        request.starts,
        *token_counts(usage),
        *media_values(media),
        bytes_in,
        bytes_out,
        int(1e6 * waited_s),
        run_us,
        run_us,
    )
