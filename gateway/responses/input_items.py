"""Translates input items into chat messages, and lists them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import orjson

from schemas.errors import InvalidRequest
from schemas.openai.responses import InputItem

JSON = dict[str, Any]

ROLES = ("user", "assistant", "system", "developer")
TEXT_PARTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}
"""The types of text parts, and the field with their text."""
CALL_FIELDS = {
    "function_call": "arguments",
    "custom_tool_call": "input",
    "local_shell_call": "action",
    "shell_call": "action",
    "apply_patch_call": "operation",
}
"""The types of calls of tools that the caller runs, and the field with their arguments."""
CALL_OUTPUTS = frozenset(f"{kind}_output" for kind in CALL_FIELDS)
IMAGE_NOTE = "Image from the result of the call "
"""The beginning of a message with images that a tool returned: a tool message can hold only text."""


def to_messages(items: str | Iterable[InputItem], param: str = "input") -> list[JSON]:
    """Translate `items` into chat messages. Raises InvalidRequest, naming the item that chat cannot express."""
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
    elif kind in CALL_FIELDS:
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": None})
        messages[-1].setdefault("tool_calls", []).append(_call(item, kind, param))
    elif kind in CALL_OUTPUTS:
        _add_result(messages, item, param)
    elif kind != "reasoning":  # models do not receive their earlier reasoning
        raise InvalidRequest(
            f"Input items of type '{kind[:100]}' are not supported. Remove the item.", param=f"{param}.type"
        )


def _call(item: InputItem, kind: str, param: str) -> JSON:
    """Translate a call into a chat tool call. Arguments that are not JSON become JSON, as chat requires it."""
    call_id = _require(item.call_id or (item.id if kind != "function_call" else None), param, "call_id")
    if kind == "function_call":
        return _function(call_id, _require(item.name, param, "name"), item.arguments or "")
    given = (item.model_extra or {}).get(CALL_FIELDS[kind])
    arguments = given if isinstance(given, dict) else {CALL_FIELDS[kind]: given}
    return _function(call_id, item.name or kind.removesuffix("_call"), orjson.dumps(arguments).decode())


def _function(call_id: str, name: str, arguments: str) -> JSON:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _add_result(messages: list[JSON], item: InputItem, param: str) -> None:
    """Add a tool's output after its call. Its images follow in a user message."""
    output, place = item.output, f"{param}.output"
    if output is None:
        raise InvalidRequest(f"Field required: '{place}'", param=place)
    call_id = _require(item.call_id or (item.id if item.type != "function_call_output" else None), param, "call_id")
    images: list[JSON] = []
    if isinstance(output, dict):
        text = output["content"] if isinstance(output.get("content"), str) else orjson.dumps(output).decode()
    elif isinstance(output, str):
        text = output
    else:
        images = [_image(part, f"{place}.{n}") for n, part in enumerate(output) if part.get("type") == "input_image"]
        text = _result_text([part for part in output if part.get("type") != "input_image"], place)
    at = _result_position(messages, call_id)
    messages.insert(at, {"role": "tool", "tool_call_id": call_id, "content": text or ("(an image)" if images else "")})
    if images:
        note = {"type": "text", "text": f"{IMAGE_NOTE}{call_id}:"}
        while at < len(messages) and (messages[at]["role"] == "tool" or _shows_images(messages[at])):
            at += 1
        messages.insert(at, {"role": "user", "content": [note, *images]})


def _result_text(parts: list[JSON], param: str) -> str:
    """Return the text of an output's parts. A shell's parts are `stdout` and `stderr`."""
    if parts and all("type" not in part and ("stdout" in part or "stderr" in part) for part in parts):
        return "\n".join(f"{part.get('stdout') or ''}{part.get('stderr') or ''}" for part in parts)
    return _all_text(parts, param)


def _shows_images(message: JSON) -> bool:
    content = message.get("content")
    first = content[0] if message["role"] == "user" and isinstance(content, list) and content else {}
    return str(first.get("text") or "").startswith(IMAGE_NOTE)


def _result_position(messages: list[JSON], call_id: str) -> int:
    """Return the index for the output of a call: after the calling message, before later messages."""
    place = len(messages)
    while place and all(call["id"] != call_id for call in messages[place - 1].get("tool_calls", ())):
        place -= 1
    if not place:
        return len(messages)
    while place < len(messages) and messages[place]["role"] == "tool":
        place += 1
    return place


def _require(value: str | None, param: str, name: str) -> str:
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
    if not parts:
        return {"role": role, "content": ""}
    if len(parts) == 1 and parts[0]["type"] == "text":
        return {"role": role, "content": parts[0]["text"]}  # every chat template accepts a plain string
    return {"role": role, "content": parts}


def _all_text(parts: list[JSON], param: str) -> str:
    """Return the text of parts where chat accepts only text. Raises InvalidRequest."""
    texts = []
    for number, part in enumerate(parts):
        if not _is_text(part):
            raise InvalidRequest(
                "Only text parts are supported here. Remove the other parts.", param=f"{param}.{number}.type"
            )
        texts.append(_text(part, f"{param}.{number}"))
    return "".join(texts)


def _is_text(part: JSON) -> bool:
    return isinstance(part.get("type"), str) and part["type"] in TEXT_PARTS


def _text(part: JSON, param: str) -> str:
    name = TEXT_PARTS[part["type"]]
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
    raise InvalidRequest(
        f"Content of type '{str(kind)[:100]}' is not supported. Use text, image or audio parts.", param=f"{param}.type"
    )


def _image(part: JSON, param: str) -> JSON:
    url = part.get("image_url")
    if isinstance(url, dict):  # the form of chat
        url = url.get("url")
    if not isinstance(url, str):
        raise InvalidRequest(
            "An image needs an 'image_url', which may be a data URL. File ids are not supported.",
            param=f"{param}.image_url",
        )
    image: JSON = {"url": url}
    if part.get("detail") is not None:
        image["detail"] = part["detail"]
    return {"type": "image_url", "image_url": image}


def input_item_objects(items: str | Iterable[InputItem], response: str) -> list[JSON]:
    """Return the items as `GET /v1/responses/{id}/input_items` lists them: with ids, and content as parts."""
    if isinstance(items, str):
        items = [InputItem(role="user", content=items)]
    return [_item_object(item, f"{response.removeprefix('resp_')}_i{number}") for number, item in enumerate(items)]


ID_PREFIXES = {
    "message": "msg",
    "function_call": "fc",
    "function_call_output": "fco",
    "custom_tool_call": "ctc",
    "custom_tool_call_output": "ctco",
    "reasoning": "rs",
}


def _item_object(item: InputItem, suffix: str) -> JSON:
    kind = item.type or "message"
    fields = item.model_dump(exclude_unset=True)
    if kind == "message" and isinstance(item.content, str):
        fields["content"] = [_content_part(item.content, item.role)]
    fields |= {"id": item.id or f"{ID_PREFIXES.get(kind, 'item')}_{suffix}", "type": kind}
    if kind != "reasoning":
        fields["status"] = item.status or "completed"
    return fields


def _content_part(text: str, role: str | None) -> JSON:
    if role == "assistant":
        return {"type": "output_text", "text": text, "annotations": []}
    return {"type": "input_text", "text": text}
