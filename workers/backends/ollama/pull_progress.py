"""The progress of a pull, read from the lines of Ollama's `/api/pull`: pure."""

from __future__ import annotations

from typing import Any

from schemas.frames import Progress
from workers.adapter_kit.model_jobs import SUCCESS

JSON = dict[str, Any]


class PullProgress:
    """Progress over all layers of a model.

    The fraction never decreases, although the size of a layer is known only when its download begins.
    """

    def __init__(self) -> None:
        self.done = False
        self._layers: dict[str, tuple[int, int]] = {}
        self._fraction = 0.0

    def read(self, line: JSON) -> tuple[JSON, Progress]:
        """Return the fields of an event and the progress that one line of the pull reports."""
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
