"""Translates blocks of content into the parts of chat messages. Pure."""

from __future__ import annotations

from typing import Any

from schemas.errors import InvalidRequest

JSON = dict[str, Any]
Parts = list[JSON]

PDF = "application/pdf"
SERVER_TOOL_BLOCKS = ("server_tool_use", "container_upload", "redacted_thinking")
SERVER_RESULT_SUFFIX = "_tool_result"


def is_of_server_tool(kind: Any) -> bool:
    """Return whether a block is of a tool that Anthropic runs, or is readable by Anthropic alone. Conversations begun there have such blocks."""
    return kind in SERVER_TOOL_BLOCKS or (isinstance(kind, str) and kind.endswith(SERVER_RESULT_SUFFIX))


def require_text(block: JSON, name: str, param: str) -> str:
    """Return the text of a block's field. Raises InvalidRequest."""
    text = block.get(name)
    if not isinstance(text, str):
        raise InvalidRequest(f"Input should be a valid string: '{param}.{name}'", param=f"{param}.{name}")
    return text


def to_parts(content: str | Parts, param: str) -> Parts:
    """Translate what a user, a tool or a document says. Raises InvalidRequest, naming the block that chat cannot express."""
    if isinstance(content, str):
        return [_text_part(content)] if content else []
    return [part for number, block in enumerate(content) for part in block_parts(block, f"{param}.{number}")]


def plain_content(parts: Parts) -> str | Parts:
    """Return text alone as a string, since every chat template accepts a string."""
    if all(part["type"] == "text" for part in parts):
        return "\n".join(part["text"] for part in parts)
    return parts


def system_text(system: str | Parts, param: str) -> str:
    """Return the text of a system prompt. Raises InvalidRequest."""
    if isinstance(system, str):
        return system
    texts = []
    for number, block in enumerate(system):
        place = f"{param}.{number}"
        if block.get("type") != "text":
            raise InvalidRequest(f"A system prompt holds text blocks alone: '{place}.type'", param=f"{place}.type")
        texts.append(require_text(block, "text", place))
    return "\n\n".join(texts)


def block_parts(block: JSON, param: str) -> Parts:
    """Translate one block; one of a tool that Anthropic runs has no parts. Raises InvalidRequest."""
    kind = block.get("type")
    if kind == "text":
        return [_text_part(require_text(block, "text", param))]
    if kind == "image":
        return [_image(_source(block, param), f"{param}.source")]
    if kind == "document":
        return _document(block, param)
    if kind == "search_result":
        content = block.get("content")
        return _framed(
            "search_result", block, to_parts(content if isinstance(content, list) else [], f"{param}.content")
        )
    if kind == "tool_reference":
        return [_text_part(require_text(block, "tool_name", param))]
    if is_of_server_tool(kind):
        return []
    raise InvalidRequest(
        f"Content blocks of type '{str(kind)[:100]}' are not supported here. Use text, image or document blocks: '{param}.type'",
        param=f"{param}.type",
    )


def _text_part(text: str) -> JSON:
    return {"type": "text", "text": text}


def _source(block: JSON, param: str) -> JSON:
    source = block.get("source")
    if not isinstance(source, dict):
        raise InvalidRequest(f"Field required: '{param}.source'", param=f"{param}.source")
    if source.get("type") == "file":
        raise InvalidRequest(
            f"Files are not supported as sources. Send the content itself, in Base64: '{param}.source.type'",
            param=f"{param}.source.type",
        )
    return source


def _image(source: JSON, param: str) -> JSON:
    if source.get("type") == "url":
        url = require_text(source, "url", param)
    elif source.get("type") == "base64":
        url = _data_url(require_text(source, "media_type", param), require_text(source, "data", param))
    else:
        raise _unknown_source(source, param)
    return {"type": "image_url", "image_url": {"url": url}}


def _data_url(media_type: str, data: str) -> str:
    return f"data:{media_type};base64,{data}"


def _document(block: JSON, param: str) -> Parts:
    """Translate a document: text becomes text with its title around it, a PDF becomes chat's file part."""
    citations = block.get("citations")
    if isinstance(citations, dict) and citations.get("enabled"):
        raise InvalidRequest(
            f"Citations are not supported: models do not mark their sources. Leave 'citations' out: '{param}.citations'",
            param=f"{param}.citations",
        )
    source, place = _source(block, param), f"{param}.source"
    kind = source.get("type")
    if kind == "text":
        return _framed("document", block, [_text_part(require_text(source, "data", place))])
    if kind == "content":
        content = source.get("content")
        return _framed(
            "document", block, to_parts(content if isinstance(content, str | list) else [], f"{place}.content")
        )
    if kind == "base64" and source.get("media_type") == PDF:
        title = block.get("title")
        name = title if isinstance(title, str) and title else "document.pdf"
        data = _data_url(PDF, require_text(source, "data", place))
        return [{"type": "file", "file": {"filename": name, "file_data": data}}]
    if kind == "url":
        raise InvalidRequest(
            f"Documents are not fetched. Send the PDF itself, in Base64: '{place}.type'", param=f"{place}.type"
        )
    raise _unknown_source(source, place)


def _framed(tag: str, block: JSON, parts: Parts) -> Parts:
    """Return the parts within a tag that names their title and source, as a model must know where a document ends."""
    names = " ".join(f'{n}="{block[n]}"' for n in ("title", "source", "context") if isinstance(block.get(n), str))
    return [_text_part(f"<{tag} {names}>" if names else f"<{tag}>"), *parts, _text_part(f"</{tag}>")]


def _unknown_source(source: JSON, param: str) -> InvalidRequest:
    kind = f"{source.get('type')} {source.get('media_type') or ''}".strip()
    return InvalidRequest(f"The source '{kind[:100]}' is not supported here: '{param}'", param=param)
