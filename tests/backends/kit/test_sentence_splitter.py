"""Splitting of text into pieces that are spoken one by one."""

from __future__ import annotations

import pytest

from workers.adapter_kit.audio.sentence_splitter import MAX_SENTENCE_LENGTH, split_sentences


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ('He said "stop." Then he left.', ['He said "stop."', "Then he left."]),
        ("Dr. Smith met Mrs. J. Jones at 5.30 p.m. today. Good.", ["Dr. Smith met Mrs. J. Jones at 5.30 p.m. today.", "Good."]),
        ("Wait... what? Yes", ["Wait... what?", "Yes"]),
        ("A line\nthat goes on\n\nAnother paragraph", ["A line\nthat goes on", "Another paragraph"]),
        ("A heading\n \t\nand more", ["A heading", "and more"]),
        ("你好。我很好！", ["你好。", "我很好！"]),  # noqa: RUF001
        ("Say [[ wʌn. tu. ]] now. Done.", ["Say [[ wʌn. tu. ]] now.", "Done."]),
        ("Hm. ... ?! - “”. Yes. 🙂", ["Hm.", "Yes.", "🙂"]),
        ("bell\x07 and\x00nul", ["bell  and nul"]),
        ("…", []),
    ],
)  # fmt: skip
def test_pieces_end_where_a_voice_would_pause(text: str, pieces: list[str]) -> None:
    """Pieces that cannot be pronounced are left out."""
    assert list(split_sentences(text)) == pieces


def test_a_sentence_without_end_is_cut_at_commas_or_words() -> None:
    words = "word, " * 1000
    pieces = list(split_sentences(words))
    assert all(len(piece) <= MAX_SENTENCE_LENGTH and piece.startswith("word") for piece in pieces)
    assert " ".join(pieces) == words.strip()
    assert [len(piece) for piece in split_sentences("x" * 1000)] == [400, 400, 200]


@pytest.mark.parametrize("text", [".", "?!", "\n", " \n", ". ", "a.\n", "。", "[[", '."'])
@pytest.mark.timeout(10)
def test_text_made_to_keep_it_busy_does_not(text: str) -> None:
    assert sum(map(len, split_sentences(text * (32_768 // len(text)) + "x"))) <= 32_769
