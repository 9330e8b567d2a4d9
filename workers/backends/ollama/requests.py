"""OpenAI's requests as Ollama's: pure. A field that Ollama lacks, and that would change the answer, is refused by name, or was adapted before."""

from __future__ import annotations

import re
from typing import Any

import orjson

from workers.backends.base import BackendRefused
from workers.backends.ollama.models import VISION, ModelDetails

JSON = dict[str, Any]

LACKS = frozenset({"n", "best_of", "logit_bias", "parallel_tool_calls", "tool_choice", "verbosity", "store"})
"""Parameters that Ollama lacks. `adapter_kit/text/adaptations.py` replaces or refuses them before a request is built."""
LACKS_IN_COMPLETIONS = LACKS | {"logprobs"}
SAME_NAME_OPTIONS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repeat_penalty",
)
"""Options with the same name in both APIs."""
OLLAMA_FIELDS = ("keep_alive", "think", "truncate", "shift")
"""Ollama's own fields, which callers may use."""
OLLAMA_GENERATE_FIELDS = ("suffix", "raw", "system", "template")
EFFORTS: dict[str, bool | str] = {
    "none": False, "minimal": "low", "low": "low", "medium": "medium", "high": "high", "max": "max",
}  # fmt: skip
UNSUPPORTED_FIELDS: dict[str, tuple[tuple[Any, ...], str]] = {
    "echo": ((False,), "Ollama does not repeat the prompt; send echo=false"),
    "functions": (([],), "functions are not supported; use tools"),
    "function_call": (("none", "auto"), "functions are not supported; use tools and tool_choice"),
    "modalities": ((["text"],), "Ollama answers in text only"),
    "audio": ((), "Ollama answers in text only"),
    "web_search_options": ((), "Ollama does not search the web"),
}
"""Fields that would change the answer: the harmless values, and the message for any other value."""
BASE64_IMAGE = re.compile(r"data:image/[\w.+-]+(?:;[^;,]*)*;base64,")


def chat_request(body: JSON, details: ModelDetails) -> JSON:
    """Return the body for `/api/chat`, without the model. Raises BackendRefused."""
    request = _common(body)
    request["messages"] = _messages(body.get("messages"), details)
    tools = _tools(body)
    if tools:
        request["tools"] = tools
    if body.get("logprobs"):
        request["logprobs"] = True
        if body.get("top_logprobs"):
            request["top_logprobs"] = body["top_logprobs"]
    return request


def generate_request(body: JSON) -> JSON:
    """Return the body for `/api/generate`, without the model. Raises BackendRefused."""
    request = _common(body) | {name: body[name] for name in OLLAMA_GENERATE_FIELDS if body.get(name) is not None}
    request["prompt"] = _prompt(body.get("prompt"))
    return request


def embed_requests(body: JSON, batch: int) -> list[JSON]:
    """Return the bodies for `/api/embed`, without the model, with at most `batch` texts each. Raises BackendRefused."""
    texts = _texts(body.get("input"))
    request = {name: body[name] for name in ("keep_alive", "truncate", "options") if body.get(name) is not None}
    dimensions = body.get("dimensions")
    if dimensions is not None:
        if not isinstance(dimensions, int) or dimensions < 1:
            raise BackendRefused("dimensions must be a positive number", param="dimensions")
        request["dimensions"] = dimensions
    return [request | {"input": texts[at : at + batch]} for at in range(0, len(texts), batch)]


def _common(body: JSON) -> JSON:
    """Return the fields that chat and completions share."""
    _refuse_unsupported(body)
    request: JSON = {name: body[name] for name in OLLAMA_FIELDS if body.get(name) is not None} | {"stream": True}
    options = _options(body)
    if options:
        request["options"] = options
    output = _format(body)
    if output is not None:
        request["format"] = output
    if "think" not in request:
        effort = _effort(body)
        if effort is not None:
            request["think"] = effort
    return request


def _refuse_unsupported(body: JSON) -> None:
    for name, (harmless, words) in UNSUPPORTED_FIELDS.items():
        value = body.get(name)
        if value is not None and value not in harmless:
            raise BackendRefused(words, param=name)


def _options(body: JSON) -> JSON:
    """Return the options: OpenAI's fields, overridden by Ollama's own `options`."""
    own = body.get("options")
    if own is not None and not isinstance(own, dict):
        raise BackendRefused("options must be an object", param="options")
    options = {name: body[name] for name in SAME_NAME_OPTIONS if body.get(name) is not None}
    stop = body.get("stop")
    if stop:
        options["stop"] = [stop] if isinstance(stop, str) else stop
    for name in ("max_completion_tokens", "max_tokens"):
        if body.get(name) is not None:
            if body[name] == 0:  # for Ollama, 0 is no limit
                raise BackendRefused(f"{name} must be at least 1", param=name)
            options["num_predict"] = body[name]
            break
    return options | (own or {})


