"""Manages responses: each is a durable chat job and a document that outlives the job."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
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
"""The timeout of one wait for a result. The wait is repeated."""
TRANSLATION_CHUNK_BYTES = 64 * 1024
"""The size of the pieces in which a chat stream is translated."""
OUTAGE_TOLERANCE_S = 30.0
"""How long a caller waits during an outage of NATS or Redis."""
RESPONSE_FIELD_NAMES = {"messages": "input", "max_tokens": "max_output_tokens"}
"""The Responses API's names of chat fields, for error messages."""


class ResponseService:
    """Creates, reads and deletes responses. Every method raises Unavailable if NATS or Redis does not answer."""

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
        """Create a service.

        `reader` stores blobs for the lifetime of a job, `chat` is the endpoint of the jobs, and `keep_alive_s` is the pause
        after which a stream sends a comment.
        """
        self.metrics = metrics
        self.keep_alive_s = keep_alive_s
        self.caller_tasks = caller_tasks
        self._jobs = jobs
        self._repository = repository
        self._blobs = blobs
        self._reader = reader
        self._idempotency = idempotency
        self._chat = chat
        self._refuse_other_tools = refuse_other_tools
        self._references = ItemReferences(repository, self._current_state)

    # Creation

    async def create(
        self, principal: Principal, request: ResponsesRequest, request_id: str, key: str = ""
    ) -> CreatedResponse:
        """Submit a response's job. With an idempotency key that was used before, return the existing response.

        Raises InvalidRequest, NotFound, QueueFull, RateLimited, RequestTooLarge, IdempotencyMismatch.
        """
        reject_unsupported(request)
        if principal.limits.retain_none:
            request = _unstored(principal, request)
        if not self._refuse_other_tools:
            request = without_openai_tools(request)
        owner = principal.owner
        request = await self._references.resolve(owner, request)
        messages = conversation(request, await self._previous_messages(owner, request.previous_response_id))
        received = await self._received(principal, chat_body(request, messages))
        try:
            job = new_job_id()
            if key:
                job = await self._idempotency.job_id(owner, key, PATH, ReceivedRequest(request, b""))
            created = await self._store_new(principal, job, request, messages, joining=bool(key))
            created = replace(created, retain_none=principal.limits.retain_none)
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
            await received.discard()  # does nothing once the blobs belong to the job
        return created

    async def _received(self, principal: Principal, body: JSON) -> ReceivedRequest:
        try:
            return await self._reader.of(principal.owner, principal.limits.pending_bytes).read_value(self._chat, body)
        except InvalidRequest as error:
            first, _, rest = (error.info.param or "").partition(".")
            param = RESPONSE_FIELD_NAMES.get(first, first) + (
                f".{rest}" if rest and first not in RESPONSE_FIELD_NAMES else ""
            )
            raise InvalidRequest(info=error.info.model_copy(update={"param": param or None})) from None

    async def _store_new(
        self, principal: Principal, job: str, request: ResponsesRequest, messages: list[JSON], *, joining: bool
    ) -> CreatedResponse:
        owner = principal.owner
        new = initial_response(request, job, int(clock.now()))
        stored = None
        if request.stored:
            talk = {"messages": messages, "input": input_item_objects(request.input, str(new["id"]))}
            stored = await self._repository.add(owner, job, new, talk, principal.limits.result_bytes)
        bound_to_connection = not (request.background or joining)
        return CreatedResponse(owner, job, stored.initial if stored is not None else new, stored, bound_to_connection)

    async def _discard(self, stored: StoredResponse) -> None:
        try:
            await self._repository.remove(stored)
        except Unavailable:
            log.warning("response.discard_failed", response=stored.id)

    async def _previous_messages(self, owner: str, previous: str | None) -> list[JSON]:
        """Return the conversation up to and including the previous response. Raises NotFound, InvalidRequest."""
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
                f"Response '{previous}' is {response['status']}. Only a completed or incomplete response can be continued.",
                code="previous_response_not_completed",
                param=param,
            )
        return [*talk["messages"], *to_messages(InputItem.model_validate(item) for item in response["output"])]

    # Results

    async def answer(self, created: CreatedResponse) -> tuple[JSON, tuple[str, ...]]:
        """Wait for the final response, and return it with the adapted parameters.

        Raises the job's error, unless the job was cancelled.
        """
        result = await self._wait_for_result(created)
        final = await self._store_final(
            created, await self._build_final(created.owner, created.job, created.initial, result)
        )
        await self._jobs.confirm_delivery(result.outcome)
        error = result_error(result)
        if error is not None and final["status"] != "cancelled":
            raise NexusError.from_info(error)
        return final, result.outcome.adapted

    async def _wait_for_result(self, created: CreatedResponse) -> JobResult:
        """Wait for the job's result across short outages of NATS or Redis. Raises Unavailable after a longer one."""
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
        """Return the stream of events with numbers above `after`."""
        return ResponseEventStream(self._jobs, created, after, self._store_final, self._read_result)

    async def confirm_delivery(self, created: CreatedResponse) -> None:
        """Note that the caller has received the whole response. Never raises."""
        if created.retain_none:
            with suppress(NexusError):  # its time ends all the same
                await self._jobs.confirm_delivery((await self._jobs.result(created.owner, created.job)).outcome)

    async def abandon(self, created: CreatedResponse) -> None:
        """Cancel a response whose caller has disconnected. Best effort."""
        try:
            await self._jobs.cancel(created.owner, created.job)
        except NexusError as error:
            log.warning("response.abandon_failed", job=created.job, error=error.info.message)

    async def _build_final(self, owner: str, job: str, began_as: JSON, result: JobResult) -> JSON:
        outcome = result.outcome
        if outcome.status is not JobStatus.COMPLETED:
            return unanswered_response(began_as, outcome.status, result_error(result))
        data = await self._read_data(result)
        builder = ResponseBuilder(began_as)
        for some in _split_frames(data):
            builder.add_frames(some)
            await asyncio.sleep(0)  # let other tasks run
        builder.close_items(outcome.usage.model_dump() if outcome.usage is not None else None)
        return builder.final_response(await job_finished_at(self._jobs, owner, job))

    async def _read_data(self, result: JobResult) -> bytes:
        """Return the chat stream without its end marker. Raises BlobNotFound."""
        if result.blob is None:
            return result.data
        return b"".join([piece async for piece in self._blobs.read(result.blob.name)])

    async def _read_result(self, created: CreatedResponse) -> tuple[JobResult, bytes]:
        result = await self._jobs.result(created.owner, created.job)
        return result, await self._read_data(result)

    async def _store_final(self, created: CreatedResponse, final: JSON) -> JSON:
        """Store the final response, so that it outlives its job. Return the stored response."""
        if created.stored is None:
            return final
        try:
            return await self._repository.finish(created.stored, final)
        except Unavailable as error:  # the next read stores it
            log.warning("response.not_stored", response=created.id, error=error.info.message)
            return final

    # Stored responses

    async def retrieve(self, owner: str, response_id: str) -> JSON:
        """Return a response's current state. Raises ResponseNotFound."""
        return await self._current_state(await self._repository.get(owner, response_id))

    async def created(self, owner: str, response_id: str) -> CreatedResponse:
        """Return a response that was created before. Raises ResponseNotFound."""
        return _created_from(await self._repository.get(owner, response_id))

    async def cancel(self, owner: str, response_id: str) -> JSON:
        """Cancel a background response. An ended response stays unchanged. Raises ResponseNotFound, InvalidRequest."""
        stored = await self._repository.get(owner, response_id)
        if not stored.initial["background"]:
            raise InvalidRequest(
                "Only a response created with 'background' can be cancelled.", code="response_not_background"
            )
        if stored.final is None:
            try:
                await self._jobs.cancel(owner, stored.job)
            except JobNotFound:
                raise _no_longer_stored(stored) from None
        return await self._current_state(stored)

    async def delete(self, owner: str, response_id: str) -> None:
        """Delete a response, and cancel it if it still runs. Raises ResponseNotFound."""
        stored = await self._repository.get(owner, response_id)
        if stored.final is None:
            with suppress(JobNotFound):
                await self._jobs.cancel(owner, stored.job)
        await self._repository.remove(stored)

    async def input_items(self, owner: str, response_id: str) -> list[JSON]:
        """Return a response's own input items, oldest first. Raises ResponseNotFound."""
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
        except NotFound:  # job, result and blob have shorter retention times
            if stored.final is not None:
                return stored.final
            raise _no_longer_stored(stored) from None
        return await self._store_final(_created_from(stored), final)


def _unstored(principal: Principal, request: ResponsesRequest) -> ResponsesRequest:
    """Return the request of a team that keeps nothing. Raises InvalidRequest if it asks to be stored."""
    for name in ("store", "background"):
        if getattr(request, name):
            principal.limits.require_retention(f"Set '{name}' to false, or leave it out.", name)
    return request.model_copy(update={"store": False})


def _split_frames(data: bytes) -> Iterator[bytes]:
    """Split a chat stream into pieces of complete frames."""
    at = 0
    while at < len(data):
        end = data.find(b"\n\n", at + TRANSLATION_CHUNK_BYTES)
        end = len(data) if end < 0 else end + 2
        yield data[at:end]
        at = end


def _created_from(stored: StoredResponse) -> CreatedResponse:
    return CreatedResponse(stored.owner, stored.job, stored.initial, stored, bound_to_connection=False)


def _no_longer_stored(stored: StoredResponse) -> ResponseNotFound:
    return ResponseNotFound(f"The answer of '{stored.id}' has been deleted after its retention time.")
