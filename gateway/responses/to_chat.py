"""Translates a request for a response into a chat request."""

from __future__ import annotations

from typing import Any

from gateway.responses.input_items import to_messages
from schemas.errors import InvalidRequest
from schemas.openai.responses import UNSUPPORTED_FIELDS, ResponsesRequest

JSON = dict[str, Any]

LOGPROBS = "message.output_text.logprobs"
TOOL_CHOICES = ("none", "auto", "required")
ADDITIONAL_TOOLS = "additional_tools"
"""The type of an input item that contains tools."""
OPENAI_ITEM_TYPES = frozenset({
    "web_search_call", "file_search_call", "code_interpreter_call", "image_generation_call", "mcp_call", "mcp_list_tools",
    "mcp_approval_request", "mcp_approval_response", "tool_search_call", "tool_search_output", "ghost_snapshot",
})  # fmt: skip
"""The types of items of tools that OpenAI runs, and of Codex's own notes. Conversations begun elsewhere contain them."""


def reject_unsupported(request: ResponsesRequest) -> None:
    """Check for unsupported fields. Raises InvalidRequest, naming the first one."""
    for name, value in (request.model_extra or {}).items():
        if value is not None and name in UNSUPPORTED_FIELDS:
            raise InvalidRequest(f"'{name}' is not supported: {UNSUPPORTED_FIELDS[name]}", param=name)
    if request.truncation == "auto":
        raise InvalidRequest(
            "'truncation' must be 'disabled': Nexus does not shorten conversations.", param="truncation"
        )
    if request.background and not request.stored:
        raise InvalidRequest("A background response must be stored. Remove 'store' or set it to true.", param="store")


def without_openai_tools(request: ResponsesRequest) -> ResponsesRequest:
    """Return the request with only its function tools: other tools run at OpenAI, and models can do without them.

    Agents send such tools with every request. The response's `tools` lists those that the model was offered.
    """
    offered = list(request.tools or ())
    items = request.input
    if not isinstance(items, str):
        for item in items:
            if item.type == ADDITIONAL_TOOLS:
                more = (item.model_extra or {}).get("tools")
                offered += [tool for tool in more if isinstance(tool, dict)] if isinstance(more, list) else []
        items = [item for item in items if item.type != ADDITIONAL_TOOLS and item.type not in OPENAI_ITEM_TYPES]
    tools = [tool for tool in offered if tool.get("type") == "function"]
    if items == request.input and tools == (request.tools or []):
        return request
    return request.model_copy(update={"tools": tools, "input": items})


def conversation(request: ResponsesRequest, previous: list[JSON]) -> list[JSON]:
    """Return the conversation's messages: the earlier ones and this request's input, without instructions."""
    return [*previous, *to_messages(request.input)]


def chat_body(request: ResponsesRequest, messages: list[JSON]) -> JSON:
    """Return the chat request, always streamed and with usage. Raises InvalidRequest."""
    body: JSON = {name: value for name, value in (request.model_extra or {}).items() if value is not None}
    instructions = [{"role": "system", "content": request.instructions}] if request.instructions else []
    body |= {
        "model": request.model,
        "messages": [*instructions, *messages],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    reasoning, text = request.reasoning, request.text
    optional = {
        # Every local server knows `max_tokens`, unlike `max_completion_tokens`.
        "max_tokens": request.max_output_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "user": request.user,
        "service_tier": "priority" if request.service_tier == "fast" else request.service_tier,
        "reasoning_effort": reasoning.effort if reasoning else None,
        "verbosity": text.verbosity if text else None,
        "response_format": _format(text.format) if text and text.format else None,
    }
    body |= {name: value for name, value in optional.items() if value is not None}
    return body | _logprobs(request) | _tools(request)


def _logprobs(request: ResponsesRequest) -> JSON:
    if not (request.top_logprobs or LOGPROBS in (request.include or ())):
        return {}
    return {"logprobs": True, **({"top_logprobs": request.top_logprobs} if request.top_logprobs else {})}


def _format(wanted: JSON) -> JSON | None:
    kind = wanted.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "json_object"}
    if kind != "json_schema":
        raise InvalidRequest(
            f"'text.format.type' must be text, json_object or json_schema, not '{str(kind)[:100]}'.",
            param="text.format.type",
        )
    if not isinstance(wanted.get("name"), str) or not isinstance(wanted.get("schema"), dict):
        missing = "name" if not isinstance(wanted.get("name"), str) else "schema"
        raise InvalidRequest(f"A format of type json_schema needs '{missing}'.", param=f"text.format.{missing}")
    names = ("name", "schema", "strict", "description")
    return {"type": "json_schema", "json_schema": {n: wanted[n] for n in names if wanted.get(n) is not None}}


