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
from gateway.responses.resource import STATUSES, initial_response, unanswered_response
from gateway.responses.to_chat import chat_body, conversation, refuse_unsupported, without_other_tools
from schemas.endpoints import EndpointSpec
from schemas.errors import InvalidRequest, NexusError, NotFound, Unavailable
from schemas.jobs import TERMINAL_STATUSES, JobStatus
from schemas.openai.responses import InputItem, ResponsesRequest

log = structlog.get_logger(__name__)

JSON = dict[str, Any]

PATH = "/v1/responses"
LOOK_S = 300.0
"""How long one look at a job waits; then comes the next."""
PORTION = 64 * 1024
"""Bytes of a chat stream that are translated at a time."""
PATIENCE_S = 30.0
"""A caller waits this much longer for what is away."""
CHAT_PLACES = {"messages": "input", "max_tokens": "max_output_tokens"}
"""What the caller calls what chat calls so."""


class ResponseService:
    """See the module's docstring. Every call raises Unavailable where what it needs is away."""

    def __init__(
        self,
        jobs: JobsApi,
        caller_tasks: CallerTasks,
        shelf: ResponseRepository,
        blobs: BlobStore,
        reader: InferenceBodyReader,
        idempotency: Idempotency,
        chat: EndpointSpec,
        metrics: GatewayMetrics,
        *,
        pause_s: float,
        refuse_other_tools: bool = False,
    ) -> None:
        """`reader`: its blobs last as long as a job may. `chat`: what responses become. `pause_s`: seconds of silence after
        which a stream says that it is still there.
        """
        self.metrics = metrics
        self.pause_s = pause_s
        self.open = caller_tasks
        self._jobs = jobs
        self._shelf = shelf
        self._blobs = blobs
        self._reader = reader
        self._idempotency = idempotency
        self._chat = chat
        self._refuse_other_tools = refuse_other_tools
        self._references = ItemReferences(shelf, self._state)

    # Making one

    async def create(
        self, principal: Principal, request: ResponsesRequest, request_id: str, key: str = ""
    ) -> CreatedResponse:
        """Submit its job. With a `key` of idempotency that was used before, join what it made.

        Raises InvalidRequest, NotFound, QueueFull, RateLimited, RequestTooLarge, IdempotencyMismatch.
        """
        refuse_unsupported(request)
        if not self._refuse_other_tools:
            request = without_other_tools(request)
        owner = principal.owner
        request = await self._references.resolve(owner, request)
        messages = conversation(request, await self._earlier(owner, request.previous_response_id))
        received = await self._received(chat_body(request, messages))
        try:
            job = new_job_id()
            if key:
                job = await self._idempotency.job_id(owner, key, PATH, ReceivedRequest(request, b""))
            made = await self._keep(owner, job, request, messages, joining=bool(key))
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
                if made.kept is not None and not key:
                    await self._forget(made.kept)
                raise
        finally:
            await received.discard()  # nothing, once it is the job's
        return made

    async def _received(self, body: JSON) -> ReceivedRequest:
        try:
            return await self._reader.read_value(self._chat, body)
        except InvalidRequest as error:
            first, _, rest = (error.info.param or "").partition(".")
            param = CHAT_PLACES.get(first, first) + (f".{rest}" if rest and first not in CHAT_PLACES else "")
            raise InvalidRequest(info=error.info.model_copy(update={"param": param or None})) from None

    async def _keep(
        self, owner: str, job: str, request: ResponsesRequest, messages: list[JSON], *, joining: bool
    ) -> CreatedResponse:
        new = initial_response(request, job, int(clock.now()))
        kept = None
        if request.stored:
            talk = {"messages": messages, "input": input_item_objects(request.input, str(new["id"]))}
            kept = await self._shelf.add(owner, job, new, talk)
        callers = not (request.background or joining)
        return CreatedResponse(owner, job, kept.shell if kept is not None else new, kept, callers)

    async def _forget(self, kept: StoredResponse) -> None:
        try:
            await self._shelf.remove(kept)
        except Unavailable:
            log.warning("a response without a job is kept until its time ends", response=kept.id)

    async def _earlier(self, owner: str, previous: str | None) -> list[JSON]:
        """The conversation up to and with the response before this one. Raises NotFound, InvalidRequest."""
        if previous is None:
            return []
        param = "previous_response_id"
        unknown = NotFound(
            f"Previous response with id '{previous[:100]}' not found.", code="previous_response_not_found", param=param
        )
        try:
            kept = await self._shelf.get(owner, previous)
            response = await self._state(kept)
            talk = await self._shelf.talk(kept)
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

    async def answer(self, made: CreatedResponse) -> tuple[JSON, tuple[str, ...]]:
        """The final response, once its job has ended, and the parameters that were adapted.

        Raises what the job ended with, unless it was cancelled.
        """
        result = await self._ended(made)
        final = await self._finished(made, await self._final(made.owner, made.job, made.shell, result))
        error = result_error(result)
        if error is not None and final["status"] != "cancelled":
            raise NexusError.from_info(error)
        return final, result.word.adapted

    async def _ended(self, made: CreatedResponse) -> JobResult:
        """What was accepted goes on while Redis or NATS is away for a while; so does waiting for it."""
        loop = asyncio.get_running_loop()
        lost_at = None
        while True:
            try:
                result = await self._jobs.wait_for_result(made.owner, made.job, LOOK_S)
                if result is not None:
                    return result
                lost_at = None
            except Unavailable:
                lost_at = lost_at or loop.time()
                if loop.time() - lost_at > PATIENCE_S:
                    raise
                await asyncio.sleep(1)

    def watch(self, made: CreatedResponse, after: int = -1) -> ResponseEventStream:
        """Its events with numbers above `after`."""
        return ResponseEventStream(self._jobs, made, after, self._finished, self._look_up)

    async def abandon(self, made: CreatedResponse) -> None:
        """Its caller has hung up. Best effort."""
        try:
            await self._jobs.cancel(made.owner, made.job)
        except NexusError as error:
            log.warning("an abandoned response goes on", job=made.job, error=error.info.message)

    async def _final(self, owner: str, job: str, began_as: JSON, result: JobResult) -> JSON:
        word = result.word
        if word.status is not JobStatus.COMPLETED:
            return unanswered_response(began_as, word.status, result_error(result))
        data = await self._data(result)
        answering = ResponseBuilder(began_as)
        for some in _portions(data):
            answering.frames(some)
            await asyncio.sleep(0)  # others get their turn
        answering.closed(word.usage.model_dump() if word.usage is not None else None)
        return answering.response(await job_finished_at(self._jobs, owner, job))

    async def _data(self, result: JobResult) -> bytes:
        """The chat stream, without its end mark. Raises BlobNotFound."""
        if result.blob is None:
            return result.data
        return b"".join([piece async for piece in self._blobs.read(result.blob.name)])

    async def _look_up(self, made: CreatedResponse) -> tuple[JobResult, bytes]:
        result = await self._jobs.result(made.owner, made.job)
        return result, await self._data(result)

    async def _finished(self, made: CreatedResponse, final: JSON) -> JSON:
        """Keep the final response beyond its job's life. Returns what everybody will see."""
        if made.kept is None:
            return final
        try:
            return await self._shelf.finish(made.kept, final)
        except Unavailable as error:  # the next one who asks for it keeps it
            log.warning("a response is not kept yet", response=made.id, error=error.info.message)
            return final

    # What is kept

    async def retrieve(self, owner: str, which: str) -> JSON:
        """As it stands. Raises ResponseNotFound."""
        return await self._state(await self._shelf.get(owner, which))

    async def made(self, owner: str, which: str) -> CreatedResponse:
        """One that was made before. Raises ResponseNotFound."""
        return _made(await self._shelf.get(owner, which))

    async def cancel(self, owner: str, which: str) -> JSON:
        """End a background response; one that has ended stays as it is. Raises ResponseNotFound, InvalidRequest."""
        kept = await self._shelf.get(owner, which)
        if not kept.shell["background"]:
            raise InvalidRequest("Cannot cancel a synchronous response.", code="response_not_background")
        if kept.final is None:
            try:
                await self._jobs.cancel(owner, kept.job)
            except JobNotFound:
                raise _lost(kept) from None
        return await self._state(kept)

    async def delete(self, owner: str, which: str) -> None:
        """Forget it; if it still runs, it ends. Raises ResponseNotFound."""
        kept = await self._shelf.get(owner, which)
        if kept.final is None:
            with suppress(JobNotFound):
                await self._jobs.cancel(owner, kept.job)
        await self._shelf.remove(kept)

    async def input_items(self, owner: str, which: str) -> list[JSON]:
        """Its own input, oldest first. Raises ResponseNotFound."""
        kept = await self._shelf.get(owner, which)
        try:
            items: list[JSON] = (await self._shelf.talk(kept))["input"]
        except BlobNotFound:
            raise _lost(kept) from None
        return items

    async def _state(self, kept: StoredResponse) -> JSON:
        if kept.final is not None and kept.final["status"] != "failed":
            return kept.final
        try:
            record = await self._jobs.get(kept.owner, kept.job)
            if record.status not in TERMINAL_STATUSES:
                return kept.shell | {"status": STATUSES[record.status]}
            result = await self._jobs.result(kept.owner, kept.job)
            final = await self._final(kept.owner, kept.job, kept.shell, result)
        except NotFound:  # job, result or blob: all are kept for a shorter time
            if kept.final is not None:
                return kept.final
            raise _lost(kept) from None
        return await self._finished(_made(kept), final)


def _portions(data: bytes) -> Iterator[bytes]:
    """Frames, some at a time."""
    at = 0
    while at < len(data):
        end = data.find(b"\n\n", at + PORTION)
        end = len(data) if end < 0 else end + 2
        yield data[at:end]
        at = end


def _made(kept: StoredResponse) -> CreatedResponse:
    return CreatedResponse(kept.owner, kept.job, kept.shell, kept, callers=False)


def _lost(kept: StoredResponse) -> ResponseNotFound:
    return ResponseNotFound(f"The answer of '{kept.id}' is not kept any more.")
