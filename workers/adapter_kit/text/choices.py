"""One choice of an answer, whatever a server calls its parts: pure.

Servers send `message` in a stream and `delta` in a whole answer, chat in `text` and completions in `delta`, content as a list of
parts, one tool call instead of a list, and calls in OpenAI's older form, `function_call`.
"""

from __future__ import annotations

from typing import Any

import orjson

JSON = dict[str, Any]

THOUGHTS = frozenset({"thinking", "reasoning", "reasoning_text", "summary_text"})
"""Types of parts that hold what a model thinks: Mistral's and Databricks's."""
TEXT_FIELDS = ("text", "content", "output_text")
THOUGHT_FIELDS = ("thinking", "reasoning", "summary", "text", "content")


def take_delta(choice: JSON) -> JSON:
    """Return the delta of a chat choice, which is put into the choice, without its role."""
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
        _split_parts(delta, content)
    return delta


def take_text(choice: JSON) -> str:
    """Return the text of a completion's choice, which is put into the choice."""
    text = choice.get("text")
    if not isinstance(text, str):
        source = choice.get("delta") if isinstance(choice.get("delta"), dict) else choice.get("message")
        content = source.get("content") if isinstance(source, dict) else text
        text = choice["text"] = content if isinstance(content, str) else _joined(content)[0]
    choice.pop("delta", None)
    choice.pop("message", None)
    return text


def take_tool_calls(delta: JSON, *, legacy: bool) -> Any:
    """Take the tool calls out of a delta. `legacy`: the caller asked for a `function_call`, which stays where it is."""
    calls = delta.pop("tool_calls", None)
    if isinstance(calls, dict):
        calls = [calls] if calls else None
    function = delta.get("function_call")
    if "function_call" in delta and (not isinstance(function, dict) or not legacy):
        del delta["function_call"]
        if isinstance(function, dict) and not calls:
            # The older form has one call, and no id: its pieces belong together.
            calls = [{"index": 0, "type": "function", "function": function}]
    return calls


def repair_function_call(delta: JSON, name: str) -> str:
    """Repair a `function_call` in place: its name comes once, its arguments are a string. Returns the name as it is known now."""
    function = delta["function_call"]
    if name and function.get("name") in (name, "", None):
        function.pop("name", None)
    arguments = function.get("arguments")
    if arguments is not None and not isinstance(arguments, str):
        function["arguments"] = orjson.dumps(arguments).decode()
    elif arguments is None:
        function["arguments"] = ""
    return name + str(function.get("name") or "")


def _split_parts(delta: JSON, content: Any) -> None:
    text, thought = _joined(content)
    delta["content"] = text if text or not thought else None
    if thought:
        delta.setdefault("reasoning_content", thought)


def _joined(content: Any) -> tuple[str, str]:
    """Return the text of a content's parts, and what they hold of the model's thoughts."""
    if content is None:
        return "", ""
    if isinstance(content, str | int | float):
        return str(content), ""
    texts: list[str] = []
    thoughts: list[str] = []
    for part in content if isinstance(content, list) else [content]:
        if not isinstance(part, dict):
            texts.append(str(part or ""))
        elif part.get("type") in THOUGHTS:
            thoughts.append(_inner(part, THOUGHT_FIELDS))
        else:
            texts.append(_inner(part, TEXT_FIELDS))
    return "".join(texts), "".join(thoughts)


def _inner(part: JSON, names: tuple[str, ...]) -> str:
    """Return the text of a part, which may itself be a list of parts."""
    for name in names:
        value = part.get(name)
        if isinstance(value, str):
            return value
        if isinstance(value, list):
            return "".join(_inner(one, names) if isinstance(one, dict) else str(one) for one in value)
    return ""
