"""The endpoints `POST /v1/messages` and `/v1/messages/count_tokens`, whose requests become jobs of chat models."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from gateway.dialects.anthropic.from_chat import AnswerFacts
from gateway.dialects.anthropic.to_chat import chat_body, prompt_fields
from schemas.anthropic.messages import MessagesInput, MessagesRequest
from schemas.endpoints import CHAT, INPUT_TOKENS, EndpointSpec, Translation

MESSAGES_PATH = "/v1/messages"
COUNT_PATH = f"{MESSAGES_PATH}/count_tokens"


def messages_endpoint(*, refuse_server_tools: bool) -> EndpointSpec:
    """Return the endpoint. `refuse_server_tools`: refuse tools that Anthropic runs, instead of leaving them out."""
    translation = Translation(CHAT, partial(chat_body, refuse_server_tools=refuse_server_tools))
    return replace(
        CHAT,
        path=MESSAGES_PATH,
        schema=MessagesRequest,
        name="messages",
        service_words=(),
        job="MessageJob",
        translation=translation,
    )


def count_endpoint(*, refuse_server_tools: bool) -> EndpointSpec:
    """Return the endpoint that counts the tokens of a request."""
    translation = Translation(INPUT_TOKENS, partial(prompt_fields, refuse_server_tools=refuse_server_tools))
    return replace(INPUT_TOKENS, path=COUNT_PATH, schema=MessagesInput, name="count-tokens", translation=translation)


def facts_of(request: MessagesRequest) -> AnswerFacts:
    """Return what of a request decides how its answer looks."""
    thinking = request.thinking
    shows_thinking = thinking is not None and thinking.type != "disabled" and thinking.display != "omitted"
    return AnswerFacts(shows_thinking, frozenset(request.stop_sequences or ()))
