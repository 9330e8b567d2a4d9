"""Make usage events. Those of direct jobs are made on the hot path, as plain tuples in the order of `schemas.usage.FIELDS`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import orjson
from pydantic import BaseModel, ValidationError

from schemas.jobs import Usage
from schemas.outcome import Outcome
from schemas.usage import FIELDS, MAX_COUNT, MediaUsage, UsageEvent

HEADER = orjson.dumps(FIELDS) + b"\n"
MAX_TEXT = 512

M = TypeVar("M", bound=BaseModel)
Values = tuple[Any, ...]
Details = tuple[int, int, int, int]


def token_counts(usage: Usage | None) -> Details:
    """Return input, output, cached and reasoning tokens, as the backend counted them."""
    if usage is None:
        return 0, 0, 0, 0
    extra = usage.__pydantic_extra__
    if not extra:
        return _count(usage.prompt_tokens), _count(usage.completion_tokens), 0, 0
    return (
        _count(usage.prompt_tokens),
        _count(usage.completion_tokens),
        _detail(extra.get("prompt_tokens_details"), "cached_tokens"),
        _detail(extra.get("completion_tokens_details"), "reasoning_tokens"),
    )


def _detail(details: Any, name: str) -> int:
    value = details.get(name) if isinstance(details, dict) else None
    return _count(value) if isinstance(value, int) else 0


def _count(value: int) -> int:
    return value if 0 <= value <= MAX_COUNT else 0


def text(value: str) -> str:
    """Return a text of a worker or a caller as the ledger stores it."""
    return value[:MAX_TEXT].replace("\0", "")


def media_values(media: MediaUsage | None) -> tuple[int, str, int, int]:
    """Return images, their size, milliseconds of audio, and characters."""
    if media is None:
        return 0, "", 0, 0
    seconds = media.audio_s if 0 <= media.audio_s <= MAX_COUNT / 1000 else 0.0
    return _count(media.images), text(media.image_size), round(1000 * seconds), _count(media.characters)


def event_of_outcome(outcome: Outcome, finished_ms: int, accepted_ms: int | None, person: str = "") -> Values:
    """Return the event of a durable job's run.

    `accepted_ms`: when the run began to wait, in Unix milliseconds; None: unknown. `person`: id of the person behind the key.
    """
    seconds = outcome.seconds or 0.0
    run_us = round(1e6 * seconds) if 0 <= seconds <= MAX_COUNT / 1e6 else 0
    waited_us = 0 if accepted_ms is None else max(0, 1000 * (finished_ms - accepted_ms) - run_us)
    error = outcome.error
    return (
        outcome.job,
        outcome.run,
        finished_ms,
        outcome.owner,
        outcome.key if outcome.key != person else "",
        person,
        outcome.model,
        text(outcome.public_model),
        text(outcome.worker),
        outcome.endpoint,
        outcome.capability.value,
        outcome.lane.value,
        outcome.status.value,
        text(error.code or error.type) if error is not None else "",
        True,
        bool(outcome.batch),
        _count(outcome.attempts),
        *token_counts(outcome.usage),
        *media_values(outcome.media),
        _count(outcome.input_size),
        _count(outcome.size),
        min(waited_us, MAX_COUNT),
        run_us,
        run_us,
    )


def encode_event(values: Values) -> bytes:
    """Return the event's line. Raises TypeError for text that is no Unicode."""
    return orjson.dumps(values) + b"\n"


def decode_events(data: bytes) -> Iterator[UsageEvent | ValueError]:
    """Yield the usage events of a batch, and an error for each that is malformed."""
    return decode_lines(data, UsageEvent)


def decode_lines(data: bytes, model: type[M]) -> Iterator[M | ValueError]:
    """Yield the events of a batch, and an error for each that is malformed."""
    names, *lines = data.splitlines() or [b"[]"]
    try:
        fields = orjson.loads(names)
        if not isinstance(fields, list) or not all(isinstance(name, str) for name in fields):
            raise ValueError("The first line of a batch must be a list of fields.")
    except ValueError as error:
        yield error
        return
    for line in lines:
        try:
            yield model.model_validate(dict(zip(fields, orjson.loads(line), strict=True)))
        except ValidationError as error:
            yield ValueError(f"{error.error_count()} fields are invalid, first {error.errors()[0]['loc']}")
        except (ValueError, TypeError) as error:
            yield ValueError(str(error))
