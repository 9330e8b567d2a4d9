"""Lists models in Anthropic's form. Pure."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from gateway.model_catalog import CatalogModel
from schemas.jobs import Capability

JSON = dict[str, Any]


def rfc3339(seconds: int) -> str:
    """Return a time in Unix seconds in the form of RFC 3339."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def model_info(model: CatalogModel) -> JSON:
    """Return one model."""
    return {
        "type": "model",
        "id": model.name,
        "display_name": model.name,
        "created_at": rfc3339(model.created),
        "lifecycle": "active" if model.live else "deprecated",
        "max_input_tokens": model.context_length,
        "max_tokens": model.context_length,
    }


def answers_messages(model: CatalogModel) -> bool:
    """Return whether a model answers `/v1/messages`."""
    return Capability.CHAT in model.capabilities
