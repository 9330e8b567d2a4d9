"""What the lines of a batch are: requests for an inference endpoint, or for responses, which travel as chat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import orjson

from backbone.bus.blobs import BlobStore
from gateway import clock
from gateway.batches.output_file import ResultBodyFactory, whole
from gateway.files import FileReferences
from gateway.http.inference_body import InferenceBodyReader, ReceivedRequest
from gateway.http.request_body import validate_body
from gateway.jobs.api import JobResult
from gateway.jobs.http_response import ResultBody
from gateway.responses.from_chat import ResponseBuilder
from gateway.responses.resource import initial_response
from gateway.responses.to_chat import chat_body, conversation, reject_unsupported
from schemas.endpoints import SSE, EndpointSpec
from schemas.errors import InvalidRequest
from schemas.openai.responses import ResponsesRequest

JSON = dict[str, Any]


class LineType(Protocol):
    """One of them."""

    @property
    def endpoint(self) -> EndpointSpec:
        """What the jobs are for."""

    async def read(self, owner: str, body: JSON, reader: InferenceBodyReader) -> ReceivedRequest:
        """A line's request, checked. Raises InvalidRequest, NotFound, Unavailable."""

    def context(self, body: JSON, job: str) -> Any:
        """What of the request its answer is made with. The body was read before."""

    async def answer(self, context: Any, result: JobResult, base_url: str) -> ResultBody:
        """The answer of a completed job. Raises BackendFailed where it is none, BlobNotFound, BlobCorrupted, Unavailable."""


def reject_stream(body: JSON) -> None:
    """Raises InvalidRequest."""
    if body.get("stream"):
        raise InvalidRequest("a request of a batch cannot be streamed: leave 'stream' out", param="stream")


@dataclass(frozen=True, slots=True)
class EndpointLine:
    """Requests for an inference endpoint. Where it takes a form, the body names uploaded files by id."""

    endpoint: EndpointSpec
    uploads: FileReferences
    payload: ResultBodyFactory

    async def read(self, owner: str, body: JSON, reader: InferenceBodyReader) -> ReceivedRequest:
        """See the protocol."""
        reject_stream(body)
        if self.endpoint.files:
            body, uploads = await self.uploads.resolve(owner, self.endpoint, body)
            received = await reader.read_value(self.endpoint, body, uploads)
        else:
            received = await reader.read_value(self.endpoint, body)
        if self.endpoint.stream_type(received.request) == SSE:
            await received.discard()
            raise InvalidRequest("a request of a batch cannot be answered by a stream of events", param="stream_format")
        return received

    def context(self, _body: JSON, _job: str) -> None:
        """Nothing."""

    async def answer(self, _remembered: None, result: JobResult, base_url: str) -> ResultBody:
        """As it came."""
        return self.payload(result, base_url)


@dataclass(frozen=True, slots=True)
class ResponsesLine:
    """Requests for responses. Each stands alone, and its response is in the output alone: it is not stored."""

    endpoint: EndpointSpec
    """Chat."""
    blobs: BlobStore

    async def read(self, _owner: str, body: JSON, reader: InferenceBodyReader) -> ReceivedRequest:
        """See the protocol."""
        reject_stream(body)
        request = _response_request(body)
        for name in ("background", "previous_response_id"):
            if getattr(request, name):
                raise InvalidRequest(f"a request of a batch stands alone: leave '{name}' out", param=name)
        reject_unsupported(request)
        return await reader.read_value(self.endpoint, chat_body(request, conversation(request, [])))

    def context(self, body: JSON, job: str) -> JSON:
        """The response before its answer."""
        return initial_response(_response_request(body), job, int(clock.now()))

    async def answer(self, context: JSON, result: JobResult, _base_url: str) -> ResultBody:
        """The response, from chat's frames."""
        data = result.data
        if result.blob is not None:
            data = b"".join([piece async for piece in self.blobs.read(result.blob.name)])
        usage = result.outcome.usage
        builder = ResponseBuilder(context)
        builder.add_frames(data)
        builder.close_items(usage.model_dump() if usage is not None else None)
        return whole(orjson.dumps(builder.final_response(int(clock.now()))))


def _response_request(body: JSON) -> ResponsesRequest:
    return validate_body({**body, "store": False}, ResponsesRequest)
