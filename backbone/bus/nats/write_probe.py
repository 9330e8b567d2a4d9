"""Probes whether NATS stores data: reads and round trips work on a server whose disk is full.

nats-server does not answer a write that its disk refuses, and does not use a stream again after a failed write before it is
restarted (seen with 2.15). So a gateway writes a small message every few seconds, and refuses at once what NATS would leave
unanswered.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Callable

import orjson
import structlog

from backbone.bus.nats.requests import RequestInbox
from backbone.bus.subjects import JOBS_STREAM, claim_subject, job_subject
from schemas.errors import Unavailable
from schemas.jobs import Capability, Lane

log = structlog.get_logger(__name__)

PROBE_INTERVAL_S = 5.0
"""Between two probes."""
FAILING_PROBE_INTERVAL_S = 1.0
"""Between two probes while they fail."""
REPLY_TIMEOUT_S = 2.0
FAILURE_GRACE_S = 5.0
"""Probes must have failed for this time before writes are refused: a busy disk is not a full one."""
REPLICATED_FAILURE_GRACE_S = 12.0
"""The same in a cluster: a stream that has lost its leader has a new one by then."""
PAYLOAD = b"." * 4096
"""More than the rest of a disk page, which a full disk may still take."""
PURGE = f"$JS.API.STREAM.PURGE.{JOBS_STREAM}".encode()
CLAIMS_PROBE_SUBJECT = claim_subject("write-probe").encode()
JOBS_PROBE_SUBJECT = job_subject(Capability.MODELS, Lane.FLEX, "nexus:write-probe").encode()
"""A queue that no worker takes from. It is emptied at once, also of what a slow disk stored too late to confirm it in time."""


class StorageHealth:
    """Whether NATS stores data, as far as this gateway knows. All its connections share one object."""

    def __init__(self) -> None:
        self.problem = ""
        """The reason for callers and operators; empty: NATS stores data."""
        self.doubted = False
        """A job was neither stored nor refused although NATS answered: probe the jobs stream too."""
        self.changed = asyncio.Event()

    def require_available(self) -> None:
        """Raise Unavailable where a write would wait in vain."""
        if self.problem:
            raise Unavailable(self.problem, retry_after_s=PROBE_INTERVAL_S)

    def report_doubt(self) -> None:
        """Probe the jobs stream soon."""
        self.doubted = True
        self.changed.set()


class WriteProbe:
    """Writes at intervals, and updates a `StorageHealth` with the result."""

    def __init__(
        self,
        inbox: RequestInbox,
        storage_health: StorageHealth,
        *,
        replicated: bool,
        clock: Callable[[], float] | None = None,
    ) -> None:
        """Configure the probe. `clock` returns monotonic seconds."""
        self._inbox = inbox
        self._storage_health = storage_health
        self._grace_s = REPLICATED_FAILURE_GRACE_S if replicated else FAILURE_GRACE_S
        self._clock = clock or asyncio.get_running_loop().time
        self._failing_since: float | None = None

    async def run(self) -> None:
        """Probe until cancelled."""
        while True:
            try:
                await self.probe()
            except Exception:
                log.exception("nats.write_probe_crashed")
            waiting = self._failing_since is not None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FAILING_PROBE_INTERVAL_S if waiting else PROBE_INTERVAL_S):
                    await self._storage_health.changed.wait()
            self._storage_health.changed.clear()

    async def probe(self) -> None:
        """Write once. Without a connection the result is unknown, and nothing changes."""
        problem = await self._write(CLAIMS_PROBE_SUBJECT)
        if not problem and self._storage_health.doubted:
            problem = await self._write(JOBS_PROBE_SUBJECT)
            self._storage_health.doubted = bool(problem)
        if self._inbox.connected:
            self._conclude(problem)

    def _conclude(self, problem: str) -> None:
        if not problem:
            if self._storage_health.problem:
                log.info("nats.storage_recovered")
            self._failing_since, self._storage_health.problem = None, ""
            return
        now = self._clock()
        self._failing_since = self._failing_since if self._failing_since is not None else now
        if now - self._failing_since < self._grace_s:
            return
        if not self._storage_health.problem:
            log.error("nats.storage_failed", error=problem)
        self._storage_health.problem = f"NATS stores nothing: {problem}"

    async def _write(self, subject: bytes) -> str:
        """Write a probe, and return what went wrong; empty: it was stored."""
        headers = b"NATS/1.0\r\nNats-Msg-Id: probe-%b\r\n\r\n" % secrets.token_hex(8).encode()
        try:
            async with asyncio.timeout(REPLY_TIMEOUT_S):
                answers = await self._inbox.request(subject, PAYLOAD, headers=headers)
        except (TimeoutError, Unavailable):
            answers = None
        if answers is None or not answers[0].data:
            return (
                f"NATS did not answer a write within {REPLY_TIMEOUT_S:g} s. Its disk may be full or failing: "
                "free space there, then restart nats-server"
            )
        answer = orjson.loads(answers[0].data)
        if (error := answer.get("error")) is not None:
            # Some descriptions name files of the server: they belong into its log only.
            return f"JetStream refuses it (error {error.get('err_code')}). Give its store more room"
        if subject == JOBS_PROBE_SUBJECT:
            with contextlib.suppress(Unavailable):
                self._inbox.request(PURGE, orjson.dumps({"filter": JOBS_PROBE_SUBJECT.decode()})).cancel()
        return ""
