"""Responses: each is a durable chat job, and a document that outlives it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import structlog

from backbone.bus.blobs import BlobNotFound, BlobStore
from backbone.ids import new_job_id
from gateway import clock
from gateway.auth.authenticator import Principal
from gateway.http.disconnect import CallerTasks
from gateway.http.inference_body import InferenceBodyReader, ReceivedRequest
from gateway.jobs.api import JobNotFound, JobResult, JobsApi, Submission
from gateway.jobs.http_response import result_error
from gateway.jobs.idempotency import Idempotency
from gateway.metrics import GatewayMetrics
from gateway.responses.event_stream import ResponseEventStream, job_finished_at
from gateway.responses.from_chat import ResponseBuilder
from gateway.responses.input_items import input_item_objects, to_messages
from gateway.responses.references import ItemReferences
from gateway.responses.repository import CreatedResponse, ResponseNotFound, ResponseRepository, StoredResponse
from gateway.responses.resource import RESPONSE_STATUSES, initial_response, unanswered_response
from gateway.responses.to_chat import chat_body, conversation, reject_unsupported, without_openai_tools
from schemas.endpoints import EndpointSpec
from schemas.errors import InvalidRequest, NexusError, NotFound, Unavailable
from schemas.jobs import TERMINAL_STATUSES, JobStatus
from schemas.openai.responses import InputItem, ResponsesRequest

log = structlog.get_logger(__name__)

JSON = dict[str, Any]

PATH = "/v1/responses"
RESULT_WAIT_S = 300.0
"""How long one look at a job waits; then comes the next."""
TRANSLATION_CHUNK_BYTES = 64 * 1024
"""Bytes of a chat stream that are translated at a time."""
OUTAGE_TOLERANCE_S = 30.0
"""A caller waits this much longer for what is away."""
RESPONSE_FIELD_NAMES = {"messages": "input", "max_tokens": "max_output_tokens"}
"""What the caller calls what chat calls so."""


class ResponseService:
    """See the module's docstring. Every call raises Unavailable where what it needs is away."""

    def __init__(
        self,
        jobs: JobsApi,
        caller_tasks: CallerTasks,
        repository: ResponseRepository,
        blobs: BlobStore,
        reader: InferenceBodyReader,
        idempotency: Idempotency,
        chat: EndpointSpec,
        metrics: GatewayMetrics,
        *,
        keep_alive_s: float,
        refuse_other_tools: bool = False,
    ) -> None:
        """`reader`: its blobs last as long as a job may. `chat`: what responses become. `pause_s`: seconds of silence after
        which a stream says that it is still there.
        """
        self.metrics = metrics
        self.keep_alive_s = keep_alive_s
        self.open = caller_tasks
        self._jobs = jobs
        self._repository = repository
        self._blobs = blobs
        self._reader = reader
        self._idempotency = idempotency
        self._chat = chat
        self._refuse_other_tools = refuse_other_tools
        self._references = ItemReferences(repository, self._current_state)

    # Making one

    async def create(
        self, principal: Principal, request: ResponsesRequest, request_id: str, key: str = ""
    ) -> CreatedResponse:
        """Submit its job. With a `key` of idempotency that was used before, join what it made.

        Raises InvalidRequest, NotFound, QueueFull, RateLimited, RequestTooLarge, IdempotencyMismatch.
        """
        reject_unsupported(request)
        if not self._refuse_other_tools:
            request = without_openai_tools(request)
        owner = principal.owner
        request = await self._references.resolve(owner, request)
        messages = conversation(request, await self._previous_messages(owner, request.previous_response_id))
        received = await self._received(chat_body(request, messages))
        try:
            job = new_job_id()
            if key:
                job = await self._idempotency.job_id(owner, key, PATH, ReceivedRequest(request, b""))
            created = await self._store_new(owner, job, request, messages, joining=bool(key))
            submission = Submission(
                principal=principal,
                endpoint=self._chat,
                received=received,
                request_id=request_id,
                metadata=request.metadata or {},
                job_id=job,
                shown_endpoint=PATH,
                caller_waits=not request.background,
            )
            try:
                await self._jobs.submit(submission)
            except BaseException:
                if created.stored is not None and not key:
                    await self._discard(created.stored)
                raise
        finally:
            await received.discard()  # nothing, once it is the job's
        return created

    async def _received(self, body: JSON) -> ReceivedRequest:
        try:
            return await self._reader.read_value(self._chat, body)
        except InvalidRequest as error:
            first, _, rest = (error.info.param or "").partition(".")
            param = RESPONSE_FIELD_NAMES.get(first, first) + (
                f".{rest}" if rest and first not in RESPONSE_FIELD_NAMES else ""
            )
            raise InvalidRequest(info=error.info.model_copy(update={"param": param or None})) from None

    async def _store_new(
        self, owner: str, job: str, request: ResponsesRequest, messages: list[JSON], *, joining: bool
    ) -> CreatedResponse:
        new = initial_response(request, job, int(clock.now()))
        stored = None
        if request.stored:
            talk = {"messages": messages, "input": input_item_objects(request.input, str(new["id"]))}
            stored = await self._repository.add(owner, job, new, talk)
        bound_to_connection = not (request.background or joining)
        return CreatedResponse(owner, job, stored.initial if stored is not None else new, stored, bound_to_connection)

    async def _discard(self, stored: StoredResponse) -> None:
        try:
            await self._repository.remove(stored)
        except Unavailable:
            log.warning("a response without a job is kept until its time ends", response=stored.id)

    async def _previous_messages(self, owner: str, previous: str | None) -> list[JSON]:
        """The conversation up to and with the response before this one. Raises NotFound, InvalidRequest."""
        if previous is None:
            return []
        param = "previous_response_id"
        unknown = NotFound(
            f"Previous response with id '{previous[:100]}' not found.", code="previous_response_not_found", param=param
        )
        try:
            stored = await self._repository.get(owner, previous)
            response = await self._current_state(stored)
            talk = await self._repository.talk(stored)
        except (ResponseNotFound, BlobNotFound):
            raise unknown from None
        if response["status"] not in ("completed", "incomplete"):
            raise InvalidRequest(
                f"the response '{previous}' is {response['status']}: only one that has an answer can be gone on from",
                code="previous_response_not_completed",
                param=param,
            )
        return [*talk["messages"], *to_messages(InputItem.model_validate(item) for item in response["output"])]

    # Its answer

    async def answer(self, created: CreatedResponse) -> tuple[JSON, tuple[str, ...]]:
        """The final response, once its job has ended, and the parameters that were adapted.

        Raises what the job ended with, unless it was cancelled.
        """
        result = await self._wait_for_result(created)
        final = await self._store_final(
            created, await self._build_final(created.owner, created.job, created.initial, result)
        )
        error = result_error(result)
        if error is not None and final["status"] != "cancelled":
            raise NexusError.from_info(error)
        return final, result.outcome.adapted

    async def _wait_for_result(self, created: CreatedResponse) -> JobResult:
        """What was accepted goes on while Redis or NATS is away for a while; so does waiting for it."""
        loop = asyncio.get_running_loop()
        lost_at = None
        while True:
            try:
                result = await self._jobs.wait_for_result(created.owner, created.job, RESULT_WAIT_S)
                if result is not None:
                    return result
                lost_at = None
            except Unavailable:
                lost_at = lost_at or loop.time()
                if loop.time() - lost_at > OUTAGE_TOLERANCE_S:
                    raise
                await asyncio.sleep(1)

    def event_stream(self, created: CreatedResponse, after: int = -1) -> ResponseEventStream:
        """Its events with numbers above `after`."""
        return ResponseEventStream(self._jobs, created, after, self._store_final, self._read_result)

    async def abandon(self, created: CreatedResponse) -> None:
        """Its caller has hung up. Best effort."""
        try:
            await self._jobs.cancel(created.owner, created.job)
        except NexusError as error:
            log.warning("an abandoned response goes on", job=created.job, error=error.info.message)

    async def _build_final(self, owner: str, job: str, began_as: JSON, result: JobResult) -> JSON:
        outcome = result.outcome
        if outcome.status is not JobStatus.COMPLETED:
            return unanswered_response(began_as, outcome.status, result_error(result))
        data = await self._read_data(result)
        builder = ResponseBuilder(began_as)
        for some in _split_frames(data):
            builder.add_frames(some)
            await asyncio.sleep(0)  # others get their turn
        builder.close_items(outcome.usage.model_dump() if outcome.usage is not None else None)
        return builder.final_response(await job_finished_at(self._jobs, owner, job))

    async def _read_data(self, result: JobResult) -> bytes:
        """The chat stream, without its end mark. Raises BlobNotFound."""
        if result.blob is None:
            return result.data
        return b"".join([piece async for piece in self._blobs.read(result.blob.name)])

    async def _read_result(self, created: CreatedResponse) -> tuple[JobResult, bytes]:
        result = await self._jobs.result(created.owner, created.job)
        return result, await self._read_data(result)

    async def _store_final(self, created: CreatedResponse, final: JSON) -> JSON:
        """Keep the final response beyond its job's life. Returns what everybody will see."""
        if created.stored is None:
            return final
        try:
            return await self._repository.finish(created.stored, final)
        except Unavailable as error:  # the next one who asks for it keeps it
            log.warning("a response is not kept yet", response=created.id, error=error.info.message)
            return final

    # What is kept

    async def retrieve(self, owner: str, response_id: str) -> JSON:
        """As it stands. Raises ResponseNotFound."""
        return await self._current_state(await self._repository.get(owner, response_id))

    async def created(self, owner: str, response_id: str) -> CreatedResponse:
        """One that was made before. Raises ResponseNotFound."""
        return _created_from(await self._repository.get(owner, response_id))

    async def cancel(self, owner: str, response_id: str) -> JSON:
        """End a background response; one that has ended stays as it is. Raises ResponseNotFound, InvalidRequest."""
        stored = await self._repository.get(owner, response_id)
        if not stored.initial["background"]:
            raise InvalidRequest("Cannot cancel a synchronous response.", code="response_not_background")
        if stored.final is None:
            try:
                await self._jobs.cancel(owner, stored.job)
            except JobNotFound:
                raise _no_longer_stored(stored) from None
        return await self._current_state(stored)

    async def delete(self, owner: str, response_id: str) -> None:
        """Forget it; if it still runs, it ends. Raises ResponseNotFound."""
        stored = await self._repository.get(owner, response_id)
        if stored.final is None:
            with suppress(JobNotFound):
                await self._jobs.cancel(owner, stored.job)
        await self._repository.remove(stored)

    async def input_items(self, owner: str, response_id: str) -> list[JSON]:
        """Its own input, oldest first. Raises ResponseNotFound."""
        stored = await self._repository.get(owner, response_id)
        try:
            items: list[JSON] = (await self._repository.talk(stored))["input"]
        except BlobNotFound:
            raise _no_longer_stored(stored) from None
        return items

    async def _current_state(self, stored: StoredResponse) -> JSON:
        if stored.final is not None and stored.final["status"] != "failed":
            return stored.final
        try:
            record = await self._jobs.get(stored.owner, stored.job)
            if record.status not in TERMINAL_STATUSES:
                return stored.initial | {"status": RESPONSE_STATUSES[record.status]}
            result = await self._jobs.result(stored.owner, stored.job)
            final = await self._build_final(stored.owner, stored.job, stored.initial, result)
        except NotFound:  # job, result or blob: all are kept for a shorter time
            if stored.final is not None:
                return stored.final
            raise _no_longer_stored(stored) from None
        return await self._store_final(_created_from(stored), final)


def _split_frames(data: bytes) -> Iterator[bytes]:
    """Frames, some at a time."""
    at = 0
    while at < len(data):
        end = data.find(b"\n\n", at + TRANSLATION_CHUNK_BYTES)
        end = len(data) if end < 0 else end + 2
        yield data[at:end]
        at = end


def _created_from(stored: StoredResponse) -> CreatedResponse:
    return CreatedResponse(stored.owner, stored.job, stored.initial, stored, bound_to_connection=False)


def _no_longer_stored(stored: StoredResponse) -> ResponseNotFound:
    return ResponseNotFound(f"The answer of '{stored.id}' is not kept any more.")
