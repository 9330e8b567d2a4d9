"""Pulling, loading and unloading models, as callers see it: pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import orjson

from schemas.frames import Progress
from workers.adapter_kit.request_fields import parse_json_object
from workers.backends.base import BackendRefused, Chunk, Finish, Output, Task
from workers.backends.ollama.requests import unloads

JSON = dict[str, Any]

PULL, LOAD, UNLOAD = "/v1/models/pull", "/v1/models/load", "/v1/models/unload"
OBJECTS = {PULL: "model.pull", LOAD: "model.load", UNLOAD: "model.unload"}
SUCCESS = "success"


@dataclass(frozen=True, slots=True)
class ModelJob:
    """One such request."""

    endpoint: str
    model: str
    stream: bool
    keep_alive: Any = None

    @classmethod
    def of(cls, task: Task) -> ModelJob:
        """Raises BackendRefused when the task is none."""
        endpoint = task.endpoint
        if endpoint not in OBJECTS:
            raise BackendRefused(f"this backend does not serve {endpoint}")
        fields = parse_json_object(task.body)
        model, keep_alive = fields.get("model"), fields.get("keep_alive")
        if not isinstance(model, str) or not model:
            raise BackendRefused("name a model", param="model")
        if keep_alive is not None and (endpoint == PULL or unloads(keep_alive) != (endpoint == UNLOAD)):
            raise BackendRefused("keep_alive says how long a model that is loaded is to stay", param="keep_alive")
        return cls(endpoint, model, task.stream, keep_alive)

    def frame(self, **fields: Any) -> bytes:
        """What a caller who streams sees of it."""
        return b"data: %b\n\n" % orjson.dumps(self._object(fields))

    def end(self) -> tuple[Output, Output]:
        """The last of it: it is done."""
        if self.stream:
            return Chunk(self.frame(status=SUCCESS), 0), Finish(None, "text/event-stream")
        return Chunk(orjson.dumps(self._object({"status": SUCCESS})), 0), Finish()

    def _object(self, fields: JSON) -> JSON:
        return {"object": OBJECTS[self.endpoint], "model": self.model, **fields}


class PullProgress:
    """How far a pull is, over all its layers; it never goes back, though a layer's size shows only when its turn comes."""

    def __init__(self) -> None:
        self.done = False
        self._layers: dict[str, tuple[int, int]] = {}
        self._fraction = 0.0

    def read(self, line: JSON) -> tuple[JSON, Progress]:
        """One line of the pull, as the fields of a frame and as progress."""
        status = str(line.get("status") or "")
        self.done = self.done or status == SUCCESS
        total, completed = line.get("total"), line.get("completed")
        if isinstance(total, int) and total > 0:
            completed = completed if isinstance(completed, int) else 0
            self._layers[str(line.get("digest") or status)] = (completed, total)
            all_done, all_of = (sum(column) for column in zip(*self._layers.values(), strict=True))
            self._fraction = max(self._fraction, min(1.0, all_done / all_of))
        fraction = round(self._fraction, 4) if self._layers else None
        fields = {"status": status, "completed": completed, "total": total, "fraction": fraction}
        return fields, Progress(fraction=fraction, message=status)
