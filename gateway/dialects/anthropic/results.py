"""Translates the stored results of jobs into messages. Pure."""

from __future__ import annotations

import orjson

from gateway.dialects.anthropic.answers import StreamTranslation, message_id
from gateway.dialects.anthropic.from_chat import AnswerFacts, MessageStream, message_of
from gateway.sse_frames import DONE
from schemas.errors import BackendFailed

UNREADABLE = "The job's result is not a chat completion. Check the worker's server."


def message_result(data: bytes, job: str, facts: AnswerFacts) -> bytes:
    """Return the message for the result of a chat job: for a chat stream with its end marker, the stream's events. Raises BackendFailed."""
    if data.endswith(DONE):
        return StreamTranslation(MessageStream(message_id(job), facts), "").feed(data)
    try:
        completion = orjson.loads(data)
    except orjson.JSONDecodeError:
        completion = None
    if not isinstance(completion, dict):
        raise BackendFailed(UNREADABLE)
    return orjson.dumps(message_of(completion, message_id(job), facts))
