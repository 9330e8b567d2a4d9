"""`/v1/chat/completions` and `/v1/completions` of an OpenAI-style server.

The worker always requests a stream, even for a caller who does not want one: closing a stream stops the server's work, closing
a plain request may not. A server that refuses a stream is asked for an answer in one piece, which becomes events for a caller who
streams. Only a probe of the worker's own proves that a model lacks a feature; without that proof, the fields that Nexus added are
left out for this one request, and those that the caller sent are not.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from functools import partial

import orjson

from schemas.frames import LOADING_PHASE, Progress
from workers.adapter_kit.http_client import BackendResponse, ends_with_connection
from workers.adapter_kit.limitations import Probe
from workers.adapter_kit.openai.client import (
    ERROR_LIMIT,
    JSON,
    OpenAIClient,
    forwarded_fields,
    is_json_response,
    mentions,
)
from workers.adapter_kit.openai.feature_probes import (
    STREAM,
    STREAM_OPTIONS,
    STREAM_USAGE,
    TOOL_STREAM,
    lacks_stream_usage,
    lacks_text_feature,
)
from workers.adapter_kit.openai.unsupported_parameters import execute_and_replan, plan_after_refusal, plan_text
from workers.adapter_kit.request_fields import (
    parse_json_object,
    prompt_count,
    requested_choices,
    stream_options,
    wants_continuous_usage,
    wants_usage,
)
from workers.adapter_kit.sse import BYTE_ORDER_MARK, FIELDS
from workers.adapter_kit.text.adaptations import ADAPTABLE_PARAMETERS, PARALLEL_TOOL_CALLS, AdaptationPlan
from workers.adapter_kit.text.completion_stream import CompletionOptions, CompletionReader, new_completion_reader
from workers.backends.base import BackendError, BackendRefused, BackendUnavailable, Chunk, Finish, Output, Task

ANSWER_LIMIT = 64 * 1024 * 1024
BLANK_BYTES = b" \t\r\n" + BYTE_ORDER_MARK
CHAT = "/v1/chat/completions"
PATHS = {CHAT: "/chat/completions", "/v1/completions": "/completions"}
NEXUS_STREAM_OPTIONS = {"include_usage": True}
FEATURES = (STREAM_OPTIONS, STREAM, TOOL_STREAM)
TOOL_FIELDS = ("tools", "functions")
STREAM_FEATURES = (STREAM, f"{STREAM} of completions")
"""The features that a model lacks which streams no text at all."""


async def generate_text(api: OpenAIClient, task: Task, planned: AdaptationPlan | None = None) -> AsyncGenerator[Output]:
    """Yield the text, streamed or in one piece as the caller wants it. `planned`: the plan that this request belongs to."""
    path = PATHS.get(task.endpoint)
    if path is None:
        raise BackendRefused(f"this backend does not serve {task.endpoint}")
    body = parse_json_object(task.body)
    answer = new_completion_reader(completion_options(task, body), task.push)
    fields = forwarded_fields(body, task.model)
    watched = planned is None and not ADAPTABLE_PARAMETERS.isdisjoint(body)
    plan = await plan_text(api, path, task, body) if watched else None
    if planned is not None:
        for name in planned.unsent_parameters:
            fields.pop(name, None)
    loads = api.resident is not None and task.model not in api.resident
    if loads:
        yield Progress(phase=LOADING_PHASE)
    if plan is None:
        try:
            response = await request_completion(api, path, fields, streams=task.stream)
        except BackendRefused as error:
            plan = await plan_after_refusal(api, path, task, error) if watched else None
            if plan is None:
                raise
    if plan is not None:
        async with aclosing(execute_and_replan(api, path, task, plan, partial(generate_text, api))) as outputs:
            async for output in outputs:
                yield output
        return
    try:
        if loads:
            yield Progress()
        chunk = await feed_start(response, answer, api.redact)
        if chunk is not None:
            yield chunk
        if response.decoder is None:
            response.sink = answer.take
        while not answer.done:
            data = await read_next(response, answer)
            chunk = answer.feed(data) if data else answer.feed_end()
            if chunk is not None:
                yield chunk
            if not data:
                break
        for output in answer.finish():
            probe_missing_usage(api, path, task, output)
            yield output
    finally:
        if answer.done:
            response.release()
        else:
            response.close()


def completion_options(task: Task, body: JSON) -> CompletionOptions:
    """Return the options that shape the answer to a request for text."""
    return CompletionOptions(
        chat=task.endpoint == CHAT,
        model=task.public_model,
        fallback_id=task.job,
        include_usage=task.stream and wants_usage(body),
        continuous_usage=task.stream and wants_continuous_usage(body),
        n=requested_choices(body),
        prompts=prompt_count(body),
        single_call=body.get(PARALLEL_TOOL_CALLS) is False,
        legacy_functions=bool(body.get("functions")) and not body.get("tools"),
        stream=task.stream,
    )


async def feed_start(
    response: BackendResponse, answer: CompletionReader, clean: Callable[[bytes], bytes] | None = None
) -> Chunk | None:
    """Feed `answer` with the beginning of a response, or with all of it where it is not a stream, whatever its content type.

    `clean` changes an answer in one piece. Raises BackendError, also for a web page, which a wrong URL returns.
    """
    data = await response.read()
    if data.startswith(b"data:") and not is_json_response(response):
        return answer.feed(data)
    while data and not (start := data.lstrip(BLANK_BYTES)):
        more = await response.read()
        if not more:
            break
        data += more
    start = data.lstrip(BLANK_BYTES)
    if start.startswith(b"<"):
        raise BackendError(
            f"the backend answered with a web page in place of text; check the worker's URL ({response.headers.get('content-type', 'no content type')})"
        )
    if not data or not (
        start.startswith((b"{", b"[")) or (is_json_response(response) and not start.startswith(FIELDS))
    ):
        return answer.feed(data) if data else answer.feed_end()
    data += await response.read_all(ANSWER_LIMIT)
    return answer.feed_whole(
        clean(data) if clean is not None else data, cut_short=ends_with_connection(response.headers)
    )


async def read_next(response: BackendResponse, answer: CompletionReader) -> bytes:
    """Return the next bytes, b"" at the end. A connection that breaks after a complete answer ends it."""
    try:
        return await response.read()
    except BackendError:
        if not answer.is_complete:
            raise
        return b""


async def request_completion(api: OpenAIClient, path: str, fields: JSON, *, streams: bool) -> BackendResponse:
    """Return the response, whose status is 200: a stream, or JSON where the server does not stream. Changes `fields`.

    `streams`: the caller wants a stream. Raises BackendError with the server's own message for any other status.
    """
    if not streams and path != PATHS[CHAT]:
        # Callers of the older endpoint rely on usage, and some servers count tokens only in answers in one piece.
        await api.limitations.confirm(
            fields["model"], STREAM_USAGE + _suffix(path), _usage_probe(api, path, fields["model"])
        )
    caller_options = stream_options(fields)
    fields["stream"] = True
    fields["stream_options"] = caller_options | NEXUS_STREAM_OPTIONS
    _omit_lacking(api, path, fields)
    if not streams and api.limitations.lacks(fields["model"], STREAM_USAGE + _suffix(path)):
        _omit(fields, STREAM)
    added_by_nexus = {STREAM_OPTIONS: not caller_options, STREAM: not streams, TOOL_STREAM: not streams}
    while True:
        if not fields["stream"]:
            return await api.post(path, fields)
        response = await api.http.request("POST", api.base_path + path, orjson.dumps(fields))
        if response.status == 200:
            return response
        error = await _read_error(api, response)
        suspects = list(_suspects(fields, error))
        feature = await _confirm_first(api, path, fields["model"], suspects) or next(
            filter(added_by_nexus.get, suspects), None
        )
        if feature is None:
            raise error
        _omit(fields, feature)


def probe_missing_usage(api: OpenAIClient, path: str, task: Task, output: Output) -> None:
    """Start a probe of whether the model counts tokens only in answers in one piece, after a stream without usage."""
    if not task.stream and isinstance(output, Finish) and output.usage is None:
        api.limitations.suspect(task.model, STREAM_USAGE + _suffix(path), _usage_probe(api, path, task.model))


def _usage_probe(api: OpenAIClient, path: str, model: str) -> Probe:
    return partial(lacks_stream_usage, api, path, model)


def _omit_lacking(api: OpenAIClient, path: str, fields: JSON) -> None:
    limitations, model = api.limitations, fields["model"]
    if limitations.is_empty:
        return
    if limitations.lacks(model, STREAM_OPTIONS + _suffix(path)):
        _omit(fields, STREAM_OPTIONS)
    if limitations.lacks(model, STREAM + _suffix(path)) or (
        limitations.lacks(model, TOOL_STREAM) and any(map(fields.get, TOOL_FIELDS))
    ):
        _omit(fields, STREAM)


def _omit(fields: JSON, feature: str) -> None:
    fields.pop("stream_options", None)
    if feature != STREAM_OPTIONS:
        fields["stream"] = False


def _suffix(path: str) -> str:
    """Return the suffix that distinguishes the features of `/v1/completions` from those of chat."""
    return "" if path == PATHS[CHAT] else " of completions"


def _suspects(fields: JSON, error: BackendError) -> Iterator[str]:
    """Yield the features that an error may be about: their fields were sent, and the error names them."""
    if isinstance(error, BackendUnavailable) or not mentions(error, "stream"):
        return
    if "stream_options" in fields and mentions(error, "stream_options"):
        yield STREAM_OPTIONS
        return
    yield STREAM
    if any(map(fields.get, TOOL_FIELDS)):
        yield TOOL_STREAM


async def _confirm_first(api: OpenAIClient, path: str, model: str, suspects: list[str]) -> str | None:
    for feature in suspects:
        name = feature if feature == TOOL_STREAM else feature + _suffix(path)
        if await api.limitations.confirm(model, name, partial(lacks_text_feature, api, path, model, feature)):
            return feature
    return None


async def _read_error(api: OpenAIClient, response: BackendResponse) -> BackendError:
    try:
        return api.make_error(response.status, response.headers, await response.read_all(ERROR_LIMIT))
    finally:
        response.close()
