"""From an OpenAI-compatible server's event stream to what the caller gets: pure.

`Relay` answers a caller who streams, `Collector` one who does not. Both make right what servers get wrong (see
`Answer`), and both recognise, by comparing bytes, the events that need no parsing: those that differ from an event
already understood only in their text. Inside a JSON string a quote is always escaped and a line end never stands
alone, so a pattern that holds either can only match structure, never what the model said.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import orjson
from pydantic import ValidationError

from schemas.jobs import Usage
from workers.backends.base import BackendError, BackendRefused, Chunk, Finish, Output
from workers.backends.merging import combined_usage, finished_choice, merge
from workers.backends.refusals import stream_error
from workers.backends.sse import EventTooLarge, SseSplitter, payloads

JSON = dict[str, Any]

SIGN_OF_LIFE_S = 1.0
LEARNING_ATTEMPTS = 3
"""How often in a row a pattern may be learnt and never match, before it is left at parsing."""
TEACHERS = 2
"""Events within which a server's form shows: the first has a role, the second only text."""
UNFINISHED = (b'"finish_reason":null', b'"finish_reason": null')
FINISHED = (b'"finish_reason":"', b'"finish_reason": "')
TOOL_CALLS = b'"tool_calls"'


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the caller asked for, as far as it shapes the answer."""

    chat: bool
    model: str
    """The name that the answer carries."""
    fallback_id: str
    include_usage: bool = False
    n: int = 1
    prompts: int = 1

    @property
    def choices(self) -> int:
        return self.n * self.prompts


@dataclass(slots=True)
class _Choice:
    """What has been seen of one choice."""

    begun: bool = False
    finished: bool = False
    calls: int = 0


class Answer(ABC):
    """A server's answer as it arrives.

    What comes out of it holds, whatever the server does: `id`, `created`, `model` and `object` are constant; the first
    delta of a choice has a role; `finish_reason` is there, null until exactly one final chunk a choice; tool calls have
    an index; there is no usage but in its place; comments, pings and empty events are gone.

    `feed` raises BackendError for an error object, an event that is not JSON, or one that is too large. `finish` raises
    it when the end came without `[DONE]` or a choice has no `finish_reason`.
    """

    def __init__(self, wanted: Wanted) -> None:
        self.wanted = wanted
        self.done = False
        """`[DONE]` has been read."""
        self._splitter = SseSplitter()
        self._constant: JSON = {}
        self._choices: dict[int, _Choice] = {}
        self._usages: list[JSON] = []
        self._extras: JSON = {}
        self._tokens = 0
        self._pattern: _Pattern | None = None

    def feed(self, data: bytes) -> Chunk | None:
        """Take what has arrived; return what the caller gets for it, if anything."""
        try:
            block = self._splitter.feed(data)
        except EventTooLarge as error:
            raise BackendError(str(error)) from error
        if not block:
            return None
        if not self._plain(block):
            self._mixed(block)
        return self._output()

    @abstractmethod
    def finish(self) -> Iterator[Output]:
        """What is left to say at the end of the stream. Raises BackendError when that was no proper end."""

    @abstractmethod
    def _plain(self, block: bytes) -> bool:
        """Take `block`, if every event in it is one that needs no parsing."""

    @abstractmethod
    def _slow(self, payload: bytes) -> None:
        """Take one event by parsing it."""

    @abstractmethod
    def _output(self) -> Chunk | None:
        """What the caller gets for what was taken since the last time."""

    def _mixed(self, block: bytes) -> None:
        """Take events of all kinds: those that teach the pattern, then a run that fits it, then what is left."""
        for _ in range(TEACHERS):
            if self._pattern is not None:
                break
            end = block.find(b"\n\n") + 2
            self._one_by_one(block[:end])
            block = block[end:]
        front = self._front(block)
        if front and self._plain(block[:front]):
            block = block[front:]
        self._one_by_one(block)

    def _front(self, block: bytes) -> int:
        """Where the run of events that may fit the pattern ends, at the latest."""
        end = len(block)
        for form in FINISHED:
            at = block.find(form)
            if at >= 0:
                end = min(end, block.rfind(b"\n\n", 0, at) + 2)
        tail = self._pattern.tail if self._pattern is not None else b""
        return block.rfind(tail, 0, end) + len(tail) if tail and tail in block[:end] else 0

    def _one_by_one(self, block: bytes) -> None:
        if self.done:
            return
        for payload in payloads(block):
            if payload == b"[DONE]":
                self.done = True
                return
            if not self._plain(b"data: " + payload + b"\n\n"):
                self._slow(payload)

    def _parsed(self, payload: bytes) -> Any:
        try:
            return orjson.loads(payload)
        except orjson.JSONDecodeError as error:
            raise BackendError(f"the backend sent an event that is not JSON: {error}", transient=True) from error

    def _understood(self, payload: bytes) -> JSON | None:
        """The event, made right; None when there is nothing in it for the caller."""
        event = self._parsed(payload)
        if event is None:
            return None  # llama.cpp begins the answer to a list of prompts so
        if not isinstance(event, dict):
            raise BackendError("the backend sent an event that is not an object")
        if event.get("error") or event.get("object") == "error":
            raise stream_error(event)
        usage = event.pop("usage", None)
        if isinstance(usage, dict):
            self._usages.append(usage)
        choices = event.get("choices")
        if not isinstance(choices, list):
            return None
        self._make_constant(event)
        event["choices"] = [choice for choice in choices if isinstance(choice, dict) and self._make_right(choice)]
        if not event["choices"]:
            self._extras |= event
            return None
        return event

    def _make_constant(self, event: JSON) -> None:
        if not self._constant:
            created = event.get("created")
            self._constant = {
                "id": event.get("id") or self.wanted.fallback_id,
                "object": "chat.completion.chunk" if self.wanted.chat else "text_completion",
                "created": int(created if isinstance(created, int | float) else time.time()),
                "model": self.wanted.model,
            }
        event.update(self._constant)

    def _make_right(self, choice: JSON) -> bool:
        """Mend one choice in place; False when it has ended before."""
        index = choice.get("index")
        if not isinstance(index, int):
            index = choice["index"] = 0
        state = self._choices.get(index)
        if state is None:
            state = self._choices[index] = _Choice()
        if state.finished:
            return False
        reason = choice["finish_reason"] = choice.get("finish_reason") or None
        state.finished = reason is not None
        if self.wanted.chat:
            self._make_delta_right(choice, state)
            self._tokens += any(value for name, value in choice["delta"].items() if name != "role")
        else:
            self._tokens += bool(choice.get("text"))
        return True

    def _make_delta_right(self, choice: JSON, state: _Choice) -> None:
        delta = choice.get("delta")
        if not isinstance(delta, dict):
            delta = choice["delta"] = {}
        if not state.begun:
            state.begun = True
            if not delta.get("role"):
                choice["delta"] = delta = {"role": "assistant"} | {k: v for k, v in delta.items() if k != "role"}
        calls = delta.get("tool_calls")
        if calls:
            for call in calls:
                _give_index(call, state)

    @property
    def _ended(self) -> bool:
        """Some choice has ended: what comes now is looked at in full."""
        return any(choice.finished for choice in self._choices.values())

    def _take_tokens(self) -> int:
        tokens, self._tokens = self._tokens, 0
        return tokens

    def _check_end(self) -> None:
        if not self.done:
            raise BackendError("the backend's stream ended before it was complete", transient=True)
        if not self._choices or not all(choice.finished for choice in self._choices.values()):
            raise BackendError("the backend's stream ended without a finish_reason", transient=True)

    def _usage(self) -> JSON | None:
        return combined_usage(self._usages, self.wanted.n, self.wanted.choices)


def _give_index(call: JSON, state: _Choice) -> None:
    index = call.get("index")
    if not isinstance(index, int):
        # Without an index, a name or id is what tells a new call from more arguments for the last one.
        new = bool(call.get("id") or (call.get("function") or {}).get("name")) or not state.calls
        call["index"] = index = state.calls if new else state.calls - 1
    state.calls = max(state.calls, index + 1)


def _no_calls(block: bytes) -> bool:
    """Whether every `tool_calls` in it is null."""
    return block.count(TOOL_CALLS) == sum(block.count(TOOL_CALLS + form) for form in (b":null", b": null"))


def _finish_usage(usage: JSON | None) -> Usage | None:
    try:
        return None if usage is None else Usage.model_validate(usage)
    except ValidationError:
        return None


def _constant_bytes(event: JSON, include_usage: bool) -> bytes:
    """Everything but the choices, ready for `"choices":[…]}` to be put behind it."""
    rest = {name: value for name, value in event.items() if name != "choices"}
    if include_usage:
        rest["usage"] = None
    return b"data: " + orjson.dumps(rest)[:-1] + b',"choices":['


@dataclass(frozen=True, slots=True)
class _Pattern:
    """Events that begin and end so differ from one already understood only in what lies between."""

    head: bytes
    """With `data: `."""
    tail: bytes
    """With the empty line."""
    seam: bytes = field(init=False)
    """What lies between the texts of two such events."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "seam", self.tail + self.head)

    def fits(self, block: bytes) -> bool:
        """Whether `block` may be made of such events only: it begins and ends like one."""
        return (
            block.startswith(self.head) and block.endswith(self.tail) and len(block) >= len(self.head) + len(self.tail)
        )

    def between(self, block: bytes) -> bytes:
        return block[len(self.head) : -len(self.tail)]


