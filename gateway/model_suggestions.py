"""Which model a caller may have meant who named one that does not exist. Runs only where a request is refused.

Bounded: names are compared by their pairs of letters, which are computed once for each name, and the most similar few by
difflib. Answers are remembered; beyond a rate nothing is suggested.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from difflib import SequenceMatcher
from heapq import nlargest
from operator import add, itemgetter
from time import monotonic

COMPARED = 64
"""Letters of a name that count."""
FINALISTS = 6
SIMILAR = 0.6
"""Of difflib's ratio: what is less alike is no help."""
MAX_REMEMBERED = 256
RATE = 50.0
"""Suggestions a second that are looked for; each takes about 1.5 ms with 2,000 models."""
BURST = 50.0

_Entry = tuple[str, str, frozenset[str]]


class ModelSuggestions:
    """The names of one snapshot after another, and what resembles them."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        """There are no names yet."""
        self._clock = clock
        self._entries: dict[str, _Entry] = {}
        self._remembered: dict[str, str | None] = {}
        self._allowance = BURST
        self._at = clock()

    def load(self, names: Iterable[str]) -> None:
        """Take the names that callers may see; those that were there before cost a lookup each."""
        old = self._entries
        self._entries = {name: old.get(name) or _entry(name) for name in names}
        if self._entries.keys() != old.keys():
            self._remembered = {}

    def nearest(self, name: str) -> str | None:
        """Return the name that is most like this one; None: none is, or too many were looked for just now."""
        name = name[:COMPARED]
        if name in self._remembered:
            return self._remembered[name]
        if not self._may_look():
            return None
        found = self._look(name)
        if len(self._remembered) >= MAX_REMEMBERED:
            self._remembered.clear()
        self._remembered[name] = found
        return found

    def _may_look(self) -> bool:
        now = self._clock()
        self._allowance = min(BURST, self._allowance + (now - self._at) * RATE)
        self._at = now
        if self._allowance < 1:
            return False
        self._allowance -= 1
        return True

    def _look(self, name: str) -> str | None:
        _, letters, pairs = _entry(name)
        total = len(pairs)
        alike = [(len(pairs & entry[2]) / (total + len(entry[2])), entry) for entry in self._entries.values()]
        best = nlargest(FINALISTS, alike, key=itemgetter(0))
        rated = [(_ratio(letters, entry[1]), entry[0]) for likeness, entry in best if likeness]
        ratio, nearest = max(rated, default=(0.0, None), key=lambda pair: pair[0])
        return nearest if ratio >= SIMILAR else None


def _entry(name: str) -> _Entry:
    letters = name[:COMPARED].casefold()
    return name, letters, frozenset(map(add, f" {letters}", letters))


def _ratio(one: str, other: str) -> float:
    short, long = sorted((one, other), key=len)
    if len(short) >= 3 and short in long:
        return 1.0 - (len(long) - len(short)) / 1000
    return SequenceMatcher(None, one, other, autojunk=False).ratio()


def did_you_mean(name: str | None) -> str:
    """The sentence for a message, with a space before it; empty without a name."""
    return f" Did you mean '{name[:100]}'?" if name else ""
