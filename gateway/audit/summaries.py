"""Sum equal events up by minute, so that the log can keep what anybody may cause: the first is written at once, the others as a sum.

Each source has at most one sum a minute, and the number of sources is bounded; those beyond the bound are summed up together.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")

WINDOW_S = 60.0


class _Source(Generic[T]):
    __slots__ = ("count", "event", "until")

    def __init__(self, event: T, until: float) -> None:
        self.event = event
        self.until = until
        self.count = 0
        """Events of this window that are not written."""


class Summaries(Generic[T]):
    """Passes events on, with counts. Its owner calls `write_due` from time to time, and `write_all` at the end."""

    def __init__(self, write: Callable[[T, int], None], clock: Callable[[], float], *, max_sources: int) -> None:
        """`write` receives an event and how many there were. `clock`: monotonic seconds."""
        self._write = write
        self._clock = clock
        self._max_sources = max_sources
        self._sources: dict[Hashable, _Source[T]] = {}

    def add(self, source: Hashable, event: T, others: Hashable, other_event: Callable[[], T]) -> None:
        """Count an event. `others`, `other_event`: what stands for all sources beyond the bound; there must be few of them."""
        known = self._sources.get(source)
        if known is None and len(self._sources) >= self._max_sources:
            source, event = others, other_event()
            known = self._sources.get(source)
        if known is not None:
            known.count += 1
            return
        self._sources[source] = _Source(event, self._clock() + WINDOW_S)
        self._write(event, 1)

    def write_due(self) -> None:
        """Write the sums of windows that are over, and forget the sources that were quiet."""
        now = self._clock()
        for key, source in list(self._sources.items()):
            if source.until > now:
                continue
            if source.count:
                self._write(source.event, source.count)
                source.count, source.until = 0, now + WINDOW_S
            else:
                del self._sources[key]

    def write_all(self) -> None:
        """Write all sums, and forget all sources."""
        for source in self._sources.values():
            if source.count:
                self._write(source.event, source.count)
        self._sources.clear()
