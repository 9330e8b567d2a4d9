"""From a request for a response to a chat request."""

from __future__ import annotations

from typing import Any

from gateway.responses.input_items import to_messages
from schemas.errors import InvalidRequest
from schemas.openai.responses import UNSUPPORTED_FIELDS, ResponsesRequest

JSON = dict[str, Any]

LOGPROBS = "message.output_text.logprobs"
TOOL_CHOICES = ("none", "auto", "required")
ADDITIONAL_TOOLS = "additional_tools"
"""An input item that brings tools along."""
OPENAI_ITEM_TYPES = frozenset({
    "web_search_call", "file_search_call", "code_interpreter_call", "image_generation_call", "mcp_call", "mcp_list_tools",
    "mcp_approval_request", "mcp_approval_response", "tool_search_call", "tool_search_output", "ghost_snapshot",
})  # fmt: skip
"""Items of tools that OpenAI runs, in a conversation that was begun there; and Codex's own notes."""


def reject_unsupported(request: ResponsesRequest) -> None:
    """Raises InvalidRequest, naming the first field that cannot be honoured here."""
    for name, value in (request.model_extra or {}).items():
        if value is not None and name in UNSUPPORTED_FIELDS:
            raise InvalidRequest(f"'{name}' is not supported: {UNSUPPORTED_FIELDS[name]}", param=name)
    if request.truncation == "auto":
        raise InvalidRequest(
            "'truncation' can only be 'disabled': a conversation is not shortened here", param="truncation"
        )
    if request.background and not request.stored:
        raise InvalidRequest("a background response is stored: 'store' cannot be false", param="store")


def without_openai_tools(request: ResponsesRequest) -> ResponsesRequest:
    """Return the request with its functions alone: other tools run at OpenAI, and a model can do without them.

    Agents send them with every request. The response's `tools` says which ones the model was offered.
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
    """The messages so far: what came before, and this request's input; instructions are not among them."""
    return [*previous, *to_messages(request.input)]


def chat_body(request: ResponsesRequest, messages: list[JSON]) -> JSON:
    """The chat request: streamed always, with usage. Raises InvalidRequest."""
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
        # Of the two names for it, the one that every local server knows.
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
            f"text, json_object or json_schema, not '{str(kind)[:100]}': 'text.format.type'", param="text.format.type"
        )
    if not isinstance(wanted.get("name"), str) or not isinstance(wanted.get("schema"), dict):
        missing = "name" if not isinstance(wanted.get("name"), str) else "schema"
        raise InvalidRequest(
            f"a format by a schema has a name and the schema: '{missing}'", param=f"text.format.{missing}"
        )
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
            f"tools of type '{str(kind)[:100]}' are not run here; only functions, which the caller runs",
            param=f"{param}.type",
        )
    if not isinstance(tool.get("name"), str) or not tool["name"]:
        raise InvalidRequest(f"a function has a name: '{param}.name'", param=f"{param}.name")
    names = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {n: tool[n] for n in names if tool.get(n) is not None}}


def _choice(choice: str | JSON | None, tools: list[JSON]) -> tuple[str | JSON | None, list[JSON]]:
    """Chat's `tool_choice`, and the tools that may be chosen from. Raises InvalidRequest."""
    if choice is None or choice == "auto":
        return choice, tools
    if isinstance(choice, str):
        if choice not in TOOL_CHOICES:
            raise InvalidRequest(f"one of {', '.join(TOOL_CHOICES)}, or a function: 'tool_choice'", param="tool_choice")
        if choice == "required" and not tools:
            raise InvalidRequest("there are no tools to choose from: 'tool_choice'", param="tool_choice")
        return choice, tools
    kind = choice.get("type")
    if kind == "function":
        _require_tool(choice.get("name"), tools, "tool_choice.name")
        return {"type": "function", "function": {"name": choice["name"]}}, tools
    if kind == "allowed_tools":
        return _allowed_tools(choice, tools)
    raise InvalidRequest(f"the tool choice '{str(kind)[:100]}' is not supported", param="tool_choice.type")


def _allowed_tools(choice: JSON, tools: list[JSON]) -> tuple[str, list[JSON]]:
    mode, allowed = choice.get("mode"), choice.get("tools")
    if mode not in ("auto", "required"):
        raise InvalidRequest("auto or required: 'tool_choice.mode'", param="tool_choice.mode")
    if not isinstance(allowed, list) or not allowed or not all(isinstance(tool, dict) for tool in allowed):
        raise InvalidRequest("the functions that may be called: 'tool_choice.tools'", param="tool_choice.tools")
    for number, tool in enumerate(allowed):
        _require_tool(tool.get("name"), tools, f"tool_choice.tools.{number}.name")
    names = {tool["name"] for tool in allowed}
    return mode, [tool for tool in tools if tool["function"]["name"] in names]


def _require_tool(name: Any, tools: list[JSON], param: str) -> None:
    if name not in [tool["function"]["name"] for tool in tools]:
        raise InvalidRequest(f"'{str(name)[:100]}' is none of the tools: '{param}'", param=param)
