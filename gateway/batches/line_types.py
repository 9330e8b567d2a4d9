"""The types of batch lines: requests to inference endpoints, and messages and responses, which run as chat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import orjson

from backbone.bus.blobs import BlobStore
from gateway import clock
from gateway.batches.output_file import ResultBodyFactory, json_body
from gateway.dialects.anthropic.endpoint import facts_of
from gateway.dialects.anthropic.from_chat import AnswerFacts
from gateway.dialects.anthropic.results import message_result
from gateway.files import FileReferences
from gateway.http.inference_body import InferenceBodyReader, ReceivedRequest
from gateway.http.request_body import validate_body
from gateway.jobs.api import JobResult
from gateway.jobs.http_response import ResultBody
from gateway.responses.from_chat import ResponseBuilder
from gateway.responses.resource import initial_response
from gateway.responses.to_chat import chat_body, conversation, reject_unsupported
from schemas.anthropic.messages import MessagesRequest
from schemas.endpoints import SSE, EndpointSpec
from schemas.errors import InvalidRequest
from schemas.openai.responses import ResponsesRequest

JSON = dict[str, Any]


class LineType(Protocol):
    """Reads the requests and builds the responses of one endpoint's lines."""

    @property
    def endpoint(self) -> EndpointSpec:
        """Return the endpoint of the lines' jobs."""

    async def read(self, owner: str, body: JSON, reader: InferenceBodyReader) -> ReceivedRequest:
        """Validate a line's request. Raises InvalidRequest, NotFound, Unavailable."""

    def context(self, body: JSON, job: str) -> Any:
        """Return the parts of a validated request that its response needs."""

    async def answer(self, context: Any, result: JobResult, base_url: str) -> ResultBody:
        """Build the response of a completed job. Raises BackendFailed, BlobNotFound, BlobCorrupted, Unavailable."""


def reject_stream(body: JSON) -> None:
    """Check that a request is not streamed. Raises InvalidRequest."""
    if body.get("stream"):
        raise InvalidRequest("Batch requests cannot be streamed. Remove 'stream'.", param="stream")


@dataclass(frozen=True, slots=True)
class EndpointLineType:
    """Lines for an inference endpoint. The body refers to files by their ids."""

    endpoint: EndpointSpec
    uploads: FileReferences
    payload: ResultBodyFactory

    async def read(self, owner: str, body: JSON, reader: InferenceBodyReader) -> ReceivedRequest:
        """See `LineType`."""
        reject_stream(body)
        if self.endpoint.files:
            body, uploads = await self.uploads.resolve(owner, self.endpoint, body)
            received = await reader.read_value(self.endpoint, body, uploads)
        else:
            received = await reader.read_value(self.endpoint, body)
        if self.endpoint.stream_type(received.request) == SSE:
            await received.discard()
            raise InvalidRequest(
                "Batch requests cannot return a stream of events. Remove 'stream_format' or set it to 'audio'.",
                param="stream_format",
            )
        return received

    def context(self, _body: JSON, _job: str) -> None:
        """Return None: the response needs nothing of the request."""

    async def answer(self, _remembered: None, result: JobResult, base_url: str) -> ResultBody:
        """Return the job's body unchanged."""
        return self.payload(result, base_url)


@dataclass(frozen=True, slots=True)
class MessagesLineType:
    """Lines for `/v1/messages`. They run as chat jobs, and their messages are written to the output file only."""

    endpoint: EndpointSpec
    payload: ResultBodyFactory

    async def read(self, _owner: str, body: JSON, reader: InferenceBodyReader) -> ReceivedRequest:
        """See `LineType`."""
        reject_stream(body)
        return await reader.read_value(self.endpoint, body)

    def context(self, body: JSON, _job: str) -> AnswerFacts:
        """Return how the message looks."""
        return facts_of(validate_body(body, MessagesRequest))

    async def answer(self, context: AnswerFacts, result: JobResult, base_url: str) -> ResultBody:
        """Build the message from the chat completion."""
        data = b"".join([piece async for piece in self.payload(result, base_url).pieces()])
        return json_body(message_result(data, result.outcome.job, context))


@dataclass(frozen=True, slots=True)
class ResponsesLineType:
    """Lines for `/v1/responses`. They run as chat jobs, and their responses are written to the output file only."""

    endpoint: EndpointSpec
    """The chat endpoint."""
    blobs: BlobStore

    async def read(self, _owner: str, body: JSON, reader: InferenceBodyReader) -> ReceivedRequest:
        """See `LineType`."""
        reject_stream(body)
        request = _response_request(body)
        for name in ("background", "previous_response_id"):
            if getattr(request, name):
                raise InvalidRequest(f"Batch requests do not support '{name}'. Remove it.", param=name)
        reject_unsupported(request)
        return await reader.read_value(self.endpoint, chat_body(request, conversation(request, [])))

    def context(self, body: JSON, job: str) -> JSON:
        """Return the response object before its output."""
        return initial_response(_response_request(body), job, int(clock.now()))

    async def answer(self, context: JSON, result: JobResult, _base_url: str) -> ResultBody:
        """Build the response from the chat stream."""
        data = result.data
        if result.blob is not None:
            data = b"".join([piece async for piece in self.blobs.read(result.blob.name)])
        usage = result.outcome.usage
        builder = ResponseBuilder(context)
        builder.add_frames(data)
        builder.close_items(usage.model_dump() if usage is not None else None)
        return json_body(orjson.dumps(builder.final_response(int(clock.now()))))


def _response_request(body: JSON) -> ResponsesRequest:
    return validate_body({**body, "store": False}, ResponsesRequest)
