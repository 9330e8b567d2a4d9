"""Storage of outcomes and dead letters, by gateways and workers."""

from __future__ import annotations

from backbone.bus.nats.requests import (
    JetStreamError,
    RequestInbox,
    message_id_headers,
    store_message,
)
from backbone.bus.subjects import OUTCOMES, dead_letter_subject, require_token
from backbone.ids import new_token
from schemas.errors import Unavailable
from schemas.outcome import Outcome


async def store_outcome(inbox: RequestInbox, outcome: Outcome, payload: bytes, max_payload: int) -> bool:
    """Store the outcome if it is the first. Raises RequestTooLarge, Unavailable.

    The message id belongs to this call alone: its own repetition counts as the first outcome, and any other outcome does not.
    """
    subject = f"{OUTCOMES}.{require_token(outcome.job)}".encode()
    headers = message_id_headers(f"{outcome.job}.{outcome.run}.{new_token()}")
    try:
        await store_message(inbox, subject, outcome.encode(payload), headers, max_payload=max_payload)
    except JetStreamError as error:
        if error.subject_limit_reached:
            return False
        raise Unavailable(f"NATS cannot store the outcome of the job: {error}") from error
    return True


async def store_dead_letter(inbox: RequestInbox, outcome: Outcome, message: bytes, max_payload: int) -> None:
    """Store a dead letter. Raises RequestTooLarge, Unavailable."""
    subject = dead_letter_subject(outcome.capability, outcome.model).encode()
    headers = message_id_headers(f"{require_token(outcome.job)}.{outcome.run}")
    try:
        await store_message(inbox, subject, outcome.encode(message), headers, max_payload=max_payload)
    except JetStreamError as error:
        raise Unavailable(f"NATS cannot store a dead letter: {error}") from error
