"""Decodes job records that Redis returned."""

from __future__ import annotations

import structlog
from pydantic import ValidationError

from schemas.errors import InternalError
from schemas.jobs import JobRecord

log = structlog.get_logger(__name__)


def parse_record(raw: bytes | str, job_id: str) -> JobRecord:
    """Return the record. Raises InternalError when it cannot be decoded."""
    try:
        return JobRecord.decode(raw)
    except ValidationError as error:
        log.error("redis.record_malformed", job=job_id, error=str(error))
        raise InternalError(f"the record of job {job_id} cannot be read") from error
