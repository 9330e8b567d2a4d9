"""A completion for a caller who does not stream: one body at the end."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import Any

import orjson

from workers.adapter_kit.text.chunk_merge import finish_choice, merge_choice, merge_objects
from workers.adapter_kit.text.completion_options import CompletionOptions
from workers.adapter_kit.text.completion_reader import CompletionReader, validated_usage
from workers.adapter_kit.text.event_pattern import (
    MAX_LEARNED_PATTERNS,
    ROLE_FIELD,
    EventPattern,
    equals_without,
    find_only_text,
    parse_learnable_event,
)
from workers.adapter_kit.text.plain_answer import PlainAnswer, read_plain_answer
from workers.backends.base import Chunk, Finish, Output

JSON = dict[str, Any]

KEEPALIVE_INTERVAL_S = 1.0
MAX_UNREAD_BYTES = 128 * 1024
"""A longer stream, of about 700 tokens, is read as it comes: one pass would keep other answers waiting."""
DONE_MARKER = b"[DONE]"
DONE_BYTES = 32
"""The last bytes of a stream, among which its end marker is."""
FIRST_TEXT = re.compile(rb'"(?:content|text|reasoning_content|reasoning)": ?"[^"]')


class CompletionCollector(CompletionReader):
    """Makes one body from all events. Until then it returns, once a second, a Chunk without data that counts tokens.

    The bytes of the stream are collected unread. An ordinary answer is read when it is complete (`plain_answer`); every other one, and
    one that may hold an error, is read by events.
    """

    def __init__(self, options: CompletionOptions) -> None:
        super().__init__(options)
        self._patterns_left = MAX_LEARNED_PATTERNS
        self._texts: list[bytes] = []
        self._merged: dict[int, JSON] = {}
        self._top: JSON = {}
        self._last_keepalive = 0.0
        self._unread: list[bytes] | None = [] if options.choices == 1 else None
        """The stream so far; None: it is read by events."""
        self._unread_size = 0
        self._end = b""
        """The last bytes of the unread stream."""
        self._reported = 0
        """Tokens of the unread stream that a Chunk has counted."""
        self._plain: PlainAnswer | None = None

    def feed(self, data: bytes) -> Chunk | None:
        if self._unread is None:
            return super().feed(data)
        self._collect(self._unread, data)
        if b"error" in data or self._unread_size > MAX_UNREAD_BYTES:
            return self._read_events()
        if DONE_MARKER in self._end:
            self._plain = read_plain_answer(b"".join(self._unread), chat=self.options.chat)
            if self._plain is None:
                return self._read_events()
            self._unread, self.done = None, True
            return None
        return self._report_text(data)

    def take(self, data: bytes) -> bool:
        """Collect bytes that neither end the answer, nor hold an error, nor are the first for a while."""
        if (
            self._unread is None
            or self._unread_size > MAX_UNREAD_BYTES
            or not data.endswith(b"\n\n")
            or b"error" in data
            or DONE_MARKER in data
            or time.monotonic() - self._last_keepalive >= KEEPALIVE_INTERVAL_S
        ):
            return False
        self._collect(self._unread, data)
        return True

    def _collect(self, unread: list[bytes], data: bytes) -> None:
        unread.append(data)
        self._unread_size += len(data)
        self._end = (self._end + data)[-DONE_BYTES:]

    def _report_text(self, data: bytes) -> Chunk | None:
        """Return a Chunk for the first text, and then once a second where text comes."""
        now = time.monotonic()
        if now - self._last_keepalive < KEEPALIVE_INTERVAL_S or not FIRST_TEXT.search(data):
            return None
        self._last_keepalive = now
        self._reported += 1
        return Chunk(b"", 1)

    def _read_events(self) -> Chunk | None:
        """Read the collected bytes, and all that follow, by events."""
        unread, self._unread = self._unread, None
        return super().feed(b"".join(unread)) if unread else None

    def _take_tokens(self) -> int:
        tokens = super()._take_tokens()
        reported = min(tokens, self._reported)
        self._reported -= reported
        return tokens - reported

    def feed_end(self) -> Chunk | None:
        if self._unread is not None:
            self._read_events()
        return super().feed_end()

    def feed_whole(self, data: bytes, *, cut_short: bool = False) -> Chunk | None:
        self._unread = None  # it is complete, and no chunk need tell that it grows
        return super().feed_whole(data, cut_short=cut_short)

    @property
    def is_complete(self) -> bool:
        if self._unread is not None:
            self._read_events()
        return super().is_complete

    def finish(self) -> Iterator[Output]:
        """Yield the body and `Finish`. Raises BackendError when the stream did not end properly."""
        if self._plain is not None:
            yield from self._finish_plain(self._plain)
            return
        if self._unread is not None:
            self._read_events()
        self._settle_reasons()
        self._merge_texts()
        for choice in self._final_choices():
            self._merge(choice)
        self._require_all_choices(len(self._merged))
        choices = [choice for _, choice in sorted(self._merged.items())]
        yield from self._answer({**self._extras, **self._top}, choices, self._usage(), self._take_tokens())

    def _finish_plain(self, plain: PlainAnswer) -> Iterator[Output]:
        self._set_constant_fields(plain.first)
        given: JSON = {"delta": {"content": plain.text}} if self.options.chat else {"text": plain.text}
        choice = {"index": 0, **given, "finish_reason": plain.reason}
        yield from self._answer(plain.fields, [choice], plain.usage, max(0, plain.tokens - self._reported))

    def _answer(self, fields: JSON, choices: list[JSON], usage: JSON | None, tokens: int) -> Iterator[Output]:
        chat = self.options.chat
        body = {**fields, **self._constant}
        body["object"] = "chat.completion" if chat else "text_completion"
        body["choices"] = [finish_choice(choice, chat) for choice in choices]
        if usage is not None:
            body["usage"] = usage
        yield Chunk(orjson.dumps(body), tokens)
        yield Finish(validated_usage(usage))

    def _merge(self, choice: JSON) -> None:
        merged = self._merged.setdefault(choice["index"], choice)
        if merged is not choice:
            merge_choice(merged, choice)

    def _take_output(self) -> Chunk | None:
        now = time.monotonic()
        if self.done or not self._tokens or now - self._last_keepalive < KEEPALIVE_INTERVAL_S:
            return None
        self._last_keepalive = now
        return Chunk(b"", self._take_tokens())

    def _take_plain(self, block: bytes) -> bool:
        """Take the texts out of `block`, if all its events only add text to the only choice.

        The bytes that then remain between heads and tails hold neither a quote nor a line end; otherwise they are more than text.
        """
        pattern = self._pattern
        if pattern is None or self._joiner.open or not pattern.fits(block):
            return False
        between = pattern.between(block)
        text = between.replace(pattern.seam, b"")
        if b'"' in text or b"\n" in text:
            return False
        self._texts.append(text)
        self._tokens += 1 + (len(between) - len(text)) // len(pattern.seam)
        self._patterns_left = MAX_LEARNED_PATTERNS
        return True

    def _merge_texts(self) -> None:
        """Merge the texts taken so far into the choice. They are joined first: a character may be split over two events."""
        if self._texts:
            text = b'"' + b"".join(self._texts) + b'"'
            self._texts.clear()
            # In the form of an event, so that halves of characters find each other.
            form = b'"delta":{"content":%b}' if self.options.chat else b'"text":%b'
            event = b'{"choices":[{%b}]}' % (form % text)
            choice, into = self._parse(event)["choices"][0], self._merged[0]
            if self.options.chat:
                choice, into = choice["delta"], into["delta"]
            merge_objects(into, choice)

    def _take_payload(self, payload: bytes) -> None:
        self._merge_texts()  # first: this event may begin with the second half of a character
        super()._take_payload(payload)

    def _take_event(self, payload: bytes, event: Any) -> None:
        event = self._repair_event(event)
        if event is None:
            return
        for choice in event["choices"]:
            self._merge(choice)
        self._top.update((name, value) for name, value in event.items() if value is not None and name != "choices")
        if self._has_reason:
            self._pattern = None
        elif self._patterns_left and self.options.choices == 1:
            self._learn(payload)

    def _learn(self, payload: bytes) -> None:
        """Learn from this event which bytes precede and follow its text, if the event adds nothing else."""
        event = None if ROLE_FIELD in payload else parse_learnable_event(payload)
        if event is None:
            return
        target = find_only_text(event, chat=self.options.chat)
        name = "content" if self.options.chat else "text"
        if target is None or not target[name]:
            return
        start = payload.find(b'"', payload.find(b'"%b"' % name.encode()) + len(name) + 2) + 1
        end = payload.find(b'"', start)
        target[name] = ""
        if equals_without(payload, start, end, event):
            self._patterns_left -= 1
            self._pattern = EventPattern(b"data: " + payload[:start], payload[end:] + b"\n\n")
