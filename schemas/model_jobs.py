"""Define `POST /v1/models/pull`, `load` and `unload`: jobs that manage the models of a worker's server."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from schemas.openai.chat import ServiceTier


class ModelJobRequest(BaseModel):
    """A request to manage a model on a worker's server."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: Annotated[str, Field(min_length=1, max_length=256)]
    """The server's name for the model: `llama3.2:1b`."""
    worker: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    """The worker. It may be left out when only one worker manages models."""
    stream: bool | None = None
    service_tier: ServiceTier | None = None
    keep_alive: int | str | None = None
    """How long a loaded model stays: seconds, or text such as `10m`. A negative number means forever."""
