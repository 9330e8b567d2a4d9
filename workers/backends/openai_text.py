"""`/v1/chat/completions` and `/v1/completions` of an OpenAI-style service.

A stream is asked for, also for a caller who does not want one: closing a stream stops the service's work, closing a plain
call may not. Where the service has none, its answer in one piece is taken, and cut into events for a caller who streams.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import orjson

from workers.backends.base import BackendError, BackendRefused, Output, Task
from workers.backends.chunks import Answer, Collector, Relay, Wanted
from workers.backends.openai_api import ERROR_LIMIT, JSON, Api, fields_of, is_about, is_json, json_of
from workers.backends.refusals import stream_error
from workers.backends.requests import choices_wanted, json_object, stream_options, usage_wanted
from workers.backends.wire import Response

ANSWER_LIMIT = 64 * 1024 * 1024
CHAT = "/v1/chat/completions"
PATHS = {CHAT: "/chat/completions", "/v1/completions": "/completions"}
STREAM = ("stream_options", "stream")
"""Fields that are ours; a service that refuses one of them is asked without it."""


async def complete(api: Api, task: Task) -> AsyncGenerator[Output]:
    """The text, streamed or in one piece, whichever way the service gives it."""
    path = PATHS.get(task.endpoint)
    if path is None:
        raise BackendRefused(f"this backend does not serve {task.endpoint}")
    body = json_object(task.body)
    answer = _answer(task, body)
    response = await _asked(api, path, fields_of(body, task.model))
    try:
        if is_json(response):
            chunk = answer.feed(_as_events(json_of(response, await response.read_all(ANSWER_LIMIT))))
            if chunk is not None:
                yield chunk
        while not answer.done:
            data = await response.read()
            chunk = answer.feed(data or b"\n\n")  # the last event may lack its empty line
            if chunk is not None:
                yield chunk
            if not data:
                break
        for output in answer.finish():
            yield output
    finally:
        if answer.done:
            response.release()
        else:
            response.close()


def _answer(task: Task, body: JSON) -> Answer:
    prompt = body.get("prompt")
    many = isinstance(prompt, list) and prompt and not isinstance(prompt[0], int)
    wanted = Wanted(
        chat=task.endpoint == CHAT,
        model=task.public_model,
        fallback_id=task.job,
        include_usage=task.stream and usage_wanted(body),
        n=choices_wanted(body),
        prompts=len(prompt) if many and isinstance(prompt, list) else 1,
    )
    return Relay(wanted) if task.stream else Collector(wanted)


async def _asked(api: Api, path: str, body: JSON) -> Response:
    """The answer, where its status is 200. What the service has refused of `STREAM` is left out the next time."""
    model = body["model"]
    fields = body | {"stream": True, "stream_options": stream_options(body) | {"include_usage": True}}
    lacked = {name for name in STREAM if (model, name) in api.lacks}
    if "stream" in lacked:
        fields |= {"stream": False}
    if lacked:
        del fields["stream_options"]
    try:
        return await _sent(api, path, fields)
    except BackendRefused as error:
        ours = (name for name in STREAM if fields.get(name) and is_about(error, name))
        refused = next(ours, None)
        if refused is None or (refused == "stream_options" and stream_options(body)):
            raise
        api.lacks.add((model, refused))
    return await _asked(api, path, body)


async def _sent(api: Api, path: str, fields: JSON) -> Response:
    """Closing a stream's request stops it; a plain one is waited for."""
    if not fields["stream"]:
        return await api.post(path, fields)
    response = await api.client.request("POST", api.path + path, orjson.dumps(fields))
    if response.status == 200:
        return response
    try:
        raise api.refuse(response.status, response.headers, await response.read_all(ERROR_LIMIT))
    finally:
        response.close()


def _as_events(answer: Any) -> bytes:
    """An answer in one piece as the events of a stream."""
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or not choices:
        if isinstance(answer, dict) and answer.get("error"):
            raise stream_error(answer)
        raise BackendError("the backend's answer has no choices")
    for choice in choices:
        if isinstance(choice, dict):
            choice["finish_reason"] = choice.get("finish_reason") or "stop"
            if "message" in choice:
                choice["delta"] = choice.pop("message")
    return b"data: %b\n\ndata: [DONE]\n\n" % orjson.dumps(answer)
