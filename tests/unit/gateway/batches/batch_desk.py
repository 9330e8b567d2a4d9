"""A batch service in memory: the scheduler is real, and jobs end as the test scripts."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from typing import Any, cast

import orjson

from backbone.bus.blobs import INLINE_LIMIT_BYTES
from backbone.bus.job_log import JobLog
from backbone.testing.blobs import MemoryBlobStore
from backbone.testing.bus import MemoryBroker
from backbone.testing.byte_quotas import MemoryByteQuotas
from backbone.testing.documents import MemoryDocumentStore
from backbone.testing.job_log import MemoryJobLog
from gateway.auth.authenticator import Principal
from gateway.batches.line_jobs import BatchDependencies
from gateway.batches.line_types import EndpointLineType, LineType
from gateway.batches.repository import BatchRepository
from gateway.batches.scheduler import BatchScheduler
from gateway.batches.service import BatchService
from gateway.files import FileReferences, FileStore
from gateway.http.body_memory import BodyMemory
from gateway.http.inference_body import InferenceBodyReader
from gateway.http.remote_media import RemoteMedia
from gateway.jobs.api import JobNotFound, JobResult, JobsApi, ResultNotReady, Submission
from gateway.jobs.http_response import JobResponder
from gateway.jobs.records import record_from_outcome
from gateway.limits.effective import NO_LIMITS
from gateway.signed_urls import UrlSigner
from schemas.batches import Batch, BatchRequest, BatchStatus, RequestCounts
from schemas.endpoints import BY_PATH
from schemas.errors import ErrorInfo, NexusError, Unavailable
from schemas.files import FileRecord
from schemas.frames import BlobRef
from schemas.jobs import JobRecord, JobStatus, Upload, Usage
from schemas.outcome import Outcome

OWNER = "alice"
CHAT = "/v1/chat/completions"
ENDPOINTS = {path: BY_PATH[path] for path in (CHAT, "/v1/embeddings", "/v1/audio/speech", "/v1/audio/transcriptions")}


class Answered:
    """An answer of a job that a test makes up."""

    def __init__(self, data: bytes, content_type: str = "application/json", usage: Usage | None = None) -> None:
        self.data = data
        self.content_type = content_type
        self.usage = usage


End = Answered | ErrorInfo | None
"""How a job ends; None: not by itself."""


def echoed(body: dict[str, Any]) -> End:
    """The request's first message comes back."""
    usage = Usage.model_validate(
        {
            "prompt_tokens": 3,
            "completion_tokens": 2,
            "total_tokens": 5,
            "prompt_tokens_details": {"cached_tokens": 1},
            "completion_tokens_details": None,
        }
    )
    return Answered(orjson.dumps({"echo": body["messages"][0]["content"]}), usage=usage)


class ScriptedJobs:
    """The part of `gateway.jobs.api.JobsApi` that batches use. A job ends on submission as `ends` scripts, or on request."""

    def __init__(self, log: JobLog, blobs: MemoryBlobStore) -> None:
        self.ends: Callable[[dict[str, Any]], End] = echoed
        self.refusals: list[NexusError] = []
        """Given out first, one a submission."""
        self.open: dict[str, Submission] = {}
        """Jobs that have not ended."""
        self.submitted: list[Submission] = []
        self.runs: Counter[str] = Counter()
        self.cancelled: list[str] = []
        self.uploads: list[Upload] = []
        self.forgotten: dict[str, JobRecord] = {}
        """Records of jobs whose terminal words are not kept any more."""
        self._log = log
        self._blobs = blobs

    async def submit(self, submission: Submission) -> JobRecord:
        if self.refusals:
            raise self.refusals.pop(0)
        self.submitted.append(submission)
        outcome = self._word(submission, JobStatus.COMPLETED)
        if submission.job_id in self.open or await self._log.read_outcome(submission.job_id) is not None:
            return record_from_outcome(outcome)
        self.runs[submission.job_id] += 1
        self.uploads += submission.received.uploads
        end = self.ends(orjson.loads(submission.received.body))
        self.open[submission.job_id] = submission
        if end is not None:
            await self.finish(submission.job_id, end)
        return record_from_outcome(outcome)

    async def finish(self, job: str, end: Answered | ErrorInfo) -> None:
        submission = self.open.pop(job)
        if isinstance(end, ErrorInfo):
            await self._log.store_outcome(
                self._word(submission, JobStatus.FAILED).model_copy(update={"error": end}), b"job"
            )
            return
        outcome = self._word(submission, JobStatus.COMPLETED)
        outcome = outcome.model_copy(update={"content_type": end.content_type, "usage": end.usage})
        if len(end.data) <= INLINE_LIMIT_BYTES:
            await self._log.store_outcome(outcome, end.data)
            return
        writer = self._blobs.writer(ttl_s=60)
        await writer.write(end.data)
        info = await writer.close()
        await self._log.store_outcome(outcome.model_copy(update={"blob": BlobRef(name=info.name, size=info.size)}))

    async def result(self, owner: str, job_id: str) -> JobResult:
        stored = await self._log.read_outcome(job_id)
        if stored is None or stored.outcome.owner != owner:
            raise ResultNotReady if job_id in self.open else JobNotFound
        data = stored.payload if stored.outcome.status is JobStatus.COMPLETED else b""
        return JobResult(stored.outcome, data, stored.outcome.blob, stored.outcome.content_type)

    async def get(self, owner: str, job_id: str) -> JobRecord:
        if job_id not in self.forgotten:
            raise JobNotFound
        return self.forgotten[job_id]

    async def cancel(self, owner: str, job_id: str) -> JobRecord:
        if job_id in self.forgotten:
            return self.forgotten[job_id]
        if job_id not in self.open:
            raise JobNotFound
        self.cancelled.append(job_id)
        outcome = self._word(self.open.pop(job_id), JobStatus.CANCELLED)
        await self._log.store_outcome(outcome)
        return record_from_outcome(outcome)

    def _word(self, submission: Submission, status: JobStatus) -> Outcome:
        return Outcome(
            job=submission.job_id,
            status=status,
            owner=submission.principal.owner,
            endpoint=submission.endpoint.path,
            capability=submission.endpoint.capability,
            model="m",
            public_model="m",
            request_id=submission.request_id,
            batch=submission.batch,
        )


