"""Counts the tokens of a chat request's prompt, by the server's own template and tokenizer.

| server | how |
|---|---|
| llama.cpp | `/apply-template` makes the prompt, `/tokenize` its tokens |
| vLLM | `/tokenize` takes the messages |
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import orjson

from schemas.jobs import Usage
from workers.adapter_kit.error_mapping import UNSUPPORTED_ENDPOINT
from workers.adapter_kit.openai.client import JSON, OpenAIClient, forwarded_fields, parse_json_response
from workers.adapter_kit.request_fields import parse_json_object
from workers.backends.base import BackendRefused, Chunk, Finish, Output, Task

ANSWER_LIMIT = 64 * 1024 * 1024
TEMPLATE_FIELDS = ("messages", "tools", "tool_choice", "chat_template_kwargs", "reasoning_effort", "response_format")
"""The fields of a chat request that a template may read."""


async def count_tokens(api: OpenAIClient, task: Task) -> AsyncGenerator[Output]:
    """Yield the count. Raises BackendRefused with the code `unsupported_endpoint` where the server cannot count."""
    fields = forwarded_fields(parse_json_object(task.body), task.model)
    prompt = {name: fields[name] for name in TEMPLATE_FIELDS if name in fields}
    if not _is_text(prompt.get("messages")):
        raise BackendRefused("only the tokens of text can be counted", code=UNSUPPORTED_ENDPOINT)
    template = await _ask(api, "/apply-template", {"model": task.model, **prompt})
    if isinstance(text := template.get("prompt"), str):
        tokenized: JSON = {"content": text, "add_special": True, "parse_special": True}
    else:
        tokenized = {**prompt, "add_generation_prompt": True}
    counted = await _ask(api, "/tokenize", {"model": task.model, **tokenized})
    number, tokens = counted.get("count"), counted.get("tokens")
    if not isinstance(number, int):
        if not isinstance(tokens, list) or "content" not in tokenized:
            raise BackendRefused("this server counts no tokens of messages", code=UNSUPPORTED_ENDPOINT)
        number = len(tokens)
    answer = {"object": "chat.completion.input_tokens", "model": task.public_model, "input_tokens": number}
    yield Chunk(orjson.dumps(answer), 0)
    yield Finish(Usage())  # the model read nothing, and limits count nothing


def _is_text(messages: Any) -> bool:
    """Return whether all that messages hold is text."""
    contents = [message.get("content") for message in messages or () if isinstance(message, dict)]
    return all(part.get("type") == "text" for content in contents if isinstance(content, list) for part in content)


async def _ask(api: OpenAIClient, path: str, body: JSON) -> JSON:
    """Return the server's answer; empty where it has no such endpoint."""
    try:
        response, data = await api.post_and_read(path, body, ANSWER_LIMIT, root="")
    except BackendRefused as error:
        if error.info.code != UNSUPPORTED_ENDPOINT:
            raise
        return {}
    answer = parse_json_response(response, data)
    return answer if isinstance(answer, dict) else {}
