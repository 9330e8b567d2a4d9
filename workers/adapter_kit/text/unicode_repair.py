r"""JSON whose characters are broken, as some servers send it: halves of surrogate pairs, and UTF-8 cut between two events. Pure.

A character may be cut anywhere between two events: between the UTF-16 halves of `"\ud83d\ude00"`, or between the bytes of its
UTF-8 form. `parse_broken_json` takes such an event as it is, `CharacterJoiner` joins what belongs together, and replaces what never becomes a
character by U+FFFD.
"""

from __future__ import annotations

import codecs
import json
import math
import re
from typing import Any, Final

Path = tuple[str | int, ...]
REPLACEMENT: Final = "�"
UNLIKELY: Final = -9999.0
"""OpenAI's number for a token that cannot be: JSON has no infinity, and Python's servers write it all the same."""
_RAW: Final = 0x10FF00
"""A byte that is no UTF-8 travels through the JSON parser as this private character, plus the byte."""
_SURROGATE = re.compile("[\ud800-\udfff]")
_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")
_RAW_RUN = re.compile("[\U0010ff80-\U0010ffff]+")
_BROKEN = re.compile("[\ud800-\udfff\U0010ff80-\U0010ffff]")


def parse_broken_json(payload: bytes) -> Any:
    """Return the value, whose strings may hold broken characters. Raises ValueError for what is no JSON."""
    text = payload.decode("utf-8", "surrogateescape")
    text = _SURROGATE.sub(lambda match: chr(_RAW + ord(match[0]) - 0xDC00), text)
    return json.loads(text, strict=False)  # control characters, as servers send them that write JSON by hand


def has_whole_characters(data: bytes) -> bool:
    """Return whether JSON bytes hold neither an escaped surrogate nor a broken UTF-8 sequence."""
    if rb"\ud" in data or rb"\uD" in data:
        return False
    if data.isascii():
        return True
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


class CharacterJoiner:
    """Join characters that were cut between two strings of the same place in an answer; and replace what is no number."""

    def __init__(self, *, last: bool = False, lists: bool = True) -> None:
        """`last`: nothing follows the value that comes, so that halves are replaced at once. `lists`: what lists hold goes on, too."""
        self._last = last
        self._lists = lists
        self.open: dict[Path, str] = {}
        """The first half of a character, by the place whose next string begins with the second."""

    def repair(self, value: Any, path: Path = ()) -> Any:
        """Return `value` with whole characters only; a half at the end of a string waits for the next string there."""
        if isinstance(value, str):
            return self._join(path, value)
        if isinstance(value, dict):
            return {_SURROGATE.sub(REPLACEMENT, key): self.repair(one, (*path, key)) for key, one in value.items()}
        if isinstance(value, list):
            return [self.repair(one, (*path, _place(one, number))) for number, one in enumerate(value)]
        if isinstance(value, float) and not math.isfinite(value):
            return UNLIKELY if "logprobs" in path else None
        return value

    def rest(self, path: Path) -> str:
        """Return what stands for a half that no second half followed: U+FFFD, or nothing."""
        return REPLACEMENT if self.open.pop(path, "") else ""

    def halves(self, place: Path) -> dict[str, str]:
        """Return what stands for the halves that no second half followed, by the names of the texts in `place`."""
        names = [str(path[-1]) for path in self.open if path[:-1] == place]
        return {name: self.rest((*place, name)) for name in names}

    def _join(self, path: Path, text: str) -> str:
        text = self.open.pop(path, "") + text
        if _BROKEN.search(text) is None:
            return text
        text = _PAIR.sub(lambda match: match[0].encode("utf-16", "surrogatepass").decode("utf-16"), text)
        rest = ""
        if self._last or not (self._lists or all(isinstance(key, str) for key in path)):
            pass
        elif "\ud800" <= text[-1:] <= "\udbff":
            text, rest = text[:-1], text[-1]
        elif (run := _RAW_RUN.search(text, max(0, len(text) - 3))) is not None and run.end() == len(text):
            decoder = codecs.getincrementaldecoder("utf-8")("replace")
            decoder.decode(_raw_bytes(run[0]))
            cut = len(decoder.getstate()[0])
            text, rest = text[: len(text) - cut], text[len(text) - cut :]
        if rest:
            self.open[path] = rest
        text = _RAW_RUN.sub(lambda match: _raw_bytes(match[0]).decode("utf-8", "replace"), text)
        return _SURROGATE.sub(REPLACEMENT, text)


def _raw_bytes(text: str) -> bytes:
    return bytes(ord(character) - _RAW for character in text)


def _place(item: Any, number: int) -> int:
    index = item.get("index") if isinstance(item, dict) else None
    return index if isinstance(index, int) else number
