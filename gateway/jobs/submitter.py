"""Submits durable jobs: stores the record, then the queue message, then the first event.

If the gateway dies in between, it has not answered 202 yet. A record without a message expires. A message without a record
runs, and its record is recovered from its first event or its outcome. Several gateways may submit a job with a given id
concurrently or repeatedly: NATS stores one message per run within its duplicate window, and the attempt gate lets only one
attempt run.
"""

from __future__ import annotations

import contextlib
from time import monotonic

from backbone.bus.bus import Queue
from backbone.bus.content_keys import ContentKeys
from backbone.bus.content_seals import bare_envelope, seal_request
from backbone.bus.job_log import JobStorage
from backbone.ids import new_job_id
from backbone.store.store import IllegalMove, JobLimit, LimitReached, Store
from gateway.dispatcher import Dispatcher
from gateway.inspector.inspector import Inspector
from gateway.jobs.api import Submission
from gateway.jobs.records import (
    new_record,
    now,
    record_from_outcome,
    seconds_until_due,
)
from gateway.jobs.stored_input import encode_queued
from gateway.jobs.terminator import JobTerminator
from gateway.limits.budget_limiter import BudgetLimiter, Reservation
from gateway.limits.rate_limiter import Admission, RateLimiter
from gateway.limits.tokens import estimate_tokens
from gateway.metrics import GatewayMetrics
from gateway.target_model import target_model
from gateway.traces import JobTraces
from schemas.errors import NexusError, RateLimited, Unavailable
from schemas.frames import encode_frame
from schemas.inspection import Inspection
from schemas.job_events import NO_TOKEN, QUEUED
from schemas.jobs import LANE_BY_TIER, Envelope, JobRecord, JobStatus, Lane
from schemas.outcome import outcome_of

EVENT_SUBJECT_PREFIX = "nexus.events."


