r"""Repair of JSON with broken characters: halves of surrogate pairs, and UTF-8 that is cut between two events. Pure.

A character may be cut anywhere between two events: between the UTF-16 halves of `"\ud83d\ude00"`, or between the bytes of its
UTF-8 form. `parse_broken_json` parses such an event, and `CharacterJoiner` joins the halves; U+FFFD replaces a half that no second
half follows.
"""

from __future__ import annotations

import codecs
import json
import math
import re
from typing import Any, Final

Path = tuple[str | int, ...]
REPLACEMENT: Final = "�"
IMPOSSIBLE_LOGPROB: Final = -9999.0
"""OpenAI's log probability of an impossible token; servers written in Python send `-Infinity`, which JSON lacks."""
_RAW_BASE: Final = 0x10FF00
"""A byte that is not UTF-8 passes the JSON parser as this private character plus the byte."""
_SURROGATE = re.compile("[\ud800-\udfff]")
_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")
_RAW_RUN = re.compile("[\U0010ff80-\U0010ffff]+")
_BROKEN = re.compile("[\ud800-\udfff\U0010ff80-\U0010ffff]")


def parse_broken_json(payload: bytes) -> Any:
    """Return the value of JSON whose strings may hold broken characters. Raises ValueError where it is not JSON."""
    text = payload.decode("utf-8", "surrogateescape")
    text = _SURROGATE.sub(lambda match: chr(_RAW_BASE + ord(match[0]) - 0xDC00), text)
    return json.loads(text, strict=False)  # some servers write control characters unescaped


def has_whole_characters(data: bytes) -> bool:
    """Return whether JSON bytes hold neither an escaped surrogate nor a broken UTF-8 sequence."""
    if b"\\" in data and (rb"\ud" in data or rb"\uD" in data):  # one byte is found ten times as fast as two
        return False
    if data.isascii():
        return True
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


class CharacterJoiner:
    """Joins characters that were cut between two strings at the same place of an answer, and replaces numbers that JSON lacks."""

    def __init__(self, *, last: bool = False, lists: bool = True) -> None:
        """Create a joiner. `last`: no value follows, so halves are replaced at once. `lists`: strings in lists continue as well."""
        self._last = last
        self._lists = lists
        self.open: dict[Path, str] = {}
        """The first halves of characters, by the place whose next string begins with the second half."""

    def repair(self, value: Any, path: Path = ()) -> Any:
        """Return `value` with complete characters only; a half at the end of a string waits for the next string at its place."""
        if isinstance(value, str):
            return self._join_halves(path, value)
        if isinstance(value, dict):
            return {_SURROGATE.sub(REPLACEMENT, key): self.repair(one, (*path, key)) for key, one in value.items()}
        if isinstance(value, list):
            return [self.repair(one, (*path, _list_place(one, number))) for number, one in enumerate(value)]
        if isinstance(value, float) and not math.isfinite(value):
            return IMPOSSIBLE_LOGPROB if "logprobs" in path else None
        return value

    def rest(self, path: Path) -> str:
        """Return U+FFFD where a half is left at this place, else an empty string."""
        return REPLACEMENT if self.open.pop(path, "") else ""

    def halves(self, place: Path) -> dict[str, str]:
        """Return U+FFFD for each half that is left in `place`, by the name of its text."""
        names = [str(path[-1]) for path in self.open if path[:-1] == place]
        return {name: self.rest((*place, name)) for name in names}

    def _join_halves(self, path: Path, text: str) -> str:
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
    return bytes(ord(character) - _RAW_BASE for character in text)


def _list_place(item: Any, number: int) -> int:
    index = item.get("index") if isinstance(item, dict) else None
    return index if isinstance(index, int) else number