def _same(payload: bytes, start: int, end: int, expected: JSON) -> bool:
    """Whether `payload` without [start:end] means `expected`."""
    try:
        return bool(orjson.loads(payload[:start] + payload[end:]) == expected)
    except orjson.JSONDecodeError:
        return False


class Relay(Answer):
    """For a caller who streams: whole SSE frames, as many as arrived together in one Chunk.

    What holds no output yet (a first delta with nothing but a role) waits for the first token, so that until then the
    attempt can still be given to another worker.
    """

    def __init__(self, wanted: Wanted) -> None:
        super().__init__(wanted)
        self._unfinished = b""
        self._new_head = b""
        self._new_seam = b""
        self._as_it_is = False
        self._learning = LEARNING_ATTEMPTS
        self._out: list[bytes] = []

    def finish(self) -> Iterator[Output]:
        self._check_end()
        usage = self._usage()
        if self.wanted.include_usage and usage is not None:
            last = {**self._extras, **self._constant, "choices": [], "usage": usage}
            self._out.append(b"data: " + orjson.dumps(last) + b"\n\n")
        if self._out:
            yield Chunk(b"".join(self._out), 0)
        yield Finish(_finish_usage(usage), "text/event-stream")

    def _output(self) -> Chunk | None:
        if not self._tokens:
            return None
        out, self._out = self._out, []
        return Chunk(out[0] if len(out) == 1 else b"".join(out), self._take_tokens())

    def _plain(self, block: bytes) -> bool:
        pattern = self._pattern
        if pattern is None or not pattern.fits(block):
            return False
        count, odd = divmod(block.count(b"\n"), 2)
        if (
            odd
            or (count > 1 and block.count(pattern.seam) != count - 1)
            or block.count(self._unfinished) != count
            or (TOOL_CALLS in block and not _no_calls(block))
        ):
            return False
        self._learning = LEARNING_ATTEMPTS
        self._tokens += count
        if not self._as_it_is:
            middle = pattern.between(block).replace(pattern.seam, self._new_seam)
            block = b"".join((self._new_head, middle, b"]}\n\n"))
        self._out.append(block)
        return True

    def _slow(self, payload: bytes) -> None:
        event = self._understood(payload)
        if event is None:
            return
        head = _constant_bytes(event, self.wanted.include_usage)
        if self._ended:
            self._pattern = None
        elif self._learning and self.wanted.choices == 1:
            self._learn(payload, head)
        self._out.append(head + orjson.dumps(event["choices"])[1:-1] + b"]}\n\n")

    def _learn(self, payload: bytes, new_head: bytes) -> None:
        """Take from this event what surrounds `choices`, if that is beyond doubt."""
        pattern = self._pattern
        if pattern is not None and payload.startswith(pattern.head[6:]) and payload.endswith(pattern.tail[:-2]):
            return
        event = orjson.loads(payload)
        event["choices"] = []
        start = payload.find(b"[", payload.find(b'"choices"')) + 1
        end = payload.rfind(b"]")
        unfinished = next((form for form in UNFINISHED if form in payload), b"")
        if not unfinished or not _same(payload, start, end, event):
            return
        self._learning -= 1
        self._unfinished = unfinished
        self._pattern = pattern = _Pattern(b"data: " + payload[:start], payload[end:] + b"\n\n")
        self._new_head = new_head
        self._new_seam = b"]}\n\n" + new_head
        self._as_it_is = event == orjson.loads(new_head[6:] + b"]}")


