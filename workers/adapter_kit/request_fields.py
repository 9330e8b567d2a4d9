"""Fields that adapters read from a request's body. Pure."""

from __future__ import annotations

from typing import Any

import orjson

from workers.backends.base import BackendRefused

JSON = dict[str, Any]


def parse_json_object(data: bytes) -> JSON:
    """Return the body. Raises BackendRefused when it is not a JSON object."""
    try:
        body = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise BackendRefused(f"the request is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise BackendRefused("the request is not a JSON object")
    return body


def requested_choices(body: JSON) -> int:
    """Return `n`; 1 where it is missing."""
    n = body.get("n")
    return n if isinstance(n, int) and n > 0 else 1


def prompt_count(body: JSON) -> int:
    """Return how many prompts a text completion has; a list of token ids is one prompt."""
    prompt = body.get("prompt")
    return len(prompt) if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else 1


def stream_options(body: JSON) -> JSON:
    """Return the caller's `stream_options`; an empty object where they are missing."""
    options = body.get("stream_options")
    return options if isinstance(options, dict) else {}


def wants_usage(body: JSON) -> bool:
    """Return whether a stream must end with a usage chunk."""
    return stream_options(body).get("include_usage") is True


def wants_continuous_usage(body: JSON) -> bool:
    """Return whether each event of a stream must carry the usage so far: vLLM's and SGLang's option."""
    return wants_usage(body) and stream_options(body).get("continuous_usage_stats") is True
