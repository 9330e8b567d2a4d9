"""Translates tools, and the choice among them, into chat's. Pure."""

from __future__ import annotations

import re
from typing import Any

from schemas.errors import InvalidRequest

JSON = dict[str, Any]

SERVER_TOOLS = re.compile(r"(?:web_search|web_fetch|code_execution|tool_search_tool_\w+?|advisor)_\d{8}|mcp_toolset")
"""Types of tools that Anthropic runs."""
CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def tool_fields(tools: list[JSON] | None, choice: JSON | None, *, refuse_server_tools: bool) -> JSON:
    """Return chat's fields about tools. Tools that Anthropic runs are left out or refused. Raises InvalidRequest."""
    offered = [
        _tool(tool, f"tools.{number}")
        for number, tool in enumerate(tools or ())
        if refuse_server_tools or not _is_server_tool(tool)
    ]
    fields: JSON = {"tools": offered} if offered else {}
    return fields | _choice(choice, [tool["function"]["name"] for tool in offered])


def _is_server_tool(tool: JSON) -> bool:
    kind = tool.get("type")
    return isinstance(kind, str) and SERVER_TOOLS.fullmatch(kind) is not None


def _tool(tool: JSON, param: str) -> JSON:
    kind = tool.get("type")
    if kind not in (None, "custom"):
        raise InvalidRequest(
            f"Tools of type '{str(kind)[:100]}' are known to Anthropic's models alone. "
            f"Send the tool as a custom one, with its 'input_schema': '{param}.type'",
            param=f"{param}.type",
        )
    name, schema = tool.get("name"), tool.get("input_schema")
    if not isinstance(name, str) or not name:
        raise InvalidRequest(f"A tool needs a name: '{param}.name'", param=f"{param}.name")
    if not isinstance(schema, dict):
        raise InvalidRequest(f"A tool needs a JSON schema: '{param}.input_schema'", param=f"{param}.input_schema")
    function: JSON = {"name": name, "parameters": schema}
    function |= {field: tool[field] for field in ("description", "strict") if tool.get(field) is not None}
    return {"type": "function", "function": function}


def _choice(choice: JSON | None, names: list[str]) -> JSON:
    if choice is None:
        return {}
    kind = choice.get("type")
    if kind != "tool" and kind not in CHOICES:
        raise InvalidRequest("'tool_choice.type' must be auto, any, tool or none.", param="tool_choice.type")
    if kind == "tool" and choice.get("name") not in names:
        raise InvalidRequest(
            f"'{str(choice.get('name'))[:100]}' is not among the request's tools: 'tool_choice.name'",
            param="tool_choice.name",
        )
    if kind == "any" and not names:
        raise InvalidRequest("'tool_choice' is 'any', but there are no tools to choose from.", param="tool_choice")
    if not names:
        return {}
    fields: JSON = {
        "tool_choice": {"type": "function", "function": {"name": choice["name"]}} if kind == "tool" else CHOICES[kind]
    }
    if choice.get("disable_parallel_tool_use") is True:
        fields["parallel_tool_calls"] = False
    return fields
