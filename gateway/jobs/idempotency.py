"""Maps each `Idempotency-Key` to one job.

A claim names the job before the job is stored. A later request with the same key submits the same job id again, which is
harmless (see `gateway.jobs.submitter`). So nothing is left over if the first gateway dies between claim and submission.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from hashlib import sha256
from typing import Any

import orjson

from backbone.bus.blobs import BlobStore
from backbone.bus.job_log import IdempotencyClaims
from backbone.ids import new_job_id
from gateway.http.inference_body import ReceivedRequest
from schemas.errors import NexusError


class IdempotencyMismatch(NexusError):
    """The Idempotency-Key was already used with a different request."""

    status = 422
    type = "invalid_request_error"
    code = "idempotency_mismatch"


class Idempotency:
    """Claims job ids for idempotency keys."""

    def __init__(self, jobs: IdempotencyClaims, blobs: BlobStore) -> None:
        self._log = jobs
        self._blobs = blobs

    async def job_id(self, owner: str, key: str, endpoint: str, received: ReceivedRequest, extra: Any = None) -> str:
        """Return the job id of a request with this key. Raises IdempotencyMismatch, Unavailable."""
        name = sha256(orjson.dumps([owner, key])).hexdigest()
        claim = {"job": new_job_id(), "print": await self._fingerprint(endpoint, received, extra)}
        claimed = orjson.loads(await self._log.claim(name, orjson.dumps(claim)))
        if claimed["print"] != claim["print"]:
            raise IdempotencyMismatch(
                "This Idempotency-Key was already used with a different request. Use a new key for each new request.",
                param="Idempotency-Key",
            )
        return str(claimed["job"])

    async def _fingerprint(self, endpoint: str, received: ReceivedRequest, extra: Any) -> str:
        """Return a digest of the request: fields in any order, files by content."""
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
