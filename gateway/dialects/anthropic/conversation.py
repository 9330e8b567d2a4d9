"""Translates the turns of a conversation into chat messages. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from gateway.dialects.anthropic.content import (
    Parts,
    block_parts,
    is_of_server_tool,
    plain_content,
    require_text,
    system_text,
    to_parts,
)
from schemas.anthropic.messages import InputMessage
from schemas.errors import InvalidRequest

JSON = dict[str, Any]

ATTACHMENT_NOTE = "Content of the result of the call "
"""The beginning of what a tool returned beside text, in a user message: a tool message can hold only text."""


def to_messages(messages: Sequence[InputMessage], system: str = "") -> list[JSON]:
    """Translate turns into chat messages, after a system prompt. Neighbors of one role become one message. Raises InvalidRequest.

    A system message behind the start becomes part of the user's: many chat templates take one only at the start.
    """
    turn_starts = _last_question(messages)
    out: list[JSON] = [{"role": "system", "content": system}] if system else []
    for number, message in enumerate(messages):
        param = f"messages.{number}.content"
        if message.role == "system":
            text = system_text(message.content, param)
            _merge_user(out, [{"type": "text", "text": f"<system>\n{text}\n</system>"}])
        elif message.role == "user":
            _add_user(out, message.content, param)
        else:
            _add_assistant(out, message.content, param, with_thinking=number > turn_starts)
    return out


def _last_question(messages: Sequence[InputMessage]) -> int:
    """Return the index of the last question: only what was thought since then is part of the present work."""
    for number in range(len(messages) - 1, -1, -1):
        message = messages[number]
        if message.role == "user" and not _holds_results(message.content):
            return number
    return -1


def _holds_results(content: str | Parts) -> bool:
    return isinstance(content, list) and any(block.get("type") == "tool_result" for block in content)


def _add_user(out: list[JSON], content: str | Parts, param: str) -> None:
    """Add a user's turn: the results of tools as messages of their own, then everything else."""
    if isinstance(content, str):
        _merge_user(out, to_parts(content, param))
        return
    attachments: Parts = []
    parts: Parts = []
    for number, block in enumerate(content):
        place = f"{param}.{number}"
        if block.get("type") == "tool_result":
            attachments += _add_result(out, block, place)
        else:
            parts += block_parts(block, place)
    if attachments or parts or not _holds_results(content):
        _merge_user(out, [*attachments, *parts])


def _add_result(out: list[JSON], block: JSON, param: str) -> Parts:
    """Add a tool's result, and return the parts that follow in a user message: images and documents."""
    call = require_text(block, "tool_use_id", param)
    content = block.get("content")
    parts = to_parts(content if isinstance(content, str | list) else [], f"{param}.content")
    texts = [part["text"] for part in parts if part["type"] == "text"]
    others = [part for part in parts if part["type"] != "text"]
    text = "\n\n".join(texts) or ("(see the attached content)" if others else "")
    if block.get("is_error") is True:
        text = f"Error: {text}" if text else "Error"
    out.append({"role": "tool", "tool_call_id": call, "content": text})
    return [{"type": "text", "text": f"{ATTACHMENT_NOTE}{call}:"}, *others] if others else []


def _merge_user(out: list[JSON], parts: Parts) -> None:
    """Add what the user says to the user's message before, if there is one: many chat templates want roles to alternate."""
    if out and out[-1]["role"] == "user":
        before = out[-1]["content"]
        parts = [*to_parts(before, ""), *parts] if isinstance(before, str) else [*before, *parts]
        out[-1]["content"] = plain_content(parts)
    else:
        out.append({"role": "user", "content": plain_content(parts)})


def _add_assistant(out: list[JSON], content: str | Parts, param: str, *, with_thinking: bool) -> None:
    """Add a turn of the model: its text, its calls, and with `with_thinking` its thoughts."""
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[JSON] = []
    for number, block in enumerate([{"type": "text", "text": content}] if isinstance(content, str) else content):
        place, kind = f"{param}.{number}", block.get("type")
        if kind == "text":
            texts.append(require_text(block, "text", place))
        elif kind == "thinking":
            thoughts.append(require_text(block, "thinking", place))
        elif kind == "tool_use":
            calls.append(_call(block, place))
        elif not is_of_server_tool(kind):
            raise InvalidRequest(
                f"An assistant's message holds text, thinking and tool_use blocks, not '{str(kind)[:100]}': '{place}.type'",
                param=f"{place}.type",
            )
    message: JSON = {"role": "assistant", "content": "".join(texts) or (None if calls else "")}
    if calls:
        message["tool_calls"] = calls
    if with_thinking and any(thoughts):
        message["reasoning_content"] = "".join(thoughts)
    _merge_assistant(out, message)


def _merge_assistant(out: list[JSON], message: JSON) -> None:
    if not out or out[-1]["role"] != "assistant":
        out.append(message)
        return
    before = out[-1]
    before["content"] = (before["content"] or "") + (message["content"] or "") or before["content"]
    for name in ("tool_calls", "reasoning_content"):
        if name in message:
            before[name] = before[name] + message[name] if name in before else message[name]


def _call(block: JSON, param: str) -> JSON:
    given = block.get("input")
    if not isinstance(given, dict):
        raise InvalidRequest(f"Input should be a valid dictionary: '{param}.input'", param=f"{param}.input")
    name = require_text(block, "name", param)
    function = {"name": name, "arguments": orjson.dumps(given).decode()}
    return {"id": require_text(block, "id", param), "type": "function", "function": function}
