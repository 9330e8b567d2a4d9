"""Serves the requests of Anthropic's clients: `POST /v1/messages` by itself, all others by the application behind it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import replace
from typing import Any

from gateway.dialects.anthropic.answers import AnswerTranslator, MessageTranslator, TokenCountTranslator
from gateway.dialects.anthropic.endpoint import COUNT_PATH, MESSAGES_PATH, facts_of
from gateway.dialects.anthropic.from_chat import AnswerFacts
from gateway.dialects.anthropic.token_estimate import estimate_prompt
from gateway.http.asgi import EXCHANGE, Headers, Receive, Scope, Send
from gateway.sync.handler import InferenceHandler
from schemas.anthropic.messages import MessagesRequest
from schemas.endpoints import EndpointSpec, Translation

App = Callable[[Scope, Receive, Send], Awaitable[None]]
JSON = dict[str, Any]

VERSION = b"anthropic-version"
API_KEY = b"x-api-key"
AUTHORIZATION = b"authorization"
COUNT_TIMEOUT_S = 5.0
"""How long a count waits for the server, which may be busy with answers."""


class AnthropicApp:
    """Gives Anthropic's clients their own form of keys, answers, errors and headers. It sees no request to another hot route."""

    def __init__(self, app: App, inference: InferenceHandler, messages: EndpointSpec, counts: EndpointSpec) -> None:
        """`app` serves the other routes. `messages`, `counts`: the endpoints of messages and of token counts."""
        self._app = app
        self._inference = inference
        self._messages = messages
        self._counts = counts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI scope."""
        if scope["type"] != "http" or not is_anthropic(scope):
            await self._app(scope, receive, send)
            return
        scope = {**scope, "headers": with_bearer(scope["headers"])}
        scope.pop(EXCHANGE, None)  # it would write past the translation
        if scope["method"] == "POST" and scope["path"] == MESSAGES_PATH:
            await self._serve_message(scope, receive, send)
        elif scope["method"] == "POST" and scope["path"] == COUNT_PATH:
            await self._count_tokens(scope, receive, send)
        else:
            await self._app(scope, receive, AnswerTranslator(scope, send).send)

    async def _serve_message(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request for a message, as the request wants the answer to look."""
        facts = AnswerFacts()

        def note(request: MessagesRequest, _body: JSON) -> None:
            nonlocal facts
            facts = facts_of(request)

        translator = MessageTranslator(scope, send, lambda: facts)
        await self._inference.serve(_noting(self._messages, note), scope, receive, translator.send)

    async def _count_tokens(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with the server's count, or with an estimate where the server has none or is busy for too long."""
        estimate, deadline = 0, None
        clock = asyncio.get_running_loop().time

        def note(_request: Any, body: JSON) -> None:
            nonlocal estimate, deadline
            estimate, deadline = estimate_prompt(body), clock() + COUNT_TIMEOUT_S

        async def receive_in_time() -> MutableMapping[str, Any]:
            try:
                async with asyncio.timeout_at(deadline):
                    return await receive()
            except TimeoutError:
                return {"type": "http.disconnect"}  # the request ends, and its job is deleted

        translator = TokenCountTranslator(scope, send, lambda: estimate)
        await self._inference.serve(_noting(self._counts, note), scope, receive_in_time, translator.send)
        if not translator.began and deadline is not None and clock() >= deadline:
            await translator.send_estimate()


def _noting(endpoint: EndpointSpec, note: Callable[[Any, JSON], None]) -> EndpointSpec:
    """Return the endpoint for one request: `note` gets the request and the body that it becomes."""
    translation = endpoint.translation
    assert translation is not None

    def translate(request: Any) -> JSON:
        body = translation.request(request)
        note(request, body)
        return body

    return replace(endpoint, translation=Translation(translation.target, translate))


def is_anthropic(scope: Scope) -> bool:
    """Return whether a request is of a client of Anthropic's API, by its path or its header."""
    path: str = scope["path"]
    if path == MESSAGES_PATH or path.startswith(MESSAGES_PATH + "/"):
        return True
    return any(name == VERSION for name, _ in scope["headers"])


def with_bearer(headers: Headers) -> Headers:
    """Return the headers with the key of `x-api-key` as the bearer, unless there is one."""
    key = b""
    for name, value in headers:
        if name == AUTHORIZATION:
            return headers
        if name == API_KEY:
            key = value
    return [*headers, (AUTHORIZATION, b"Bearer " + key)] if key else headers
