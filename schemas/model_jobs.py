"""`POST /v1/models/pull`, `load` and `unload`: what a worker is told to do with the models beside it."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from schemas.openai.chat import ServiceTier


class ModelJobRequest(BaseModel):
    """A job about a model, for a worker that manages models."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: Annotated[str, Field(min_length=1, max_length=256)]
    """The server's own name for it: `llama3.2:1b`."""
    worker: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    """Whose server; may be left out where only one worker manages models."""
    stream: bool | None = None
    service_tier: ServiceTier | None = None
    keep_alive: int | str | None = None
    """How long a loaded model stays: seconds, or text such as `10m`; negative: for good."""