class Desk:
    """One store of everything, and the gateways that a test starts on it."""

    def __init__(self, *, window: int = 8) -> None:
        self.broker = MemoryBroker()
        self.log = MemoryJobLog(self.broker)
        self.blobs = MemoryBlobStore()
        self.documents = MemoryDocumentStore()
        self.limits = NO_LIMITS
        self.result_quotas = MemoryByteQuotas()
        self.files = FileStore(
            self.documents, self.blobs, 10_000_000, 86_400.0, BodyMemory(10_000_000), MemoryByteQuotas(), 5.0
        )
        self.jobs = ScriptedJobs(self.log, self.blobs)
        self.repository = BatchRepository(self.documents, 86_400.0)
        self.backlog = self.log.work_queue("batches")
        self.batches = BatchService(self.repository, self.files, self.backlog, ENDPOINTS, max_window_s=86_400.0)
        self.runners: list[BatchScheduler] = []
        jobs = cast("JobsApi", self.jobs)
        uploads, payload = (
            FileReferences(self.files.open),
            JobResponder(jobs, self.blobs, UrlSigner("k", "", 60), 10.0).payload,
        )
        line_types: dict[str, LineType] = {
            path: EndpointLineType(endpoint, uploads, payload) for path, endpoint in ENDPOINTS.items()
        }
        self.dependencies = BatchDependencies(
            repository=self.repository,
            files=self.files,
            blobs=self.blobs,
            jobs=jobs,
            log=self.log,
            reader=InferenceBodyReader(
                self.blobs, 2_000_000, 5.0, 60.0, BodyMemory(10_000_000), RemoteMedia(None, 2_000_000)
            ),
            line_types=line_types,
            window=window,
            limits=lambda _: self.limits,
            results=self.result_quotas,
        )

    async def gateway(self) -> BatchScheduler:
        """One more that runs batches."""
        runner = BatchScheduler(self.backlog, self.dependencies)
        await runner.start()
        self.runners.append(runner)
        return runner

    async def close(self) -> None:
        for runner in self.runners:
            await runner.close()
        await self.log.close()

    async def file(
        self, data: bytes, *, purpose: str = "batch", content_type: str = "text/plain", owner: str = OWNER
    ) -> FileRecord:
        writer = self.files.writer(owner, 86_400.0)
        await writer.write(data)
        blob = await writer.close()
        return await self.files.add(
            owner,
            blob=blob.name,
            size=blob.size,
            filename="in.jsonl",
            purpose=purpose,
            keep_s=86_400.0,
            content_type=content_type,
        )

    async def create(
        self, *lines: bytes, endpoint: str = CHAT, window: str = "24h", caller: Principal | None = None, **fields: Any
    ) -> Batch:
        caller = caller or Principal(OWNER)
        file = await self.file(b"\n".join(lines), owner=caller.owner)
        request = BatchRequest(input_file_id=file.id, endpoint=endpoint, completion_window=window, **fields)
        return await self.batches.create(caller, request, "http://test")

    async def batch(self, batch: Batch) -> Batch:
        return await self.batches.get(OWNER, batch.id)

    async def stands(self, batch: Batch, counts: RequestCounts) -> bool:
        """Whether it is that far."""
        return (await self.batch(batch)).counts == counts

    async def is_in(self, batch: Batch, status: BatchStatus) -> bool:
        """Whether it is in this phase."""
        return (await self.batch(batch)).status is status

    async def ended(self, batch: Batch, timeout_s: float = 20.0) -> Batch:
        """The batch, once it has ended."""
        async with asyncio.timeout(timeout_s):
            while not (now := await self._looked(batch)).is_final:
                await asyncio.sleep(0.01)
        return now

    async def _looked(self, batch: Batch) -> Batch:
        try:
            return await self.batch(batch)
        except Unavailable:
            return batch

    async def rows(self, file_id: str | None) -> list[dict[str, Any]]:
        """A file of JSON lines."""
        if file_id is None:
            return []
        record = await self.files.open(OWNER, file_id)
        data = b"".join([piece async for piece in self.files.read(record)])
        assert len(data) == record.size
        assert data.endswith(b"\n")
        return [json.loads(line) for line in data.decode().split("\n")[:-1]]


def line(custom_id: str, *, url: str = CHAT, **body: Any) -> bytes:
    """A line of a batch's input; its message is the custom_id, unless the body says otherwise."""
    body = {"model": "m", "messages": [{"role": "user", "content": custom_id}]} | body
    return orjson.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body})