class JobSubmitter:
    """Stores new jobs and new runs of jobs."""

    def __init__(
        self,
        jobs: JobStorage,
        store: Store,
        terminator: JobTerminator,
        dispatcher: Dispatcher,
        metrics: GatewayMetrics,
        *,
        keep_s: float,
        queue_s: float,
        rate_limiter: RateLimiter | None = None,
        content_keys: ContentKeys | None = None,
        budgets: BudgetLimiter | None = None,
        traces: JobTraces | None = None,
        inspector: Inspector | None = None,
    ) -> None:
        """Create a submitter. `content_keys`: None where no job is sealed. `traces`: None where tracing is off."""
        self._log = jobs
        self._store = store
        self._terminator = terminator
        self._dispatcher = dispatcher
        self._metrics = metrics
        self._keep_s = keep_s
        self._queue_s = queue_s
        self._rate_limiter = rate_limiter
        self._content_keys = content_keys
        self._budgets = budgets
        self._traces = traces
        self._inspector = inspector

    async def submit(self, submission: Submission) -> JobRecord:
        """Submit a job. See `gateway.jobs.api.JobsApi.submit`."""
        envelope = self._envelope(submission)
        if self._traces is None:
            return await self._submit_within_limits(envelope, submission)
        span = self._traces.start_publish(submission.span, envelope.owner)
        envelope = envelope.model_copy(update=span.context._asdict())
        error = "abandoned"
        try:
            record = await self._submit_within_limits(envelope, submission)
            span.set_attributes({"nexus.job": record.job})
            error = ""
        except NexusError as refused:
            error = refused.info.code or refused.info.type
            raise
        finally:
            span.end(monotonic(), error=error)
        return record

    async def _submit_within_limits(self, envelope: Envelope, submission: Submission) -> JobRecord:
        reservation = await self._reserve(envelope, submission)
        admission: Admission | None = None
        try:
            admission = await self._admit(envelope, submission)
            record = await self._submit(envelope, submission, admission.reserved if admission is not None else 0)
        except BaseException:
            if admission is not None:
                admission.settle(0)
            if reservation is not None:
                reservation.release()
            raise
        if reservation is not None:
            reservation.hand_over()
        if self._inspector is not None and (inspection := submission.principal.limits.inspection) is not None:
            self._inspect(self._inspector, inspection, record, submission)
        return record

    def _inspect(self, inspector: Inspector, inspection: Inspection, record: JobRecord, submission: Submission) -> None:
        """Keep the request for administrators; the recorder of outcomes adds the answer."""
        opened = inspector.open(
            inspection,
            owner=record.owner,
            key=record.key,
            request_id=record.request_id,
            endpoint=record.endpoint,
            body=submission.received.body,
        )
        if opened is not None:
            inspector.store(opened, record.job, record.public_model, durable=True)

    async def _reserve(self, envelope: Envelope, submission: Submission) -> Reservation | None:
        """Reserve the job's estimate of its budgets. Raises InsufficientQuota, RateLimited."""
        limits, received = submission.principal.limits, submission.received
        if self._budgets is None or not limits.budgets:
            return None
        size = received.body_size or len(received.body)
        return await self._budgets.reserve(limits, envelope.capability, received.request, size)

    async def _admit(self, envelope: Envelope, submission: Submission) -> Admission | None:
        """Take the job's part of its limits per minute. Raises RateLimited."""
        limits, received = submission.principal.limits, submission.received
        if self._rate_limiter is None or not limits.is_rated:
            return None
        size = received.body_size or len(received.body)
        return await self._rate_limiter.admit(limits, estimate_tokens(envelope.capability, received.request, size))

    async def _submit(self, envelope: Envelope, submission: Submission, reserved_tokens: int) -> JobRecord:
        expires_at = None if submission.timeout_s is None else now() + max(1, round(submission.timeout_s))
        sealed = self._content_keys is not None and self._content_keys.are_needed(
            envelope.owner, retain_none=submission.principal.limits.retain_none
        )
        bare = bare_envelope(envelope) if sealed else envelope
        record = new_record(bare, queue_s=self._queue_limit_s(submission), expires_at=expires_at)
        record = record.model_copy(update={"reserved_tokens": reserved_tokens})
        if not await self._create(record, submission):
            existing = await self._store.get(record.owner, record.job)
            if existing is not None and await self.was_enqueued(record.job):
                return existing
        elif (
            submission.job_id
            and not submission.batch
            and (ended := await self._recorded_outcome(record.job)) is not None
        ):
            return ended
        return await self._enqueue(envelope, record, submission)

    async def _recorded_outcome(self, job_id: str) -> JobRecord | None:
        """Return the terminal record of a job that was submitted before and has ended, or None."""
        stored = await self._log.read_outcome(job_id)
        if stored is None:
            return None
        await self._terminator.record_outcome(stored)
        return record_from_outcome(stored.outcome, stored.stored_at)

    async def was_enqueued(self, job_id: str) -> bool:
        """Return whether the job is known to have been in the queue. Raises Unavailable."""
        return bool(await self._log.first_events(job_id, 1)) or await self._log.read_outcome(job_id) is not None

    async def resubmit(self, envelope: Envelope, body: bytes, record: JobRecord) -> JobRecord:
        """Store the message of a new run whose record already exists. Raises as `JobsApi.submit`."""
        await self._open_queue(envelope)
        seq = await self._store_message(envelope, body)
        record = record.model_copy(update={"seq": seq})
        self._log.append_event_unconfirmed(record.job, _queued_event(record, envelope, body))
        with contextlib.suppress(NexusError, IllegalMove):  # the job is in the queue in any case
            await self._store.update(record.owner, record.job, run=record.run, seq=seq)
        return record

    async def _create(self, record: JobRecord, submission: Submission) -> bool:
        due_s = seconds_until_due(record, JobStatus.QUEUED, 0.0)
        limit = submission.principal.limits.queued
        try:
            return await self._store.create(record, ttl_s=self._keep_s, due_s=due_s, max_queued=limit)
        except LimitReached as reached:
            key, owner = limit or JobLimit()
            most, holder = (key, "API key") if str(reached) == "key" else (owner, "team")
            raise RateLimited(
                f"This {holder} has reached its limit of {most} waiting jobs. Retry when some of them have started.",
                retry_after_s=5.0,
            ) from None

    async def _enqueue(self, envelope: Envelope, record: JobRecord, submission: Submission) -> JobRecord:
        try:
            await self._open_queue(envelope)
        except BaseException:
            with contextlib.suppress(NexusError):  # otherwise the record expires without ever running
                await self._store.remove(record.owner, record.job)
            raise
        try:
            body = submission.received.body
            if record.sealed:
                envelope, body = await self._seal(envelope, body, submission)
            seq = await self._store_message(envelope, body)
        except BaseException as error:
            await self._revoke(record, submission, error)
            raise
        submission.received.blobs = []  # they belong to the job now
        self._metrics.child(self._metrics.jobs_submitted, record.endpoint).inc()
        record = record.model_copy(update={"seq": seq})
        # The job is safely queued, so the caller need not wait for its first event.
        self._log.append_event_unconfirmed(record.job, _queued_event(record, envelope, body))
        return record

    async def _seal(self, envelope: Envelope, body: bytes, submission: Submission) -> tuple[Envelope, bytes]:
        """Return the sealed request. Its key is stored first: a job without it could not run."""
        assert self._content_keys is not None
        key = await self._content_keys.create(
            envelope.job, envelope.owner, retain_none=submission.principal.limits.retain_none
        )
        return seal_request(key, envelope, body)

    async def _open_queue(self, envelope: Envelope) -> None:
        """Create the model's queue if it is missing. Raises Unavailable if the limit of queues is reached."""
        await self._dispatcher.bus.open_queue(Queue(envelope.capability, envelope.lane, envelope.model))

    async def _store_message(self, envelope: Envelope, body: bytes) -> int:
        seq = await self._log.enqueue(envelope, body)
        with contextlib.suppress(NexusError):  # the queue was deleted in between; gateways recreate it
            await self._open_queue(envelope)
        return seq

    async def _revoke(self, record: JobRecord, submission: Submission, error: BaseException) -> None:
        """Undo a failed submission. NATS may have stored the message, so cancel the job unless it can be resubmitted."""
        with contextlib.suppress(NexusError):
            if isinstance(error, Unavailable) and not submission.job_id:
                await self._terminator.store_outcome(outcome_of(record, JobStatus.CANCELLED))
            elif isinstance(error, Unavailable):
                submission.received.blobs = []  # a queued message may refer to them
        with contextlib.suppress(NexusError):
            await self._store.remove(record.owner, record.job)

    def _envelope(self, submission: Submission) -> Envelope:
        endpoint, received, principal = submission.endpoint, submission.received, submission.principal
        request, dispatcher = received.request, self._dispatcher
        public_model = target_model(endpoint, request, dispatcher.catalog)
        stream_type = endpoint.stream_type(request)
        job_id = submission.job_id or new_job_id()
        lane = submission.lane or LANE_BY_TIER.get(request.service_tier, Lane.DEFAULT)
        principal.limits.require_model(public_model)
        principal.limits.require_lane(lane)
        model = dispatcher.catalog.resolve(public_model, endpoint.capability, may_wait=not submission.caller_waits)
        dispatcher.require_in_bounds(model, endpoint.path, {**request.__dict__, **(request.model_extra or {})})
        return Envelope(
            job=job_id,
            request_id=submission.request_id,
            endpoint=endpoint.job_path,
            capability=endpoint.capability,
            lane=lane,
            model=model,
            public_model=public_model,
            stream=stream_type is not None,
            reply=EVENT_SUBJECT_PREFIX + job_id,
            owner=principal.owner,
            limits=dispatcher.limits_of(endpoint.capability),
            metadata=submission.metadata,
            body_size=received.body_size,
            body_blob=received.body_blob,
            uploads=received.uploads,
            keep_s=self._keep_s,
            durable=True,
            stream_type=(stream_type or b"").decode(),
            shown_endpoint=submission.shown_endpoint or endpoint.shown_path,
            key=principal.key_id,
            unsupported=dispatcher.catalog.unsupported(public_model),
            webhook=submission.webhook,
            batch=submission.batch,
        )

    def _queue_limit_s(self, submission: Submission) -> float:
        if submission.caller_waits:
            return self._dispatcher.limits_of(submission.endpoint.capability).queue_s
        return self._queue_s


def _queued_event(record: JobRecord, envelope: Envelope, body: bytes) -> bytes:
    return encode_frame(QUEUED, record.run, 0, 0, NO_TOKEN, encode_queued(record, envelope, body))
