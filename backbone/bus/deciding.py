"""Terminal words and dead letters, as gateways and workers store them."""

from __future__ import annotations

from backbone.bus.asking import Refused, message_id, put
from backbone.bus.questions import Questions
from backbone.bus.subjects import DONE, dead_subject, require_token
from backbone.ids import new_token
from schemas.errors import Unavailable
from schemas.words import Word


async def decide(questions: Questions, word: Word, payload: bytes, max_payload: int) -> bool:
    """Store the word, if it is the first. Raises RequestTooLarge, Unavailable.

    The message id is this call's own: its own repetition counts as the first, and everybody else's word does not.
    """
    subject = f"{DONE}.{require_token(word.job)}".encode()
    headers = message_id(f"{word.job}.{word.run}.{new_token()}")
    try:
        await put(questions, subject, word.encode(payload), headers, max_payload=max_payload)
    except Refused as refusal:
        if refusal.taken:
            return False
        raise Unavailable(f"NATS does not store how the job ended: {refusal}") from refusal
    return True


async def bury(questions: Questions, word: Word, message: bytes, max_payload: int) -> None:
    """Store a dead letter. Raises RequestTooLarge, Unavailable."""
    subject = dead_subject(word.capability, word.model).encode()
    headers = message_id(f"{require_token(word.job)}.{word.run}")
    try:
        await put(questions, subject, word.encode(message), headers, max_payload=max_payload)
    except Refused as refusal:
        raise Unavailable(f"NATS does not store a dead letter: {refusal}") from refusal
