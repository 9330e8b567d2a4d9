"""Reading one choice of an answer, in every form that servers give it. Pure.

Servers send `message` in a stream and `delta` in a whole answer, chat in `text` and completions in `delta`, content as a list of
parts, one tool call instead of a list, and calls in OpenAI's older form, `function_call`.
"""

from __future__ import annotations

from typing import Any

import orjson

JSON = dict[str, Any]

REASONING_TYPES = frozenset({"thinking", "reasoning", "reasoning_text", "summary_text"})
"""Types of content parts that hold the model's reasoning: Mistral's and Databricks's."""
TEXT_FIELDS = ("text", "content", "output_text")
REASONING_FIELDS = ("thinking", "reasoning", "summary", "text", "content")


def take_delta(choice: JSON) -> JSON:
    """Set the delta of a chat choice, without its role, and return it."""
    delta = choice.get("delta")
    if not isinstance(delta, dict):
        message = choice.pop("message", None)
        delta = choice["delta"] = message if isinstance(message, dict) else {}
        if "content" not in delta and isinstance(choice.get("text"), str):
            delta["content"] = choice.pop("text")
    elif "message" in choice:
        del choice["message"]
    delta.pop("role", None)
    content = delta.get("content")
    if content is not None and not isinstance(content, str):
        _split_content(delta, content)
    return delta


def take_text(choice: JSON) -> str:
    """Set the text of a completion's choice, and return it."""
    text = choice.get("text")
    if not isinstance(text, str):
        source = choice.get("delta") if isinstance(choice.get("delta"), dict) else choice.get("message")
        content = source.get("content") if isinstance(source, dict) else text
        text = choice["text"] = content if isinstance(content, str) else _join_parts(content)[0]
    choice.pop("delta", None)
    choice.pop("message", None)
    return text


def take_tool_calls(delta: JSON, *, legacy: bool) -> Any:
    """Remove the tool calls from a delta and return them. `legacy`: the caller reads `function_call`, which stays in the delta."""
    calls = delta.pop("tool_calls", None)
    if isinstance(calls, dict):
        calls = [calls] if calls else None
    function = delta.get("function_call")
    if "function_call" in delta and (not isinstance(function, dict) or not legacy):
        del delta["function_call"]
        if isinstance(function, dict) and not calls:
            # The older form has one call without an id: its pieces belong together.
            calls = [{"index": 0, "type": "function", "function": function}]
    return calls


def repair_function_call(delta: JSON, name: str) -> str:
    """Repair a `function_call` in place: its name comes once, its arguments are a string. Return the name read so far."""
    function = delta["function_call"]
    if name and function.get("name") in (name, "", None):
        function.pop("name", None)
    arguments = function.get("arguments")
    if arguments is not None and not isinstance(arguments, str):
        function["arguments"] = orjson.dumps(arguments).decode()
    elif arguments is None:
        function["arguments"] = ""
    return name + str(function.get("name") or "")


def _split_content(delta: JSON, content: Any) -> None:
    text, reasoning = _join_parts(content)
    delta["content"] = text if text or not reasoning else None
    if reasoning:
        delta.setdefault("reasoning_content", reasoning)


def _join_parts(content: Any) -> tuple[str, str]:
    """Return the text of a content's parts, and the reasoning that they hold."""
    if content is None:
        return "", ""
    if isinstance(content, str | int | float):
        return str(content), ""
    texts: list[str] = []
    reasonings: list[str] = []
    for part in content if isinstance(content, list) else [content]:
        if not isinstance(part, dict):
            texts.append(str(part or ""))
        elif part.get("type") in REASONING_TYPES:
            reasonings.append(_part_text(part, REASONING_FIELDS))
        else:
            texts.append(_part_text(part, TEXT_FIELDS))
    return "".join(texts), "".join(reasonings)


def _part_text(part: JSON, names: tuple[str, ...]) -> str:
    """Return the text of a part, which may be a list of parts itself."""
    for name in names:
        value = part.get(name)
        if isinstance(value, str):
            return value
        if isinstance(value, list):
            return "".join(_part_text(one, names) if isinstance(one, dict) else str(one) for one in value)
    return ""
