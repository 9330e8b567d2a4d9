"""Text in the pieces that a speech server can make one by one, without a pause where none belongs: pure."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

MAX_SENTENCE_LENGTH = 400
"""Characters that are spoken at once: the work of a model like Piper's grows with the square of them."""
# Possessive, and begun only where a run begins: text made for it cannot keep them busy.
BOUNDARY = re.compile(
    r"""(?<![.!?…])[.!?…]++["'”’)\]»]*+\s++|(?<![。！？])[。！？]++["”’」』）]*+\s*+|(?<!\n)\n{2,}+"""  # noqa: RUF001
)
BREAK = re.compile(r"[,;:—，、；：]\s*|\s+")  # noqa: RUF001
ABBREVIATED = re.compile(
    r"(?:^|[\s(\"'.])(?:\w|mrs?|ms|dr|prof|st|jr|sr|vs|etc|nr|vol|fig|approx|inc|ltd|co|ca|bzw|usw|sra|mme|mlle)\.$",
    re.IGNORECASE,
)


def split_sentences(text: str) -> Iterator[str]:
    """The sentences of `text` that hold something to pronounce, none longer than `MAX_SENTENCE_LENGTH` characters."""
    text = "".join(" " if char not in "\n\t" and unicodedata.category(char) == "Cc" else char for char in text)
    text = "\n".join(line.strip() for line in text.split("\n"))
    start = 0
    for end in (*_ends(text), len(text)):
        for piece in _short(text[start:end].strip()):
            if _can_be_said(piece):
                yield piece
        start = end


def _ends(text: str) -> Iterator[int]:
    """Where sentences end: not after abbreviations, before small letters, or within `[[phonemes]]`."""
    for match in BOUNDARY.finditer(text):
        end = match.end()
        paragraph = match.group().endswith("\n\n")
        if not paragraph and (
            text[end : end + 1].islower() or ABBREVIATED.search(text[max(0, end - 12) : end].rstrip())
        ):
            continue
        if text.rfind("[[", 0, end) <= text.rfind("]]", 0, end):
            yield end


def _short(text: str) -> Iterator[str]:
    """`text`, cut where the voice pauses anyway while it is longer than can be spoken at once."""
    while len(text) > MAX_SENTENCE_LENGTH:
        places = [match.end() for match in BREAK.finditer(text, MAX_SENTENCE_LENGTH // 2, MAX_SENTENCE_LENGTH)]
        cut = places[-1] if places else MAX_SENTENCE_LENGTH
        yield text[:cut].strip()
        text = text[cut:]
    yield text


def _can_be_said(text: str) -> bool:
    """Letters, numbers and symbols are; Piper fails where there are none."""
    return any(unicodedata.category(char)[0] in "LNS" for char in text)