def _format(body: JSON) -> Any:
    wanted = body.get("response_format")
    if wanted is None:
        return body.get("format")
    kind = wanted.get("type") if isinstance(wanted, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return "json"
    if kind == "json_schema":
        schema = (wanted.get("json_schema") or {}).get("schema")
        if not isinstance(schema, dict):
            raise BackendRefused("response_format.json_schema.schema is missing", param="response_format")
        return schema
    raise BackendRefused("response_format.type must be text, json_object or json_schema", param="response_format")


def _effort(body: JSON) -> bool | str | None:
    reasoning = body.get("reasoning")
    effort = body.get("reasoning_effort") or (reasoning.get("effort") if isinstance(reasoning, dict) else None)
    if effort is None:
        return None
    if effort not in EFFORTS:
        raise BackendRefused(f"reasoning_effort must be one of {', '.join(EFFORTS)}", param="reasoning_effort")
    return EFFORTS[effort]


def _tools(body: JSON) -> list[JSON]:
    tools, choice = body.get("tools") or [], body.get("tool_choice")
    if choice == "none":
        return []
    for tool in tools:
        if not isinstance(tool, dict) or tool.get("type") != "function":
            raise BackendRefused("Ollama's models call tools of the type function only", param="tools")
    return list(tools)


# Messages


def _messages(messages: Any, details: ModelDetails) -> list[JSON]:
    if not isinstance(messages, list) or not messages or not all(isinstance(one, dict) for one in messages):
        raise BackendRefused("messages must be a list of at least one message", param="messages")
    called: dict[str, str] = {}
    return [_message(one, f"messages.{number}", called, details) for number, one in enumerate(messages)]


def _message(message: JSON, where: str, called: dict[str, str], details: ModelDetails) -> JSON:
    """Return a message in Ollama's form. `called` collects the names of the called tools, by the id of the call."""
    role = "system" if message.get("role") == "developer" else message.get("role")
    text, images = _content(message.get("content"), f"{where}.content")
    if images and details.lacks(VISION):
        raise BackendRefused("this model does not accept images", param=f"{where}.content")
    out: JSON = {"role": role, "content": text}
    if images:
        out["images"] = images
    thinking = message.get("reasoning_content") or message.get("reasoning")
    if isinstance(thinking, str):
        out["thinking"] = thinking
    if message.get("tool_calls"):
        out["tool_calls"] = [_tool_call(call, f"{where}.tool_calls", called) for call in message["tool_calls"]]
    if role == "tool":
        call = str(message.get("tool_call_id") or "")
        out["tool_call_id"] = call
        name = message.get("name") or called.get(call)
        if name:
            out["tool_name"] = name
    return out


def _content(content: Any, where: str) -> tuple[str, list[str]]:
    """Return the text, and the images as base64."""
    if content is None or isinstance(content, str):
        return content or "", []
    if not isinstance(content, list):
        raise BackendRefused("content must be text or a list of parts", param=where)
    texts: list[str] = []
    images: list[str] = []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("text", "refusal"):
            texts.append(str(part.get(kind) or ""))
        elif kind == "image_url":
            images.append(_image(part.get("image_url"), f"{where}.{number}.image_url"))
        else:
            raise BackendRefused("this backend takes parts of the types text and image_url", param=f"{where}.{number}")
    return "\n".join(texts), images


def _image(image: Any, where: str) -> str:
    url = image.get("url") if isinstance(image, dict) else image
    found = BASE64_IMAGE.match(url) if isinstance(url, str) else None
    if found is None or not isinstance(url, str):
        raise BackendRefused("this backend accepts images only as data URLs: data:image/png;base64,…", param=where)
    return url[found.end() :]


def _tool_call(call: Any, where: str, called: dict[str, str]) -> JSON:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise BackendRefused("a tool call needs a function", param=where)
    out: JSON = {"function": {"name": function.get("name"), "arguments": _arguments(function.get("arguments"), where)}}
    if call.get("id"):
        out["id"] = call["id"]
        called[str(call["id"])] = str(function.get("name"))
    return out


def _arguments(arguments: Any, where: str) -> JSON:
    try:
        value = orjson.loads(arguments) if isinstance(arguments, str) and arguments else arguments or {}
    except orjson.JSONDecodeError as error:
        raise BackendRefused(f"a tool call's arguments are not JSON: {error}", param=where) from error
    if not isinstance(value, dict):
        raise BackendRefused("a tool call's arguments must be a JSON object", param=where)
    return value


# Prompts and inputs


def _prompt(prompt: Any) -> str:
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if isinstance(prompt, list):
        raise BackendRefused("Ollama accepts one prompt per request, as text", param="prompt")
    if not isinstance(prompt, str):
        raise BackendRefused("Ollama takes the prompt as text, not as token ids", param="prompt")
    if not prompt:  # an empty prompt would only load the model
        raise BackendRefused("the prompt is empty", param="prompt")
    return prompt


def _texts(given: Any) -> list[str]:
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not texts:
        raise BackendRefused("input must be a text or a list of texts", param="input")
    if not all(isinstance(text, str) for text in texts):
        raise BackendRefused("Ollama takes input as text, not as token ids", param="input")
    if not all(texts):
        raise BackendRefused("input must not contain an empty text", param="input")
    return texts
