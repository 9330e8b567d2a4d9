"""Find the strings of a request that a backend may open as a file or URL: by their position, not by their name. Pure.

| position | rule |
|---|---|
| `TEXT_FIELDS`, a message's own texts, the text of a part of a text type | text: it may hold any URL |
| a part of a message's content or of `input`, of any type, with everything in it | media: `data:` URLs and base64 only |
| a tool that the backend runs, every other field | a string that as a whole is a URL is media |

The worker parses the body with the same parser and serializes it again, so that escapes and repeated keys mean the same to both.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

JSON = dict[str, Any]

FETCHABLE = {"image_url": "image/", "audio_url": "audio/", "video_url": "video/"}
"""Fields whose remote URL the gateway can replace by a data URL, with the prefix of the content types that may be there."""
TEXT_FIELDS = frozenset(
    {
        *("model", "prompt", "suffix", "input", "query", "documents", "instructions", "negative_prompt", "language"),
        *("user", "safety_identifier", "prompt_cache_key", "metadata", "stop", "tools", "tool_choice", "functions"),
        *("function_call", "response_format", "web_search_options", "logit_bias", "format", "json_schema", "grammar"),
        *("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs", "regex", "ebnf"),
        *("chat_template", "chat_template_kwargs", "structural_tag", "bad_words", "stop_sequences", "stop_regex"),
    }
)
"""Fields of a request that backends read as text, as a schema, or as the input of a template."""
MESSAGE_TEXTS = frozenset(
    {
        *("role", "name", "tool_calls", "function_call", "tool_call_id", "refusal", "reasoning", "reasoning_content"),
        *("reasoning_details", "thinking", "thinking_blocks", "annotations", "citations", "search_results"),
        *("id", "metadata", "extra_content", "provider_specific_fields"),
    }
)
"""Fields of a message that backends read as text."""
PART_TEXTS: dict[str | None, frozenset[str]] = {
    None: frozenset({"text"}),
    "text": frozenset({"text", "annotations", "citations"}),
    "input_text": frozenset({"text"}),
    "output_text": frozenset({"text", "annotations"}),
    "refusal": frozenset({"refusal"}),
    "thinking": frozenset({"thinking", "signature"}),
    "redacted_thinking": frozenset({"data"}),
    "reasoning_text": frozenset({"text"}),
    "summary_text": frozenset({"text"}),
    "tool_use": frozenset({"input"}),
    "tool_result": frozenset({"content"}),
}
"""Fields that are text or a tool's JSON, by the type of a message's content part. Parts of other types have none."""
JSON_TEXTS = frozenset({"annotations", "citations", "input"})
"""Fields of `PART_TEXTS` that may hold other JSON than a string."""
CALLERS_TOOLS = frozenset({"function", "custom"})
"""Types of tools that the caller runs. A backend runs tools of other types (`mcp`), and opens their URLs."""
INPUT_KINDS = ("modality", "input_type")
"""Fields of embeddings requests that state the modality of `input`: Infinity fetches strings of other modalities than text."""
MEDIA_INPUT = ("image", "audio", "video")
SCHEMA_NAMES = frozenset({"$schema", "$id", "$ref"})
"""Fields of a JSON schema whose values are names that may look like URLs."""

MAX_SCHEME_LENGTH = 64
"""Characters in which every scheme ends."""
MAX_PATH_LENGTH = 4096
"""Longest path that Linux opens."""
LEADING_MARKS = re.compile(r"[^0-9A-Za-z/\\.~+]+")
"""Blanks, quotes, `<` and invisible characters, which some servers drop in front of a URL."""
INNER_WHITESPACE = re.compile(r"[\t\r\n]")
SCHEME = re.compile(rf"[Dd][Aa][Tt][Aa]:|[A-Za-z][A-Za-z0-9+.\-]{{0,{MAX_SCHEME_LENGTH}}}:(?!\s|$)")
PATH = re.compile(r"[/\\]|(?:\.{1,2}|~)[/\\]")
URL = re.compile(
    rf"(?:[A-Za-z][A-Za-z0-9+.\-]{{0,{MAX_SCHEME_LENGTH}}}:)?[/\\]{{2}}(?!\s|$)|[A-Za-z][A-Za-z0-9+.\-]{{1,{MAX_SCHEME_LENGTH}}}:/|"
    r"(?:https?|ftps?|file|s3|gs):(?!\s|$)",
    re.IGNORECASE,
)
DATA_URL = re.compile(
    r"data:(?:[\w.+\-]{1,64}(?:/[\w.+\-]{1,128})?)?(?:;[\w.+\-]{1,64}(?:=(?:[\w.+\-]{0,128}|\"[\w.+\-, ]{0,128}\"))?){0,8},",
    re.ASCII,
)
BASE64 = re.compile(r"[A-Za-z0-9+/]*")
JPEG = re.compile(r"/9j/[A-Za-z0-9+/\s]*={0,2}\s*")
"""A JPEG in base64, which also begins with a slash; without dots, no such path leads out of its folder."""


@dataclass(frozen=True, slots=True)
class MediaPlace:
    """The position of a string that is neither text, nor a data URL, nor base64."""

    holder: Any
    """The object or list that holds the string."""
    key: Any
    param: str
    kind: str | None
    """Prefix of the content types that may be fetched for this field; None: nothing is fetched for it."""

    @property
    def url(self) -> str:
        """The string."""
        return str(self.holder[self.key])

    def replace(self, url: str) -> None:
        """Replace the string."""
        self.holder[self.key] = url


def is_plain(request: BaseModel) -> bool:
    """Return whether a validated request is seen at once to hold text only. False: `find_media_places` must search it."""
    extra = request.model_extra
    if extra and not extra.keys() <= TEXT_FIELDS:
        return False
    fields = request.__dict__  # declared fields only: attribute access to others is slow
    if fields.get("voice") is not None:
        return False
    parts = fields.get("input")
    if parts.__class__ is list and isinstance(parts[0], BaseModel):
        return False
    for tool in fields.get("tools") or ():
        if not _is_run_by_caller(tool):
            return False
    for message in fields.get("messages", ()):
        if message.content.__class__ is list:
            return False
        extra = message.model_extra
        if extra and not extra.keys() <= MESSAGE_TEXTS:
            return False
    return True


def searchable_fields(request: BaseModel) -> JSON:
    """Return the fields of a validated request that `find_media_places` must search, as in its body, without a copy."""
    fields = dict(request.model_extra or {})
    declared = request.__dict__
    for name in ("input", "voice"):
        value = declared.get(name)
        fields[name] = _plain(value)
    if tools := declared.get("tools"):
        fields["tools"] = tools
    if messages := declared.get("messages"):
        fields["messages"] = [{**(one.model_extra or {}), "content": one.content} for one in messages]
    return fields


def find_media_places(fields: JSON) -> list[MediaPlace]:
    """Return every string of a request's body that a backend may open, in the body's order."""
    found: list[MediaPlace] = []
    media_input = any(
        media in name for kind in INPUT_KINDS for name in _names(fields.get(kind)) for media in MEDIA_INPUT
    )
    for name, value in fields.items():
        if name == "messages" and isinstance(value, list):
            for number in range(len(value)):
                _find_in_message(found, value, number, f"messages.{number}")
        elif name == "prediction" and isinstance(value, dict):
            _find_in_message(found, fields, name, name)
        elif name == "input" and media_input:
            _find_media(found, fields, name, name)
        elif name == "input" and isinstance(value, list):
            _parts(found, value, name)
        elif name == "tools" and isinstance(value, list):
            _tools(found, value)
        elif name not in TEXT_FIELDS:
            _find_urls(found, fields, name, name)
    return found


def is_locator(value: str) -> bool:
    """Return whether a server that opens `value` fetches or reads something: a URL of any scheme, or a path."""
    text = _trimmed(value)
    if SCHEME.match(text):
        return DATA_URL.match(value) is None
    return PATH.match(text) is not None and not _is_base64(text)


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump()
    return [_plain(one) for one in value] if isinstance(value, list) and isinstance(value[0], BaseModel) else value


def _parts(found: list[MediaPlace], values: list[Any], param: str) -> None:
    """Search the parts of an input; its texts and tokens need no search."""
    for number, part in enumerate(values):
        if isinstance(part, dict):
            _find_in_part(found, part, f"{param}.{number}")


def _names(value: Any) -> set[str]:
    return {one.lower() for one in (value if isinstance(value, list) else [value]) if isinstance(one, str)}


def _tools(found: list[MediaPlace], tools: list[Any]) -> None:
    for number, tool in enumerate(tools):
        if not (isinstance(tool, dict) and _is_run_by_caller(tool)):
            _find_urls(found, tools, number, f"tools.{number}")


def _is_run_by_caller(tool: JSON) -> bool:
    kind = tool.get("type")
    return kind is None or (isinstance(kind, str) and kind in CALLERS_TOOLS)


def _find_in_message(found: list[MediaPlace], holder: Any, key: Any, param: str) -> None:
    message = holder[key]
    if not isinstance(message, dict):
        _find_media(found, holder, key, param)
        return
    for name, value in message.items():
        if name == "content":
            if not isinstance(value, str):
                _find_in_content(found, value, f"{param}.content")
        elif name not in MESSAGE_TEXTS:
            _find_media(found, message, name, f"{param}.{name}")


def _find_in_content(found: list[MediaPlace], content: Any, param: str) -> None:
    if isinstance(content, dict):
        _find_in_part(found, content, param)
    elif isinstance(content, list):
        for number, part in enumerate(content):
            if isinstance(part, dict):
                _find_in_part(found, part, f"{param}.{number}")
            else:
                _find_media(found, content, number, f"{param}.{number}")


def _find_in_part(found: list[MediaPlace], part: JSON, param: str) -> None:
    kind = part.get("type")
    texts = PART_TEXTS.get(kind, ()) if kind is None or isinstance(kind, str) else ()
    for name, value in part.items():
        if name not in texts:
            _find_media(found, part, name, f"{param}.{name}")
        elif name == "content" and not isinstance(value, str):
            _find_in_content(found, value, f"{param}.{name}")
        elif not isinstance(value, str) and name not in JSON_TEXTS:
            _find_media(found, part, name, f"{param}.{name}")


def _find_media(found: list[MediaPlace], holder: Any, key: Any, param: str, field: str = "") -> None:
    """Find the strings in `holder[key]` that are neither data URLs nor base64. `field`: name of the enclosing field."""
    value = holder[key]
    field = key if isinstance(key, str) else field
    if isinstance(value, str):
        if (field.lower().endswith(("url", "uri")) or is_locator(value)) and not DATA_URL.match(value):
            found.append(_place(holder, key, param))
    elif isinstance(value, dict):
        if "type" in value:
            _find_in_part(found, value, param)
        else:
            for name in value:
                _find_media(found, value, name, f"{param}.{name}")
    elif isinstance(value, list):
        for number, one in enumerate(value):
            if isinstance(one, str | dict | list):
                _find_media(found, value, number, f"{param}.{number}", field)


def _find_urls(found: list[MediaPlace], holder: Any, key: Any, param: str) -> None:
    """Find the strings that as a whole are URLs, in a field whose meaning only the backend knows."""
    value = holder[key]
    if isinstance(value, str):
        text = _trimmed(value)
        if URL.match(text) and not _is_base64(text):
            found.append(MediaPlace(holder, key, param, None))
    elif isinstance(value, dict):
        for name in value:
            if name not in SCHEMA_NAMES or not isinstance(value[name], str):
                _find_urls(found, value, name, f"{param}.{name}")
    elif isinstance(value, list):
        for number, one in enumerate(value):
            if isinstance(one, str | dict | list):
                _find_urls(found, value, number, f"{param}.{number}")


def _place(holder: Any, key: Any, param: str) -> MediaPlace:
    """Return the place of a string; `image_url` and `image_url.url` are one place, since some clients omit the object."""
    outer = param.removesuffix(".url")
    kind = FETCHABLE.get(outer.rpartition(".")[2]) if param.startswith(("messages.", "input.")) else None
    return MediaPlace(holder, key, param if kind is None else outer, kind)


def _is_base64(text: str) -> bool:
    """Return whether a text that looks like a path is base64: JPEG and MPEG audio begin with a slash."""
    jpeg = JPEG.match(text, 0, MAX_PATH_LENGTH)
    if jpeg is not None and jpeg.end() == min(len(text), MAX_PATH_LENGTH):
        return True
    found = BASE64.match(text, 0, MAX_PATH_LENGTH)
    return found is not None and found.end() == MAX_PATH_LENGTH


def _trimmed(value: str) -> str:
    """Return `value` as URL parsers read it: without leading blanks and quotes, and without tabs and line breaks in its scheme."""
    marks = LEADING_MARKS.match(value)
    text = value[marks.end() :] if marks is not None else value
    return INNER_WHITESPACE.sub("", text) if INNER_WHITESPACE.search(text, 0, MAX_SCHEME_LENGTH) else text
