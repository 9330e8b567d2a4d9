"""One `Idempotency-Key`, one job: whoever comes second joins it, or gets its answer.

A claim names the job before that is stored; who finds a claim submits the same job again, which is harmless (see
`gateway.jobs.submitter`). So the death of the first one between claim and job leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from hashlib import sha256
from typing import Any

import orjson

from backbone.bus.blobs import BlobStore
from backbone.bus.job_log import JobLog
from backbone.ids import new_job_id
from gateway.http.inference_body import ReceivedRequest
from schemas.errors import NexusError


class IdempotencyMismatch(NexusError):
    """This Idempotency-Key was used with another request."""

    status = 422
    type = "invalid_request_error"
    code = "idempotency_mismatch"


class Idempotency:
    """See the module's docstring."""

    def __init__(self, jobs: JobLog, blobs: BlobStore) -> None:
        self._log = jobs
        self._blobs = blobs

    async def job_id(self, owner: str, key: str, endpoint: str, received: ReceivedRequest, extra: Any = None) -> str:
        """The id that this request's job has. Raises IdempotencyMismatch, Unavailable."""
        name = sha256(orjson.dumps([owner, key])).hexdigest()
        claim = {"job": new_job_id(), "print": await self._fingerprint(endpoint, received, extra)}
        claimed = orjson.loads(await self._log.claim(name, orjson.dumps(claim)))
        if claimed["print"] != claim["print"]:
            raise IdempotencyMismatch(
                "this Idempotency-Key was used with another request; use a new key for a new request",
                param="Idempotency-Key",
            )
        return str(claimed["job"])

    async def _fingerprint(self, endpoint: str, received: ReceivedRequest, extra: Any) -> str:
        """A digest of what was asked for: fields in any order, files by their content."""
        request = received.request.model_dump(mode="json", exclude_unset=True)
        digest = sha256(orjson.dumps([endpoint, request, extra], option=orjson.OPT_SORT_KEYS))
        at = received.body_size or 0
        for upload in received.uploads:
            digest.update(orjson.dumps([upload.field, upload.filename, upload.size]))
            if upload.blob is None:
                digest.update(received.body[at : at + upload.size])
                at += upload.size
            else:
                async for piece in self._pieces(upload.blob):
                    digest.update(piece)
        return digest.hexdigest()

    async def _pieces(self, blob: str) -> AsyncIterator[bytes]:
        pieces = self._blobs.read(blob)
        try:
            async for piece in pieces:
                yield piece
        finally:
            await pieces.aclose()
