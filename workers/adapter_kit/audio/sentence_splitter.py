"""Splitting of text into pieces that a speech model speaks one by one, with pauses only where they belong. Pure."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

MAX_SENTENCE_LENGTH = 400
"""Characters that are spoken at once: the work of a model like Piper's grows with their square."""
# Possessive quantifiers, and a match only at the beginning of a run: no text makes these patterns slow.
SENTENCE_END = re.compile(
    r"""(?<![.!?…])[.!?…]++["'”’)\]»]*+\s++|(?<![。！？])[。！？]++["”’」』）]*+\s*+|(?<!\n)\n{2,}+"""  # noqa: RUF001
)
PAUSE = re.compile(r"[,;:—，、；：]\s*|\s+")  # noqa: RUF001
ABBREVIATION = re.compile(
    r"(?:^|[\s(\"'.])(?:\w|mrs?|ms|dr|prof|st|jr|sr|vs|etc|nr|vol|fig|approx|inc|ltd|co|ca|bzw|usw|sra|mme|mlle)\.$",
    re.IGNORECASE,
)


def split_sentences(text: str) -> Iterator[str]:
    """Yield the sentences of `text` that can be pronounced, none longer than `MAX_SENTENCE_LENGTH` characters."""
    text = "".join(" " if char not in "\n\t" and unicodedata.category(char) == "Cc" else char for char in text)
    text = "\n".join(line.strip() for line in text.split("\n"))
    start = 0
    for end in (*_sentence_ends(text), len(text)):
        for piece in _split_long(text[start:end].strip()):
            if _is_pronounceable(piece):
                yield piece
        start = end


def _sentence_ends(text: str) -> Iterator[int]:
    """Yield where sentences end: not after abbreviations, before small letters, or within `[[phonemes]]`."""
    for match in SENTENCE_END.finditer(text):
        end = match.end()
        paragraph = match.group().endswith("\n\n")
        if not paragraph and (
            text[end : end + 1].islower() or ABBREVIATION.search(text[max(0, end - 12) : end].rstrip())
        ):
            continue
        if text.rfind("[[", 0, end) <= text.rfind("]]", 0, end):
            yield end


def _split_long(text: str) -> Iterator[str]:
    """Yield `text` in pieces that can be spoken at once, cut where the voice pauses anyway."""
    while len(text) > MAX_SENTENCE_LENGTH:
        places = [match.end() for match in PAUSE.finditer(text, MAX_SENTENCE_LENGTH // 2, MAX_SENTENCE_LENGTH)]
        cut = places[-1] if places else MAX_SENTENCE_LENGTH
        yield text[:cut].strip()
        text = text[cut:]
    yield text


def _is_pronounceable(text: str) -> bool:
    """Return whether `text` has letters, numbers or symbols; Piper fails without any."""
    return any(unicodedata.category(char)[0] in "LNS" for char in text)
