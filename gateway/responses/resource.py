"""The response object in OpenAI's form."""

from __future__ import annotations

from typing import Any

from schemas.errors import ErrorInfo
from schemas.jobs import JobStatus
from schemas.openai.responses import ResponsesRequest

JSON = dict[str, Any]

RESPONSE_STATUSES = {
    JobStatus.QUEUED: "queued",
    JobStatus.IN_PROGRESS: "in_progress",
    JobStatus.COMPLETED: "completed",
    JobStatus.FAILED: "failed",
    JobStatus.CANCELLED: "cancelled",
    JobStatus.EXPIRED: "failed",
}
"""OpenAI's status of a response by the job's status. OpenAI has none for an expired job."""
SERVICE_TIERS = {"priority": "priority", "fast": "priority", "flex": "flex"}


def response_id_of(job: str) -> str:
    """Return the id of a job's response."""
    return "resp_" + job.removeprefix("job_")


def initial_response(request: ResponsesRequest, job: str, created_at: int) -> JSON:
    """Return the response before any output, with the fields of the request."""
    text, reasoning = request.text, request.reasoning
    return {
        "id": response_id_of(job),
        "object": "response",
        "created_at": created_at,
        "status": "queued" if request.background else "in_progress",
        "background": bool(request.background),
        "completed_at": None,
        "error": None,
        "incomplete_details": None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "max_tool_calls": request.max_tool_calls,
        "model": request.model,
        "output": [],
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": request.previous_response_id,
        "prompt_cache_key": request.prompt_cache_key,
        "reasoning": {
            "effort": reasoning.effort if reasoning else None,
            "summary": reasoning.summary if reasoning else None,
        },
        "safety_identifier": request.safety_identifier,
        "service_tier": SERVICE_TIERS.get(request.service_tier or "", "default"),
        "store": request.stored,
        "temperature": request.temperature,
        "text": {
            "format": (text.format if text else None) or {"type": "text"},
            **({"verbosity": text.verbosity} if text and text.verbosity else {}),
        },
        "tool_choice": request.tool_choice or "auto",
        "tools": [_tool(tool) for tool in request.tools or ()],
        "top_logprobs": request.top_logprobs or 0,
        "top_p": request.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": request.user,
        "metadata": request.metadata or {},
    }


def _tool(tool: JSON) -> JSON:
    """Return a tool with all fields that strict clients expect."""
    return {"description": None, "parameters": None, "strict": None, **tool}


def usage(chat: JSON | None) -> JSON | None:
    """Translate chat's token usage into that of the Responses API."""
    if chat is None:
        return None
    prompt_tokens, created = _count(chat, "prompt_tokens"), _count(chat, "completion_tokens")
    return {
        "input_tokens": prompt_tokens,
        "input_tokens_details": {
            "cached_tokens": _count(chat.get("prompt_tokens_details"), "cached_tokens"),
            "cache_write_tokens": 0,
        },
        "output_tokens": created,
        "output_tokens_details": {
            "reasoning_tokens": _count(chat.get("completion_tokens_details"), "reasoning_tokens")
        },
        "total_tokens": _count(chat, "total_tokens") or prompt_tokens + created,
    }


def _count(counts: Any, name: str) -> int:
    value = counts.get(name) if isinstance(counts, dict) else None
    return value if isinstance(value, int) else 0


def error_object(info: ErrorInfo | None) -> JSON:
    """Return a response's `error` with one of OpenAI's codes."""
    if info is None:
        return {"code": "server_error", "message": "The response failed. Create it again."}
    code = "server_error"
    if info.status == 429:
        code = "rate_limit_exceeded"
    elif 400 <= info.status < 500:
        code = "invalid_prompt"
    return {"code": code, "message": info.public_message}


def unanswered_response(initial: JSON, status: JobStatus, error: ErrorInfo | None) -> JSON:
    """Return the final response of a job that ended without output."""
    outcome = RESPONSE_STATUSES[status]
    return initial | {"status": outcome, "error": error_object(error) if outcome == "failed" else None}
