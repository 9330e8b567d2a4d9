"""A completion for a caller who streams: whole SSE frames, passed on as they arrive."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import orjson

from workers.adapter_kit.text import unicode_repair
from workers.adapter_kit.text.completion_options import CompletionOptions
from workers.adapter_kit.text.completion_reader import CompletionReader, validated_usage
from workers.adapter_kit.text.event_pattern import (
    MAX_LEARNED_PATTERNS,
    ROLE_FIELD,
    EventPattern,
    equals_without,
    has_no_calls,
    is_constant,
    parse_learnable_event,
    remove_role,
    split_around_text,
)
from workers.backends.base import Chunk, Finish, Output, Push

JSON = dict[str, Any]

UNFINISHED_FORMS = (b'"finish_reason":null', b'"finish_reason": null')
INDEX_FORMS = (b'"index":0', b'"index": 0')
CALL_SUFFIX = b"_call"
NON_JSON_NUMBERS = (b"NaN", b"Infinity")
"""Servers that are written in Python send them; JSON has no such numbers."""
UNICODE_ESCAPE = rb"\u"


class CompletionRelay(CompletionReader):
    """Makes SSE frames, as many as arrived together in one Chunk.

    An event without output (a first delta with only a role) waits for the first token, so that until then the attempt can
    still go to another worker.
    """

    def __init__(self, options: CompletionOptions, push: Push | None = None) -> None:
        super().__init__(options)
        self._push = push
        self._unfinished = b""
        self._index = b""
        self._text_field = ""
        """The name of the pattern's text."""
        self._is_open_ended = False
        """The pattern ends before a choice does: what follows its text differs from event to event, as `logprobs` do."""
        self._has_learned = False
        self._new_tail = b""
        self._new_head = b""
        self._new_seam = b""
        self._is_verbatim = False
        """Events that fit the pattern are passed on byte by byte."""
        self._patterns_left = MAX_LEARNED_PATTERNS
        self._end_written = False
        self._out: list[bytes] = []

    def take(self, data: bytes) -> bool:
        """Push events that only add text, as they are or with another head and tail."""
        if (
            self._push is None
            or not data.endswith(b"\n\n")
            or b"\r" in data
            or not self._splitter.is_between_events
            or not self._take_plain(data)
        ):
            return False
        out, self._out = self._out, []
        self._push(out[0] if len(out) == 1 else b"".join(out), self._take_tokens())
        return True

    def finish(self) -> Iterator[Output]:
        """Yield the final chunks, the usage and `Finish`. Raises BackendError when the stream did not end properly."""
        self._write_end()
        if self._out:
            yield Chunk(b"".join(self._out), 0)
        yield Finish(validated_usage(self._usage()), "text/event-stream")

    def _write_end(self) -> None:
        """Write the final chunks and the usage, once."""
        if self._end_written:
            return
        self._settle_reasons()
        self._require_all_choices(len(self._choices))
        self._end_written = True
        usage, final = self._usage(), {**self._extras, **self._constant}
        head = _event_head(final, self.options.include_usage)
        self._out += [head + orjson.dumps(choice) + b"]}\n\n" for choice in self._final_choices()]
        if self.options.include_usage and usage is not None:
            self._out.append(b"data: " + orjson.dumps({**final, "choices": [], "usage": usage}) + b"\n\n")

    def _take_output(self) -> Chunk | None:
        if self.done:
            self._write_end()
        if not self._tokens:
            return None
        out, self._out = self._out, []
        return Chunk(out[0] if len(out) == 1 else b"".join(out), self._take_tokens())

    def _take_plain(self, block: bytes) -> bool:
        pattern = self._pattern
        if pattern is None or self._joiner.open or not pattern.fits(block):
            return False
        count, odd = divmod(block.count(b"\n"), 2)
        if (
            odd
            or (count > 1 and block.count(pattern.seam) != count - 1)
            or (self._is_open_ended and not self._needs_no_repair(block, count))
            or (CALL_SUFFIX in block and not has_no_calls(block))
            or ((UNICODE_ESCAPE in block or not block.isascii()) and not unicode_repair.has_whole_characters(block))
        ):
            return False
        if not self._is_verbatim:
            middle = pattern.between(block).replace(pattern.seam, self._new_seam)
            block = b"".join((self._new_head, middle, self._new_tail))
        if ROLE_FIELD in block:
            block = remove_role(block)
            if ROLE_FIELD in block:
                return False
        self._patterns_left = MAX_LEARNED_PATTERNS
        self._tokens += count
        self._out.append(block)
        return True

    def _needs_no_repair(self, block: bytes, count: int) -> bool:
        """Return whether what follows the texts of `count` events, beyond the pattern, can be passed on as it is."""
        return (
            block.count(self._unfinished) == count
            and (not self._index or block.count(self._index) == count)
            and not any(word in block for word in NON_JSON_NUMBERS)
        )

    def _plain_fields(self) -> set[str]:
        # Each run of plain events resets the counter.
        relayed = self._pattern is not None and self._patterns_left == MAX_LEARNED_PATTERNS
        return {self._text_field} if relayed else set()

    def _take_event(self, payload: bytes, event: Any) -> None:
        event = self._repair_event(event)
        if event is None:
            return
        head = _event_head(event, self.options.include_usage)
        if self._has_reason:
            self._pattern = None
        elif self._patterns_left and self.options.choices == 1:
            self._learn(payload, head)
        self._out.append(head + orjson.dumps(event["choices"])[1:-1] + b"]}\n\n")

    def _learn(self, payload: bytes, new_head: bytes) -> None:
        """Learn from this event which bytes precede and follow its text, if that is beyond doubt."""
        pattern = self._pattern
        if pattern is not None and payload.startswith(pattern.head[6:]) and payload.endswith(pattern.tail[:-2]):
            return
        event = parse_learnable_event(payload)
        unfinished = next((form for form in UNFINISHED_FORMS if form in payload), b"")
        if event is None or not unfinished:
            return
        choice, event["choices"] = event["choices"][0], []
        begin = payload.find(b"[", payload.find(b'"choices"')) + 1
        end = payload.rfind(b"]")
        written = payload[begin:end]
        front, back = split_around_text(written, choice, chat=self.options.chat)
        self._text_field = front.rpartition(b'"')[0].rpartition(b'":')[0].rpartition(b'"')[2].decode()
        if not front or not equals_without(payload, begin, end, event):
            return
        self._is_open_ended = not is_constant(choice, chat=self.options.chat)
        if self._is_open_ended:
            back = b""
        plain_front, plain_back = remove_role(front), remove_role(back)
        if ROLE_FIELD in plain_front or ROLE_FIELD in plain_back:
            return
        self._patterns_left -= 1
        if not self._has_learned:  # the first event has a role, and most servers never repeat it
            front, back = plain_front, plain_back
        self._has_learned = True
        self._unfinished = unfinished
        self._index = b"" if b'"index"' in front else next((one for one in INDEX_FORMS if one in written), b"")
        head, tail = payload[:begin] + front, back + payload[end:]
        self._pattern = EventPattern(b"data: " + head, tail + b"\n\n")
        if "index" not in choice:
            plain_front = b'{"index":0,' + plain_front.partition(b"{")[2]
        self._new_head = new_head + plain_front
        self._new_tail = plain_back + b"]}\n\n"
        self._new_seam = self._new_tail + self._new_head
        self._is_verbatim = self._new_head[6:] == head and self._new_tail[:-2] == tail


def _event_head(event: JSON, include_usage: bool) -> bytes:
    """Return everything of an event but its choices; `choice]}` completes it."""
    rest = {name: value for name, value in event.items() if name != "choices"}
    if include_usage:
        rest.setdefault("usage", None)
    return b"data: " + orjson.dumps(rest)[:-1] + b',"choices":['
