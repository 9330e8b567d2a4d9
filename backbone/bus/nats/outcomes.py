"""Terminal words and dead letters, as gateways and workers store them."""

from __future__ import annotations

import asyncio

import orjson
import structlog

from backbone.bus.nats.request_inbox import RequestInbox
from backbone.bus.nats.requests import JetStreamError, message_id_headers, request_until_answered, store_message
from backbone.bus.nats.stream_reader import StreamReader
from backbone.bus.subjects import OUTCOME_CONSUMER, OUTCOMES, OUTCOMES_STREAM, dead_letter_subject, require_token
from backbone.ids import new_token
from schemas.errors import Unavailable
from schemas.outcome import Outcome


async def decide(questions: RequestInbox, word: Outcome, payload: bytes, max_payload: int) -> bool:
    """Store the word, if it is the first. Raises RequestTooLarge, Unavailable.

    The message id is this call's own: its own repetition counts as the first, and everybody else's word does not.
    """
    subject = f"{OUTCOMES}.{require_token(word.job)}".encode()
    headers = message_id_headers(f"{word.job}.{word.run}.{new_token()}")
    try:
        await store_message(questions, subject, word.encode(payload), headers, max_payload=max_payload)
    except JetStreamError as refusal:
        if refusal.taken:
            return False
        raise Unavailable(f"NATS does not store how the job ended: {refusal}") from refusal
    return True


async def bury(questions: RequestInbox, word: Outcome, message: bytes, max_payload: int) -> None:
    """Store a dead letter. Raises RequestTooLarge, Unavailable."""
    subject = dead_letter_subject(word.capability, word.model).encode()
    headers = message_id_headers(f"{require_token(word.job)}.{word.run}")
    try:
        await store_message(questions, subject, word.encode(message), headers, max_payload=max_payload)
    except JetStreamError as refusal:
        raise Unavailable(f"NATS does not store a dead letter: {refusal}") from refusal


log = structlog.get_logger(__name__)

LOOK_S = 1.0
SPARE = 0.1
"""Of the stream's bytes: what is free for the words of the next second."""
MIN_SPARE = 4 * 1024 * 1024
DROP = 0.1
"""Of the stream's words, the oldest go together."""
INFO = f"$JS.API.CONSUMER.INFO.{OUTCOMES_STREAM}.{OUTCOME_CONSUMER}".encode()
PURGE = f"$JS.API.STREAM.PURGE.{OUTCOMES_STREAM}".encode()


class OutcomeRetention:
    """Every gateway looks after it; what two do at once is done once."""

    def __init__(self, questions: RequestInbox, max_bytes: int, *, replicated: bool) -> None:
        self._questions = questions
        self._words = StreamReader(questions, OUTCOMES_STREAM, replicated=replicated)
        self._most = max_bytes - max(SPARE * max_bytes, min(MIN_SPARE, max_bytes / 2))

    async def keep(self) -> None:
        """Look until cancelled."""
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                await self.make()
            except Unavailable as error:
                log.debug("no room is made", error=error.info.message)
            except Exception:
                log.exception("defect in making room")

    async def make(self) -> None:
        """Drop words until there is room, or none that is recorded. Raises Unavailable."""
        while (state := await self._words.state())["bytes"] > self._most:
            first: int = state["first_seq"]
            upto = min(first + max(1, int(DROP * (state["last_seq"] - first))), await self._recorded() + 1)
            if upto <= first:
                log.warning("no room for how jobs end: nothing is recorded", bytes=state["bytes"])
                return
            await self._drop_before(upto)
            log.warning("the oldest results were dropped to make room: MAX_RESULT_BYTES is too small", before=upto)

    async def _recorded(self) -> int:
        """The sequence up to which all words are recorded."""
        answer = orjson.loads((await request_until_answered(self._questions, INFO, b""))[0].data)
        return int(answer["ack_floor"]["stream_seq"]) if "error" not in answer else 0

    async def _drop_before(self, seq: int) -> None:
        answer = orjson.loads((await request_until_answered(self._questions, PURGE, b'{"seq":%d}' % seq))[0].data)
        if (error := answer.get("error")) is not None:
            raise Unavailable(f"NATS: {JetStreamError(error)}")
