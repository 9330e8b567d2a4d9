"""Room for how jobs end: of the terminal words that are recorded, the oldest make room for new ones.

A stream that is full takes no word. Then no job could end: workers would hold on to what they have done, until none has a
free slot for anybody else's request. A word that is not recorded yet is never dropped.
"""

from __future__ import annotations

import asyncio

import orjson
import structlog

from backbone.bus.asking import Refused, ask
from backbone.bus.questions import Questions
from backbone.bus.stream_reading import StreamReader
from backbone.bus.subjects import DONE_STREAM, RECORDER
from schemas.errors import Unavailable

log = structlog.get_logger(__name__)

LOOK_S = 1.0
SPARE = 0.1
"""Of the stream's bytes: what is free for the words of the next second."""
MIN_SPARE = 4 * 1024 * 1024
DROP = 0.1
"""Of the stream's words, the oldest go together."""
INFO = f"$JS.API.CONSUMER.INFO.{DONE_STREAM}.{RECORDER}".encode()
PURGE = f"$JS.API.STREAM.PURGE.{DONE_STREAM}".encode()


class Room:
    """Every gateway looks after it; what two do at once is done once."""

    def __init__(self, questions: Questions, max_bytes: int, *, replicated: bool) -> None:
        self._questions = questions
        self._words = StreamReader(questions, DONE_STREAM, replicated=replicated)
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
        answer = orjson.loads((await ask(self._questions, INFO, b""))[0].data)
        return int(answer["ack_floor"]["stream_seq"]) if "error" not in answer else 0

    async def _drop_before(self, seq: int) -> None:
        answer = orjson.loads((await ask(self._questions, PURGE, b'{"seq":%d}' % seq))[0].data)
        if (error := answer.get("error")) is not None:
            raise Unavailable(f"NATS: {Refused(error)}")
