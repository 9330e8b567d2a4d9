"""Translates a request for a message into a chat request. Pure."""

from __future__ import annotations

from typing import Any

from gateway.dialects.anthropic.content import system_text
from gateway.dialects.anthropic.conversation import to_messages
from gateway.dialects.anthropic.tools import tool_fields
from schemas.anthropic.messages import UNSUPPORTED_FIELDS, MessagesInput, MessagesRequest, OutputConfig, ThinkingConfig
from schemas.errors import InvalidRequest

JSON = dict[str, Any]

EFFORTS = {"low": "low", "medium": "medium", "high": "high", "xhigh": "high", "max": "high"}
"""Chat's efforts: no local server knows one above `high`."""
NO_EFFORT = "none"
EFFORT_BY_BUDGET = ((4096, "low"), (16_384, "medium"))
"""The efforts of thinking budgets up to so many tokens; above them it is `high`."""
TIERS = {"auto": "auto", "standard_only": "default"}
"""Nexus's tiers for those of Anthropic."""


def chat_body(request: MessagesRequest, *, refuse_server_tools: bool) -> JSON:
    """Return the chat request. Raises InvalidRequest, naming what chat cannot express."""
    body: JSON = {name: value for name, value in (request.model_extra or {}).items() if value is not None}
    body |= prompt_fields(request, refuse_server_tools=refuse_server_tools)
    metadata, tier = request.metadata, request.service_tier
    optional = {
        "max_tokens": request.max_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "stop": request.stop_sequences or None,
        "user": metadata.user_id if metadata is not None else None,
        "service_tier": TIERS.get(tier, tier) if tier is not None else None,
    }
    body |= {name: value for name, value in optional.items() if value is not None}
    if request.stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return body


def prompt_fields(request: MessagesInput, *, refuse_server_tools: bool) -> JSON:
    """Return the fields of the chat request that make its prompt. Raises InvalidRequest."""
    for name, value in (request.model_extra or {}).items():
        if value is not None and name in UNSUPPORTED_FIELDS:
            raise InvalidRequest(f"'{name}' is not supported: {UNSUPPORTED_FIELDS[name]}.", param=name)
    system = system_text(request.system, "system") if request.system is not None else ""
    fields: JSON = {
        "model": request.model,
        "messages": to_messages(request.messages, system),
        **tool_fields(request.tools, request.tool_choice, refuse_server_tools=refuse_server_tools),
    }
    if (effort := _effort(request.thinking, request.output_config)) is not None:
        fields["reasoning_effort"] = effort
    if request.output_config is not None and request.output_config.format is not None:
        fields["response_format"] = _format(request.output_config.format)
    return fields


def _effort(thinking: ThinkingConfig | None, output: OutputConfig | None) -> str | None:
    """Return how much the model reasons; None: as it does by itself."""
    if thinking is not None and thinking.type == "disabled":
        return NO_EFFORT
    if output is not None and output.effort is not None:
        return EFFORTS[output.effort]
    if thinking is None or thinking.budget_tokens is None:
        return None
    budget = thinking.budget_tokens
    return next((effort for most, effort in EFFORT_BY_BUDGET if budget <= most), "high")


def _format(wanted: JSON) -> JSON:
    kind, schema = wanted.get("type"), wanted.get("schema")
    if kind != "json_schema":
        raise InvalidRequest("'output_config.format.type' must be json_schema.", param="output_config.format.type")
    if not isinstance(schema, dict):
        raise InvalidRequest(
            "A format needs a JSON schema: 'output_config.format.schema'", param="output_config.format.schema"
        )
    return {"type": "json_schema", "json_schema": {"name": "output", "schema": schema, "strict": True}}
