"""Keeps the redacted requests and answers of inspected teams.

A team's newest requests are documents that expire; a list of their ids bounds them. Storing happens behind the answer. It is best
effort: while Redis is away, or more than `MAX_PENDING` requests wait to be stored, some are not kept, and no request waits.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import orjson
import structlog

from backbone.store.documents import DocumentStore
from gateway import clock
from gateway.inspector.redaction import MAX_READ_BYTES, describe_body, is_text, join_stream
from schemas.errors import NexusError, NotFound
from schemas.inspection import MAX_INSPECTION_S, InspectedRequest, InspectedSummary, Inspection
from schemas.jobs import is_sse
from schemas.outcome import Outcome

log = structlog.get_logger(__name__)

KIND, LIST_KIND = "inspected", "inspected-list"
LIST_ID = "newest"
MAX_PENDING = 64
"""Requests of a gateway that wait to be stored."""
MAX_LIST_TRIES = 20
LIST_LIFETIME_S = 2.0 * MAX_INSPECTION_S
"""Longer than an inspection and what it keeps."""
OUTCOME_TRIES, OUTCOME_RETRY_S = 3, 0.3
"""A short job may end before its request is stored."""
MAX_OPEN = 128
"""Requests that a gateway keeps at once while they are answered; further ones are not kept."""
MAX_STREAM_BYTES = 256 * 1024
"""Bytes of a stream that are collected before it is joined."""
SUMMARY_FIELDS = frozenset(InspectedSummary.model_fields)


class InspectedRequestNotFound(NotFound):
    """The request was not kept, or is not kept any more."""

    code = "inspected_request_not_found"


@dataclass(slots=True)
class OpenInspection:
    """One request of an inspected team, until it is stored."""

    inspection: Inspection
    owner: str
    key: str
    request_id: str
    endpoint: str
    body: bytes
    """The beginning of the body."""
    request_bytes: int
    created_at: float
    _pieces: list[bytes] = field(default_factory=list)
    _answer_bytes: int = 0
    _kept_bytes: int = 0

    def add_output(self, data: bytes) -> None:
        """Collect a piece of the answer."""
        self._answer_bytes += len(data)
        if self._kept_bytes < MAX_STREAM_BYTES:
            self._pieces.append(data)
            self._kept_bytes += len(data)

    def observing(self, note: Callable[[bytes], None]) -> Callable[[bytes], None]:
        """Return a function that does what `note` does, and collects the piece."""

        def note_and_collect(data: bytes) -> None:
            note(data)
            self.add_output(data)

        return note_and_collect

    def redacted(self, content_type: str) -> dict[str, Any]:
        """Return the fields of the request, and of the answer that was collected. This takes some milliseconds."""
        patterns = self.inspection.redact
        fields: dict[str, Any] = {
            "request": describe_body(self.body, "application/json", patterns, size=self.request_bytes),
            "request_bytes": self.request_bytes,
        }
        if self._answer_bytes:
            data = b"".join(self._pieces)
            if is_sse(content_type):
                data, content_type = join_stream(data), "application/json"
            fields |= {"answer": describe_body(data, content_type, patterns), "answer_bytes": self._answer_bytes}
        return fields


class Inspector:
    """Stores and reads the requests of inspected teams."""

    def __init__(
        self,
        documents: DocumentStore,
        inspection_of: Callable[[str], Inspection | None],
        now: Callable[[], float] = clock.now,
    ) -> None:
        """`inspection_of` returns the inspection of a team, also one that has ended."""
        self._documents = documents
        self._inspection_of = inspection_of
        self._now = now
        self._tasks: set[asyncio.Task[None]] = set()
        self._open = 0

    async def start(self) -> None:
        """Do nothing: the document store has started."""

    async def close(self) -> None:
        """Wait for what is being stored."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def open(
        self, inspection: Inspection, *, owner: str, key: str, request_id: str, endpoint: str, body: bytes
    ) -> OpenInspection | None:
        """Begin to keep a request, which `store` or `drop` ends; None: it is not kept, as the inspection has ended."""
        now = self._now()
        if now >= inspection.until or self._open >= MAX_OPEN:
            return None
        self._open += 1
        return OpenInspection(inspection, owner, key, request_id, endpoint, body[:MAX_READ_BYTES], len(body), now)

    def drop(self) -> None:
        """End a request that is not stored: it became no job."""
        self._open -= 1

    def store(
        self,
        opened: OpenInspection,
        job: str,
        model: str,
        *,
        content_type: str = "",
        durable: bool = False,
        **fields: Any,
    ) -> None:
        """Store a request in the background. `content_type`: of its answer; `fields`: those of `InspectedRequest` that are known by now."""
        self._open -= 1
        if len(self._tasks) >= MAX_PENDING:
            log.debug("inspector.request_dropped", team=opened.owner)
            return
        summary = {
            "id": job,
            "request_id": opened.request_id,
            "endpoint": opened.endpoint,
            "model": model,
            "created_at": opened.created_at,
            "durable": durable,
            "key": opened.key,
        }
        self._run_in_background(self._redact_and_store(opened, content_type, summary | fields))

    def record_outcome(self, outcome: Outcome, payload: bytes, attempts_s: float | None) -> None:
        """Add the answer of a durable job to its request, if it is kept."""
        inspection = self._inspection_of(outcome.owner)
        if inspection is None or self._now() > inspection.until + inspection.keep_s:
            return
        if len(self._tasks) < MAX_PENDING:
            self._run_in_background(self._add_outcome(inspection, outcome, payload, attempts_s))

    def _run_in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(self._quietly(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _quietly(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except NexusError as error:
            log.debug("inspector.request_dropped", error=error.info.message)
        except Exception:
            log.exception("inspector.defect")

    async def _redact_and_store(self, opened: OpenInspection, content_type: str, fields: dict[str, Any]) -> None:
        texts = await asyncio.to_thread(opened.redacted, content_type)  # requests get their turn meanwhile
        entry = InspectedRequest.model_validate(fields | texts)
        await self._store(opened.owner, opened.inspection, entry)

    async def _store(self, owner: str, inspection: Inspection, entry: InspectedRequest) -> None:
        await self._documents.put(KIND, owner, entry.id, entry.model_dump_json().encode(), ttl_s=inspection.keep_s)
        summary = entry.model_dump(include=set(SUMMARY_FIELDS))
        for _ in range(MAX_LIST_TRIES):
            before = await self._documents.get(LIST_KIND, owner, LIST_ID)
            entries = [one for one in _entries(before) if one["id"] != entry.id]
            entries = sorted((summary, *entries), key=lambda one: one["created_at"], reverse=True)
            data = orjson.dumps(entries[: inspection.max_requests])
            if before is None:
                written = await self._documents.add(LIST_KIND, owner, LIST_ID, data, ttl_s=LIST_LIFETIME_S)
            else:
                written = await self._documents.swap(LIST_KIND, owner, LIST_ID, before, data)
            if written:
                for dropped in entries[inspection.max_requests :]:
                    await self._documents.remove(KIND, owner, dropped["id"])
                return
        # Other gateways were faster each time. A request that no list names cannot be found: it must not stay.
        await self._documents.remove(KIND, owner, entry.id)

    async def _add_outcome(
        self, inspection: Inspection, outcome: Outcome, payload: bytes, attempts_s: float | None
    ) -> None:
        for _ in range(OUTCOME_TRIES):
            data = await self._documents.get(KIND, outcome.owner, outcome.job)
            if data is not None:
                break
            await asyncio.sleep(OUTCOME_RETRY_S)
        else:
            return
        entry = InspectedRequest.model_validate_json(data)
        fields: dict[str, Any] = {
            "worker": outcome.worker,
            "attempts": outcome.attempts,
            "seconds": round(max(0.0, self._now() - entry.created_at), 3),
            "queue_s": None if attempts_s is None else round(max(0.0, self._now() - entry.created_at - attempts_s), 3),
            "status": 200 if outcome.error is None else outcome.error.status,
            "error": (outcome.error.code or outcome.error.type) if outcome.error is not None else None,
        }
        if outcome.sealed:
            fields["answer"] = "[encrypted with the team's key]"
        elif outcome.error is None:
            fields["answer"] = await asyncio.to_thread(_answer_of, outcome, payload, inspection)
            fields["answer_bytes"] = outcome.size
        ended = entry.model_copy(update=fields)
        left_s = entry.created_at + inspection.keep_s - self._now()
        if left_s > 0:
            await self._documents.put(KIND, outcome.owner, outcome.job, ended.model_dump_json().encode(), ttl_s=left_s)

    # Reading

    async def list_requests(self, team: str) -> list[InspectedSummary]:
        """Return the kept requests of a team, newest first. Raises Unavailable."""
        found = _entries(await self._documents.get(LIST_KIND, team, LIST_ID))
        inspection = self._inspection_of(team)
        since = self._now() - inspection.keep_s if inspection is not None else self._now()
        return [InspectedSummary.model_validate(one) for one in found if one["created_at"] >= since]

    async def read(self, team: str, request_id: str) -> InspectedRequest:
        """Return a kept request. Raises InspectedRequestNotFound, Unavailable."""
        data = await self._documents.get(KIND, team, request_id)
        if data is None:
            raise InspectedRequestNotFound(
                f"No request '{request_id[:100]}' of the team '{team[:100]}' is kept. `GET /v1/inspector/requests?team=…` lists those that are."
            )
        return InspectedRequest.model_validate_json(data)

    async def forget(self, team: str) -> None:
        """Delete all kept requests of a team. Raises Unavailable."""
        for one in _entries(await self._documents.get(LIST_KIND, team, LIST_ID)):
            await self._documents.remove(KIND, team, one["id"])
        with contextlib.suppress(NexusError):
            await self._documents.remove(LIST_KIND, team, LIST_ID)


def _entries(data: bytes | None) -> list[dict[str, Any]]:
    return orjson.loads(data) if data else []


def _answer_of(outcome: Outcome, payload: bytes, inspection: Inspection) -> str:
    if outcome.blob is not None or (len(payload) > MAX_READ_BYTES and not is_text(outcome.content_type)):
        return f"[{outcome.content_type.partition(';')[0]}, {outcome.size} bytes, not shown]"
    if is_sse(outcome.content_type):
        return describe_body(join_stream(payload), "application/json", inspection.redact)
    return describe_body(payload, outcome.content_type, inspection.redact)
