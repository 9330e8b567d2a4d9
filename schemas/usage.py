"""Define the usage events: what one finished run of a job used, for the ledger.

Wire form of a batch of events: lines of JSON. The first line is the list of the fields' names, each further line holds one
event's values in that order. A reader fills missing fields with their defaults and ignores unknown ones.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

Text = Annotated[str, StringConstraints(max_length=512, pattern=r"^[^\x00]*$")]
"""PostgreSQL stores no NUL."""
MAX_COUNT = 2**40
"""A tebibyte, a trillion tokens, twelve days of microseconds: eight million events of this size add up to 64 bits."""
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]


class MediaUsage(BaseModel):
    """What a job made or read besides tokens."""

    model_config = ConfigDict(frozen=True)

    images: int = 0
    image_size: str = ""
    """`1024x1024`, as requested; empty: the model's own size."""
    audio_s: float = 0.0
    """Seconds of sound that were made or heard."""
    characters: int = 0
    """Characters of text that were spoken."""


class UsageEvent(BaseModel):
    """The usage of one finished run of a job. (job, run) is unique."""

    model_config = ConfigDict(frozen=True)

    job: Text
    run: Count
    finished_ms: int = Field(ge=0, lt=2**48)
    """Unix milliseconds."""
    team: Text
    """The owner."""
    key: Text = ""
    """Id of the API key; empty for the bootstrap key."""
    person: Text = ""
    """Id of the person who signed in, or who made the key; empty: nobody in particular."""
    model: Text
    public_model: Text
    """The name that the caller used, which may be an alias."""
    worker: Text = ""
    """The last worker that ran the job; empty: none did."""
    endpoint: Text
    capability: Text
    lane: Text
    status: Text
    """`completed`, `failed`, `cancelled` or `expired`."""
    error: Text = ""
    """The error's code, or its type where it has no code."""
    durable: bool = False
    """Whether the job was durable; False: its caller waited on a connection."""
    batch: bool = False
    """Whether the job was a line of a batch."""
    attempts: Count = 0
    input_tokens: Count = 0
    """Cached tokens included."""
    output_tokens: Count = 0
    """Reasoning tokens included."""
    cached_tokens: Count = 0
    reasoning_tokens: Count = 0
    images: Count = 0
    image_size: Text = ""
    audio_ms: Count = 0
    characters: Count = 0
    bytes_in: Count = 0
    bytes_out: Count = 0
    queue_us: Count = 0
    """Microseconds from acceptance to the start of the first attempt, or to the end of a job that never started."""
    run_us: Count = 0
    """Microseconds from the start of an attempt to the end: the first attempt of a direct job, the last one of a durable job."""
    slot_us: Count = 0
    """Microseconds for which the job is known to have taken a slot of a worker."""


FIELDS = tuple(UsageEvent.model_fields)
SUMS = (
    "input_tokens",
    "output_tokens",
    "cached_tokens",
    "reasoning_tokens",
    "images",
    "audio_ms",
    "characters",
    "bytes_in",
    "bytes_out",
    "queue_us",
    "run_us",
    "slot_us",
)
"""The fields that the ledger adds up."""
HOURLY_DIMENSIONS = (
    "team",
    "key",
    "person",
    "model",
    "public_model",
    "endpoint",
    "capability",
    "lane",
    "status",
    "durable",
    "batch",
    "image_size",
)
"""The fields by which hourly sums are stored."""
DIMENSIONS = (*HOURLY_DIMENSIONS, "worker", "error")
"""The fields by which usage can be grouped and filtered."""
