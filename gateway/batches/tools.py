"""What running batches takes."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

from backbone.bus.blobs import Blobs
from backbone.bus.job_log import JobLog
from gateway.batches.kinds import Kind
from gateway.batches.ledger import Ledger
from gateway.files import Files
from gateway.http.inference_body import Reader
from gateway.jobs.api import Jobs


@dataclass(frozen=True, slots=True)
class Tools:
    """The gateway's parts, and the bounds that its batches share."""

    ledger: Ledger
    files: Files
    blobs: Blobs
    jobs: Jobs
    log: JobLog
    reader: Reader
    kinds: Mapping[str, Kind]
    """By the endpoint's path, as the batch and its lines name it."""
    window: int
    """Lines of one batch that are jobs at once."""
    large: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1))
    """One large line at a time is in memory."""