class Collector(Answer):
    """For a caller who does not stream: one body, at the end. Until then, once a second, a Chunk without data."""

    def __init__(self, wanted: Wanted) -> None:
        super().__init__(wanted)
        self._learning = LEARNING_ATTEMPTS
        self._texts: list[bytes] = []
        self._merged: dict[int, JSON] = {}
        self._top: JSON = {}
        self._last_sign = 0.0

    def finish(self) -> Iterator[Output]:
        self._check_end()
        self._flush()
        wanted = self.wanted
        if len(self._merged) < wanted.choices:
            raise BackendRefused(
                f"this backend does not support n > 1: it gave {len(self._merged)} of {wanted.choices} choices",
                param="n",
            )
        usage = self._usage()
        body = {**self._extras, **self._top, **self._constant}
        body["object"] = "chat.completion" if wanted.chat else "text_completion"
        body["choices"] = [finished_choice(choice, wanted.chat) for _, choice in sorted(self._merged.items())]
        if usage is not None:
            body["usage"] = usage
        yield Chunk(orjson.dumps(body), self._take_tokens())
        yield Finish(_finish_usage(usage))

    def _output(self) -> Chunk | None:
        now = time.monotonic()
        if self.done or not self._tokens or now - self._last_sign < SIGN_OF_LIFE_S:
            return None
        self._last_sign = now
        return Chunk(b"", self._take_tokens())

    def _plain(self, block: bytes) -> bool:
        """Take the texts out of `block`, if it is made of nothing but events that add text to the only choice.

        What then remains between their beginnings and ends holds no quote and no line end, or it is more than text.
        """
        pattern = self._pattern
        if pattern is None or not pattern.fits(block):
            return False
        between = pattern.between(block)
        text = between.replace(pattern.seam, b"")
        if b'"' in text or b"\n" in text:
            return False
        self._texts.append(text)
        self._tokens += 1 + (len(between) - len(text)) // len(pattern.seam)
        self._learning = LEARNING_ATTEMPTS
        return True

    def _flush(self) -> None:
        """Add the texts taken so far to the choice. Joined first: a character may be split over two events."""
        if self._texts:
            text = self._parsed(b'"' + b"".join(self._texts) + b'"')
            self._texts.clear()
            merge(self._merged[0], {"delta": {"content": text}} if self.wanted.chat else {"text": text})

    def _slow(self, payload: bytes) -> None:
        self._flush()
        event = self._understood(payload)
        if event is None:
            return
        for choice in event["choices"]:
            index = choice["index"]
            if index in self._merged:
                merge(self._merged[index], choice)
            else:
                self._merged[index] = choice
        self._top.update((name, value) for name, value in event.items() if value is not None and name != "choices")
        if self._ended:
            self._pattern = None
        elif self._learning and self.wanted.choices == 1:
            self._learn(payload)

    def _learn(self, payload: bytes) -> None:
        """Take from this event what surrounds its text, if the text is all that it adds."""
        if b'"role"' in payload:
            return
        event = orjson.loads(payload)
        target = _only_text(event, self.wanted.chat)
        name = "content" if self.wanted.chat else "text"
        if target is None or not target[name]:
            return
        start = payload.find(b'"', payload.find(b'"%b"' % name.encode()) + len(name) + 2) + 1
        end = payload.find(b'"', start)
        target[name] = ""
        if _same(payload, start, end, event):
            self._learning -= 1
            self._pattern = _Pattern(b"data: " + payload[:start], payload[end:] + b"\n\n")


def _only_text(event: JSON, chat: bool) -> JSON | None:
    """The object that holds the text of an event that adds nothing but text to choice 0; None for any other event."""
    choice = event["choices"][0]
    if len(event["choices"]) != 1 or choice.get("index", 0) != 0 or isinstance(event.get("usage"), dict):
        return None
    name = "content" if chat else "text"
    target = choice.get("delta") if chat else choice
    if not isinstance(target, dict) or not isinstance(target.get(name), str):
        return None
    others = [v for k, v in target.items() if k != name] + [v for k, v in choice.items() if k not in ("delta", name)]
    return target if all(value is None or value == 0 for value in others) else None
