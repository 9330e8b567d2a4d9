"""Items of a conversation, and the chat messages that say the same."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from schemas.errors import InvalidRequest
from schemas.openai.responses import InputItem

JSON = dict[str, Any]

ROLES = ("user", "assistant", "system", "developer")
TEXTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}
"""Parts that are text, and the field that holds it."""


def messages_of(items: str | Iterable[InputItem], param: str = "input") -> list[JSON]:
    """The chat messages that say what `items` say. Raises InvalidRequest, naming what chat has no words for."""
    if isinstance(items, str):
        return [{"role": "user", "content": items}]
    messages: list[JSON] = []
    for number, item in enumerate(items):
        _add(messages, item, f"{param}.{number}")
    return messages


def _add(messages: list[JSON], item: InputItem, param: str) -> None:
    kind = item.type or "message"
    if kind == "message":
        messages.append(_message(item, param))
    elif kind == "function_call":
        call = {
            "id": _needed(item.call_id, param, "call_id"),
            "type": "function",
            "function": {"name": _needed(item.name, param, "name"), "arguments": item.arguments or ""},
        }
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": None})
        messages[-1].setdefault("tool_calls", []).append(call)
    elif kind == "function_call_output":
        output = item.output
        if output is None:
            raise InvalidRequest(f"Field required: '{param}.output'", param=f"{param}.output")
        text = output if isinstance(output, str) else _all_text(output, f"{param}.output")
        call_id = _needed(item.call_id, param, "call_id")
        messages.insert(_place_of_result(messages, call_id), {"role": "tool", "tool_call_id": call_id, "content": text})
    elif kind != "reasoning":  # what a model thought before is not told to it again
        raise InvalidRequest(f"items of type '{kind[:100]}' are not understood here", param=f"{param}.type")


def _place_of_result(messages: list[JSON], call_id: str) -> int:
    """Return where the result of a call belongs: behind the message that calls, before whatever was said meanwhile."""
    place = len(messages)
    while place and all(call["id"] != call_id for call in messages[place - 1].get("tool_calls", ())):
        place -= 1
    if not place:
        return len(messages)
    while place < len(messages) and messages[place]["role"] == "tool":
        place += 1
    return place


def _needed(value: str | None, param: str, name: str) -> str:
    if not value:
        raise InvalidRequest(f"Field required: '{param}.{name}'", param=f"{param}.{name}")
    return value


def _message(item: InputItem, param: str) -> JSON:
    role = item.role
    if role not in ROLES:
        raise InvalidRequest(f"Input should be one of: {', '.join(ROLES)}: '{param}.role'", param=f"{param}.role")
    content = item.content
    if content is None:
        raise InvalidRequest(f"Field required: '{param}.content'", param=f"{param}.content")
    if isinstance(content, str):
        return {"role": role, "content": content}
    place = f"{param}.content"
    if role == "assistant":
        return {"role": role, "content": _all_text(content, place)}
    parts = [_part(part, f"{place}.{number}") for number, part in enumerate(content)]
    if len(parts) == 1 and parts[0]["type"] == "text":
        return {"role": role, "content": parts[0]["text"]}  # which every chat template takes
    return {"role": role, "content": parts}


def _all_text(parts: list[JSON], param: str) -> str:
    """Where chat takes a text only."""
    texts = []
    for number, part in enumerate(parts):
        if not _is_text(part):
            raise InvalidRequest("only text is understood here", param=f"{param}.{number}.type")
        texts.append(_text(part, f"{param}.{number}"))
    return "".join(texts)


def _is_text(part: JSON) -> bool:
    return isinstance(part.get("type"), str) and part["type"] in TEXTS


def _text(part: JSON, param: str) -> str:
    name = TEXTS[part["type"]]
    text = part.get(name)
    if not isinstance(text, str):
        raise InvalidRequest(f"Input should be a valid string: '{param}.{name}'", param=f"{param}.{name}")
    return text


def _part(part: JSON, param: str) -> JSON:
    kind = part.get("type")
    if _is_text(part):
        return {"type": "text", "text": _text(part, param)}
    if kind == "input_image":
        return _image(part, param)
    if kind == "input_audio" and isinstance(part.get("input_audio"), dict):
        return {"type": "input_audio", "input_audio": part["input_audio"]}
    raise InvalidRequest(f"content of type '{str(kind)[:100]}' is not understood here", param=f"{param}.type")


def _image(part: JSON, param: str) -> JSON:
    url = part.get("image_url")
    if not isinstance(url, str):
        raise InvalidRequest(
            "an image is sent by its URL, a data URL perhaps; files are not looked up for it",
            param=f"{param}.image_url",
        )
    image: JSON = {"url": url}
    if part.get("detail") is not None:
        image["detail"] = part["detail"]
    return {"type": "image_url", "image_url": image}


def listed(items: str | Iterable[InputItem], response: str) -> list[JSON]:
    """The items as `GET /v1/responses/{id}/input_items` shows them: each with an id, content as parts."""
    if isinstance(items, str):
        items = [InputItem(role="user", content=items)]
    return [_shown(item, f"{response.removeprefix('resp_')}_i{number}") for number, item in enumerate(items)]


PREFIXES = {"message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}


def _shown(item: InputItem, suffix: str) -> JSON:
    kind = item.type or "message"
    shown = item.model_dump(exclude_unset=True)
    if kind == "message" and isinstance(item.content, str):
        shown["content"] = [_as_part(item.content, item.role)]
    shown |= {"id": item.id or f"{PREFIXES[kind]}_{suffix}", "type": kind}
    if kind != "reasoning":
        shown["status"] = item.status or "completed"
    return shown


def _as_part(text: str, role: str | None) -> JSON:
    if role == "assistant":
        return {"type": "output_text", "text": text, "annotations": []}
    return {"type": "input_text", "text": text}
