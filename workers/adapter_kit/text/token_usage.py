"""Token counts of an answer, in every place and under every name that servers give them. Pure."""

from __future__ import annotations

from typing import Any

JSON = dict[str, Any]

COUNTS = ("prompt_tokens", "completion_tokens", "total_tokens")
OTHER_NAMES = {"prompt_tokens": "input_tokens", "completion_tokens": "output_tokens"}
"""Anthropic's names, which some gateways pass on."""


def take_usage(holder: JSON) -> JSON | None:
    """Remove the usage from an event (its own, or Groq's in `x_groq`) or from a choice, where Moonshot puts it; return it."""
    usage = holder.pop("usage", None)
    if not isinstance(usage, dict) or not usage:
        groq = holder.get("x_groq")
        usage = groq.get("usage") if isinstance(groq, dict) else None
    return standard_usage(usage) if isinstance(usage, dict) and usage else None


def standard_usage(usage: JSON) -> JSON:
    """Return the usage with OpenAI's three counts as whole numbers; its other fields stay."""
    if all(type(usage.get(name)) is int for name in COUNTS):
        return usage
    counted = {name: _read_count(usage, name) for name in COUNTS}
    if not counted["total_tokens"]:
        counted["total_tokens"] = counted["prompt_tokens"] + counted["completion_tokens"]
    return usage | counted


def final_usage(usages: list[JSON]) -> JSON:
    """Return the last usage that counts anything: some servers end with zeros."""
    return next((usage for usage in reversed(usages) if usage["total_tokens"]), usages[-1])


def _read_count(usage: JSON, name: str) -> int:
    value = usage.get(name)
    if value is None and name in OTHER_NAMES:
        value = usage.get(OTHER_NAMES[name])
    try:
        return max(0, int(value or 0))
    except (TypeError, ValueError, OverflowError):
        return 0
