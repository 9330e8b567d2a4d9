"""Jobs that pull, load and unload models, as callers send them and read their results: pure.

The endpoints are `/v1/models/pull`, `/v1/models/load` and `/v1/models/unload`. An adapter with `manages_models` runs them as tasks of the
capability `models`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import orjson

from workers.adapter_kit.request_fields import parse_json_object
from workers.backends.base import BackendRefused, Chunk, Finish, Output, Task

JSON = dict[str, Any]

PULL, LOAD, UNLOAD = "/v1/models/pull", "/v1/models/load", "/v1/models/unload"
OBJECTS = {PULL: "model.pull", LOAD: "model.load", UNLOAD: "model.unload"}
SUCCESS = "success"
ZERO_DURATION = re.compile(r"0+(ns|us|ms|s|m|h)?")


@dataclass(frozen=True, slots=True)
class ModelJob:
    """A request to pull, load or unload one model."""

    endpoint: str
    model: str
    stream: bool
    keep_alive: Any = None
    """How long a loaded model stays, in Ollama's form; None where the request does not say."""

    @classmethod
    def of(cls, task: Task) -> ModelJob:
        """Parse a task. Raises BackendRefused for another endpoint, a missing model, or a `keep_alive` that contradicts the endpoint."""
        endpoint = task.endpoint
        if endpoint not in OBJECTS:
            raise BackendRefused(f"this backend does not serve {endpoint}")
        fields = parse_json_object(task.body)
        model, keep_alive = fields.get("model"), fields.get("keep_alive")
        if not isinstance(model, str) or not model:
            raise BackendRefused("model is missing; name the model to manage", param="model")
        if keep_alive is not None and (endpoint == PULL or unloads(keep_alive) != (endpoint == UNLOAD)):
            raise BackendRefused(
                "keep_alive contradicts the endpoint: send it with load, as the time for which the model stays in memory, or as 0 with unload",
                param="keep_alive",
            )
        return cls(endpoint, model, task.stream, keep_alive)

    def frame(self, **fields: Any) -> bytes:
        """Return one SSE event about the job."""
        return b"data: %b\n\n" % orjson.dumps(self._object(fields))

    def end(self) -> tuple[Output, Output]:
        """Return the outputs of a job that is complete."""
        if self.stream:
            return Chunk(self.frame(status=SUCCESS), 0), Finish(None, "text/event-stream")
        return Chunk(orjson.dumps(self._object({"status": SUCCESS})), 0), Finish()

    def _object(self, fields: JSON) -> JSON:
        return {"object": OBJECTS[self.endpoint], "model": self.model, **fields}


def unloads(keep_alive: Any) -> bool:
    """Return whether a `keep_alive` means that the model must not stay in memory."""
    if isinstance(keep_alive, str):
        return ZERO_DURATION.fullmatch(keep_alive) is not None
    return keep_alive is not None and keep_alive == 0