def _tools(request: ResponsesRequest) -> JSON:
    tools = [_tool(tool, f"tools.{number}") for number, tool in enumerate(request.tools or ())]
    choice, tools = _choice(request.tool_choice, tools)
    body: JSON = {}
    if tools:
        body["tools"] = tools
        if request.parallel_tool_calls is not None:
            body["parallel_tool_calls"] = request.parallel_tool_calls
        if choice is not None:
            body["tool_choice"] = choice
    return body


def _tool(tool: JSON, param: str) -> JSON:
    kind = tool.get("type")
    if kind != "function":
        raise InvalidRequest(
            f"Tools of type '{str(kind)[:100]}' are not supported. Use function tools, which the caller runs.",
            param=f"{param}.type",
        )
    if not isinstance(tool.get("name"), str) or not tool["name"]:
        raise InvalidRequest(f"A function needs a name: '{param}.name'.", param=f"{param}.name")
    names = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {n: tool[n] for n in names if tool.get(n) is not None}}


def _choice(choice: str | JSON | None, tools: list[JSON]) -> tuple[str | JSON | None, list[JSON]]:
    """Return chat's `tool_choice` and the tools to choose from. Raises InvalidRequest."""
    if choice is None or choice == "auto":
        return choice, tools
    if isinstance(choice, str):
        if choice not in TOOL_CHOICES:
            raise InvalidRequest(
                f"'tool_choice' must be one of {', '.join(TOOL_CHOICES)}, or a function.", param="tool_choice"
            )
        if choice == "required" and not tools:
            raise InvalidRequest(
                "'tool_choice' is 'required', but there are no tools to choose from.", param="tool_choice"
            )
        return choice, tools
    kind = choice.get("type")
    if kind == "function":
        _require_tool(choice.get("name"), tools, "tool_choice.name")
        return {"type": "function", "function": {"name": choice["name"]}}, tools
    if kind == "allowed_tools":
        return _allowed_tools(choice, tools)
    raise InvalidRequest(
        f"Tool choices of type '{str(kind)[:100]}' are not supported. Use function or allowed_tools.",
        param="tool_choice.type",
    )


def _allowed_tools(choice: JSON, tools: list[JSON]) -> tuple[str, list[JSON]]:
    mode, allowed = choice.get("mode"), choice.get("tools")
    if mode not in ("auto", "required"):
        raise InvalidRequest("'tool_choice.mode' must be auto or required.", param="tool_choice.mode")
    if not isinstance(allowed, list) or not allowed or not all(isinstance(tool, dict) for tool in allowed):
        raise InvalidRequest(
            "'tool_choice.tools' must list the functions that the model may call.", param="tool_choice.tools"
        )
    for number, tool in enumerate(allowed):
        _require_tool(tool.get("name"), tools, f"tool_choice.tools.{number}.name")
    names = {tool["name"] for tool in allowed}
    return mode, [tool for tool in tools if tool["function"]["name"] in names]


def _require_tool(name: Any, tools: list[JSON], param: str) -> None:
    if name not in [tool["function"]["name"] for tool in tools]:
        raise InvalidRequest(f"'{str(name)[:100]}' is not among the request's tools: '{param}'.", param=param)
