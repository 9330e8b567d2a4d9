"""Find the strings of a request that a backend may take for the address of a file: by position, not by name. Pure.

| position | rule |
|---|---|
| `TEXT_FIELDS`, a message's own texts, the text of a part of a text type | text: it may hold any URL |
| a part of a message's content or of `input`, whatever its type, with everything in it | media: `data:` URLs and base64 only |
| a tool that the backend runs, every other field | a string that as a whole is a URL is media |

The worker reads the body with the same parser and writes it again, so that escapes and repeated keys mean the same to both.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

JSON = dict[str, Any]

FETCHABLE = {"image_url": "image/", "audio_url": "audio/", "video_url": "video/"}
"""Fields whose remote URL the gateway can replace by a data URL, and the content types that may be there."""
TEXT_FIELDS = frozenset(
    {
        *("model", "prompt", "suffix", "input", "query", "documents", "instructions", "negative_prompt", "language"),
        *("user", "safety_identifier", "prompt_cache_key", "metadata", "stop", "tools", "tool_choice", "functions"),
        *("function_call", "response_format", "web_search_options", "logit_bias", "format", "json_schema", "grammar"),
        *("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs", "regex", "ebnf"),
        *("chat_template", "chat_template_kwargs", "structural_tag", "bad_words", "stop_sequences", "stop_regex"),
    }
)
"""Fields of requests that backends read as text, as a schema, or as the input of a template."""
MESSAGE_TEXTS = frozenset(
    {
        *("role", "name", "tool_calls", "function_call", "tool_call_id", "refusal", "reasoning", "reasoning_content"),
        *("reasoning_details", "thinking", "thinking_blocks", "annotations", "citations", "search_results"),
        *("id", "metadata", "extra_content", "provider_specific_fields"),
    }
)
"""The same, of a message."""
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
"""By the type of a part of a message's content: its fields that are text, or a tool's JSON. A part of any other type has none."""
JSON_TEXTS = frozenset({"annotations", "citations", "input"})
"""Fields of `PART_TEXTS` that may hold more than a string."""
CALLERS_TOOLS = frozenset({"function", "custom"})
"""Types of tools that the caller runs. A backend runs those of other types (`mcp`), and opens their URLs."""
INPUT_KINDS = ("modality", "input_type")
"""Fields of embeddings requests that say what `input` is: Infinity fetches the strings of another modality than text."""
MEDIA_INPUT = ("image", "audio", "video")
SCHEMA_NAMES = frozenset({"$schema", "$id", "$ref"})
"""Fields of a JSON schema that hold names, which may look like URLs."""

HEAD = 64
"""Characters that every scheme fits into."""
LONGEST_PATH = 4096
"""Linux opens no longer one."""
BEFORE = re.compile(r"[^0-9A-Za-z/\\.~+]+")
"""Blanks, quotes, `<` and marks that nobody sees: some servers drop them in front of an address."""
INNER_BLANK = re.compile(r"[\t\r\n]")
SCHEME = re.compile(rf"[Dd][Aa][Tt][Aa]:|[A-Za-z][A-Za-z0-9+.\-]{{0,{HEAD}}}:(?!\s|$)")
PATH = re.compile(r"[/\\]|(?:\.{1,2}|~)[/\\]")
URL = re.compile(
    rf"(?:[A-Za-z][A-Za-z0-9+.\-]{{0,{HEAD}}}:)?[/\\]{{2}}(?!\s|$)|[A-Za-z][A-Za-z0-9+.\-]{{1,{HEAD}}}:/|"
    r"(?:https?|ftps?|file|s3|gs):(?!\s|$)",
    re.IGNORECASE,
)
DATA_URL = re.compile(
    r"data:(?:[\w.+\-]{1,64}(?:/[\w.+\-]{1,128})?)?(?:;[\w.+\-]{1,64}(?:=(?:[\w.+\-]{0,128}|\"[\w.+\-, ]{0,128}\"))?){0,8},",
    re.ASCII,
)
BASE64 = re.compile(r"[A-Za-z0-9+/]*")
JPEG = re.compile(r"/9j/[A-Za-z0-9+/\s]*={0,2}\s*")
"""How a JPEG begins in base64, which no path does: without dots nothing leads out of it."""


@dataclass(frozen=True, slots=True)
class MediaPlace:
    """A string that is neither text, nor a data URL, nor base64."""

    holder: Any
    """The object or list that holds it."""
    key: Any
    param: str
    kind: str | None
    """The beginning of the content type of what may be fetched for it; None: nothing is fetched for this place."""

    @property
    def url(self) -> str:
        """The string itself."""
        return str(self.holder[self.key])

    def replace(self, url: str) -> None:
        """Put another string in its place."""
        self.holder[self.key] = url


def is_plain(request: BaseModel) -> bool:
    """Return whether a checked request holds text only, at a glance. False: `media_places` has to search it."""
    extra = request.model_extra
    if extra and not extra.keys() <= TEXT_FIELDS:
        return False
    fields = request.__dict__  # the declared ones; asking for one that is not declared is slow
    if fields.get("voice") is not None:
        return False
    parts = fields.get("input")
    if parts.__class__ is list and isinstance(parts[0], BaseModel):
        return False
    for tool in fields.get("tools") or ():
        if not _is_callers(tool):
            return False
    for message in fields.get("messages", ()):
        if message.content.__class__ is list:
            return False
        extra = message.model_extra
        if extra and not extra.keys() <= MESSAGE_TEXTS:
            return False
    return True


def searched(request: BaseModel) -> JSON:
    """Return the fields of a checked request that `media_places` has to search, as in its body, not copied."""
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


def media_places(fields: JSON) -> list[MediaPlace]:
    """Return every string of a request's body that a backend may open, in the body's order."""
    found: list[MediaPlace] = []
    media_input = any(
        media in name for kind in INPUT_KINDS for name in _names(fields.get(kind)) for media in MEDIA_INPUT
    )
    for name, value in fields.items():
        if name == "messages" and isinstance(value, list):
            for number in range(len(value)):
                _message(found, value, number, f"messages.{number}")
        elif name == "prediction" and isinstance(value, dict):
            _message(found, fields, name, name)
        elif name == "input" and media_input:
            _media(found, fields, name, name)
        elif name == "input" and isinstance(value, list):
            _parts(found, value, name)
        elif name == "tools" and isinstance(value, list):
            _tools(found, value)
        elif name not in TEXT_FIELDS:
            _open(found, fields, name, name)
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
    """Search the parts of an input; its texts and tokens are no places."""
    for number, part in enumerate(values):
        if isinstance(part, dict):
            _part(found, part, f"{param}.{number}")


def _names(value: Any) -> set[str]:
    return {one.lower() for one in (value if isinstance(value, list) else [value]) if isinstance(one, str)}


def _tools(found: list[MediaPlace], tools: list[Any]) -> None:
    for number, tool in enumerate(tools):
        if not (isinstance(tool, dict) and _is_callers(tool)):
            _open(found, tools, number, f"tools.{number}")


def _is_callers(tool: JSON) -> bool:
    kind = tool.get("type")
    return kind is None or (isinstance(kind, str) and kind in CALLERS_TOOLS)


def _message(found: list[MediaPlace], holder: Any, key: Any, param: str) -> None:
    message = holder[key]
    if not isinstance(message, dict):
        _media(found, holder, key, param)
        return
    for name, value in message.items():
        if name == "content":
            if not isinstance(value, str):
                _content(found, value, f"{param}.content")
        elif name not in MESSAGE_TEXTS:
            _media(found, message, name, f"{param}.{name}")


def _content(found: list[MediaPlace], content: Any, param: str) -> None:
    if isinstance(content, dict):
        _part(found, content, param)
    elif isinstance(content, list):
        for number, part in enumerate(content):
            if isinstance(part, dict):
                _part(found, part, f"{param}.{number}")
            else:
                _media(found, content, number, f"{param}.{number}")


def _part(found: list[MediaPlace], part: JSON, param: str) -> None:
    kind = part.get("type")
    texts = PART_TEXTS.get(kind, ()) if kind is None or isinstance(kind, str) else ()
    for name, value in part.items():
        if name not in texts:
            _media(found, part, name, f"{param}.{name}")
        elif name == "content" and not isinstance(value, str):
            _content(found, value, f"{param}.{name}")
        elif not isinstance(value, str) and name not in JSON_TEXTS:
            _media(found, part, name, f"{param}.{name}")


def _media(found: list[MediaPlace], holder: Any, key: Any, param: str, field: str = "") -> None:
    """Find what is neither a data URL nor base64, of `holder[key]` and all in it. `field`: the name it stands under."""
    value = holder[key]
    field = key if isinstance(key, str) else field
    if isinstance(value, str):
        if (field.lower().endswith(("url", "uri")) or is_locator(value)) and not DATA_URL.match(value):
            found.append(_place(holder, key, param))
    elif isinstance(value, dict):
        if "type" in value:
            _part(found, value, param)
        else:
            for name in value:
                _media(found, value, name, f"{param}.{name}")
    elif isinstance(value, list):
        for number, one in enumerate(value):
            if isinstance(one, str | dict | list):
                _media(found, value, number, f"{param}.{number}", field)


def _open(found: list[MediaPlace], holder: Any, key: Any, param: str) -> None:
    """Find the strings that as a whole are URLs, of a field with a meaning of the backend's own."""
    value = holder[key]
    if isinstance(value, str):
        text = _trimmed(value)
        if URL.match(text) and not _is_base64(text):
            found.append(MediaPlace(holder, key, param, None))
    elif isinstance(value, dict):
        for name in value:
            if name not in SCHEMA_NAMES or not isinstance(value[name], str):
                _open(found, value, name, f"{param}.{name}")
    elif isinstance(value, list):
        for number, one in enumerate(value):
            if isinstance(one, str | dict | list):
                _open(found, value, number, f"{param}.{number}")


def _place(holder: Any, key: Any, param: str) -> MediaPlace:
    """Some clients leave out the object around the URL of a picture: `image_url` and `image_url.url` are one place."""
    outer = param.removesuffix(".url")
    kind = FETCHABLE.get(outer.rpartition(".")[2]) if param.startswith(("messages.", "input.")) else None
    return MediaPlace(holder, key, param if kind is None else outer, kind)


def _is_base64(text: str) -> bool:
    """Return whether a text that begins like a path is base64: JPEG and MPEG sound begin with a slash."""
    jpeg = JPEG.match(text, 0, LONGEST_PATH)
    if jpeg is not None and jpeg.end() == min(len(text), LONGEST_PATH):
        return True
    found = BASE64.match(text, 0, LONGEST_PATH)
    return found is not None and found.end() == LONGEST_PATH


def _trimmed(value: str) -> str:
    """Return `value` as URL parsers read it: without what is before it, and without tabs and line breaks in its scheme."""
    before = BEFORE.match(value)
    text = value[before.end() :] if before is not None else value
    return INNER_BLANK.sub("", text) if INNER_BLANK.search(text, 0, HEAD) else text
