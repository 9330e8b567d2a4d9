"""Suggest the model that a caller may have meant, in the error for a model that does not exist.

The cost is bounded: names are compared by their letter pairs, which are computed once per name, and only the most similar few by
difflib. Results are cached, and beyond a rate nothing is suggested.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from difflib import SequenceMatcher
from heapq import nlargest
from operator import add, itemgetter
from time import monotonic

MAX_LETTERS = 64
"""Letters of a name that are compared."""
MAX_CANDIDATES = 6
MIN_RATIO = 0.6
"""Lowest ratio of difflib at which a name is suggested."""
MAX_CACHED = 256
RATE = 50.0
"""Searches per second; each takes about 1.5 ms with 2,000 models."""
BURST = 50.0

_Entry = tuple[str, str, frozenset[str]]


class ModelSuggestions:
    """Finds the known name that is most similar to an unknown one."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        """Begin without names. `clock`: seconds, monotonic."""
        self._clock = clock
        self._entries: dict[str, _Entry] = {}
        self._cache: dict[str, str | None] = {}
        self._allowance = BURST
        self._at = clock()

    def load(self, names: Iterable[str]) -> None:
        """Replace the names. A name that was there before costs one lookup."""
        old = self._entries
        self._entries = {name: old.get(name) or _entry(name) for name in names}
        if self._entries.keys() != old.keys():
            self._cache = {}

    def nearest(self, name: str) -> str | None:
        """Return the most similar name; None if none is similar enough, or the rate of searches is exceeded."""
        name = name[:MAX_LETTERS]
        if name in self._cache:
            return self._cache[name]
        if not self._may_search():
            return None
        found = self._search(name)
        if len(self._cache) >= MAX_CACHED:
            self._cache.clear()
        self._cache[name] = found
        return found

    def _may_search(self) -> bool:
        now = self._clock()
        self._allowance = min(BURST, self._allowance + (now - self._at) * RATE)
        self._at = now
        if self._allowance < 1:
            return False
        self._allowance -= 1
        return True

    def _search(self, name: str) -> str | None:
        _, letters, pairs = _entry(name)
        total = len(pairs)
        alike = [(len(pairs & entry[2]) / (total + len(entry[2])), entry) for entry in self._entries.values()]
        best = nlargest(MAX_CANDIDATES, alike, key=itemgetter(0))
        rated = [(_ratio(letters, entry[1]), entry[0]) for likeness, entry in best if likeness]
        ratio, nearest = max(rated, default=(0.0, None), key=lambda pair: pair[0])
        return nearest if ratio >= MIN_RATIO else None


def _entry(name: str) -> _Entry:
    letters = name[:MAX_LETTERS].casefold()
    return name, letters, frozenset(map(add, f" {letters}", letters))


def _ratio(one: str, other: str) -> float:
    short, long = sorted((one, other), key=len)
    if len(short) >= 3 and short in long:
        return 1.0 - (len(long) - len(short)) / 1000
    return SequenceMatcher(None, one, other, autojunk=False).ratio()


def did_you_mean(name: str | None) -> str:
    """Return the sentence that suggests `name`, after a space; empty without a name."""
    return f" Did you mean '{name[:100]}'?" if name else ""
