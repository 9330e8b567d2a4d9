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
from workers.backends import broken_text
from workers.backends.base import BackendError, BackendRefused, Chunk, Finish, Output
from workers.backends.merging import combined_usage, finished_choice, merge
from workers.backends.refusals import stream_error
from workers.backends.sse import EventTooLarge, SseSplitter, payloads
from workers.backends.tool_calls import ToolCalls

JSON = dict[str, Any]

SIGN_OF_LIFE_S = 1.0
LEARNING_ATTEMPTS = 3
"""How often in a row a pattern may be learnt and never match, before it is left at parsing."""
TEACHERS = 2
"""Events within which a server's form shows: the first has a role, the second only text."""
UNFINISHED = (b'"finish_reason":null', b'"finish_reason": null')
FINISHED = (b'"finish_reason":"', b'"finish_reason": "')
TOOL_CALLS = b'"tool_calls"'
ESCAPE = rb"\u"
ROLE = b'"role"'
ROLES = (b'"role":"assistant",', b'"role": "assistant", ')
"""As servers write it that repeat it in every delta. A quote inside a string is escaped: these match structure alone."""
REASONS = {
    "complete": "stop",
    "end_turn": "stop",
    "eos": "stop",
    "eos_token": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "model_length": "length",
    "tool_call": "tool_calls",
    "tool_use": "tool_calls",
    "safety": "content_filter",
}
"""Other servers' words for OpenAI's `finish_reason`."""
OPENAI_REASONS = frozenset({"stop", "length", "tool_calls", "content_filter"})
USUAL_FIELDS = frozenset({"index", "delta", "text", "logprobs", "finish_reason"})
"""Of a choice; what a server adds to them when it ends belongs into the final chunk."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the caller asked for, as far as it shapes the answer."""

    chat: bool
    model: str
    """The name that the answer carries."""
    fallback_id: str
    include_usage: bool = False
    continuous_usage: bool = False
    """Each event carries the usage so far, as vLLM and SGLang can."""
    n: int = 1
    prompts: int = 1
    single_call: bool = False
    """At most one tool call a choice: `parallel_tool_calls` is false."""

    @property
    def choices(self) -> int:
        return self.n * self.prompts


@dataclass(slots=True)
class _Choice:
    """What has been seen of one choice."""

    begun: bool = False
    reason: str | None = None
    """The newest `finish_reason`: it is final once the stream has ended."""
    calls: ToolCalls | None = None
    final: JSON | None = None
    """Fields of the final chunk beside the reason."""


class Answer(ABC):
    """A server's answer as it arrives.

    What comes out of it holds, whatever the server does: `id`, `created`, `model` and `object` are constant; the first
    delta of a choice has a role, and no other; `finish_reason` is there, null until exactly one final chunk a choice, after
    its last text; tool calls are as `ToolCalls` says; characters are whole; there is no usage but in its place; comments,
    pings and empty events are gone.

    `feed` raises BackendError for an error object, an event that is not JSON, or one that is too large. `finish` raises
    it when the stream ended with neither `[DONE]` nor a `finish_reason` for each choice.
    """

    def __init__(self, wanted: Wanted) -> None:
        self.wanted = wanted
        self.done = False
        """`[DONE]` has been read."""
        self._splitter = SseSplitter()
        self._constant: JSON = {}
        self._choices: dict[int, _Choice] = {}
        self._usages: list[JSON] = []
        self._joiner = broken_text.TextJoiner()
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
            event = orjson.loads(payload)
        except orjson.JSONDecodeError:
            event = self._joiner.repair(self._parsed_broken(payload))
        else:
            if self._joiner.open:
                event = self._joiner.repair(event)
        return event

    def _parsed_broken(self, payload: bytes) -> Any:
        try:
            return broken_text.parse(payload)
        except (ValueError, RecursionError) as error:
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
            if self.wanted.continuous_usage:
                event["usage"] = usage
        choices = event.get("choices")
        if not isinstance(choices, list):
            return None
        self._make_constant(event)
        event["choices"] = [choice for choice in choices if isinstance(choice, dict) and self._make_right(choice)]
        if not event["choices"]:
            event.pop("usage", None)
            self._extras = self._extras | event if self._extras else event
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
            if event.get("system_fingerprint") is not None:
                self._constant["system_fingerprint"] = event["system_fingerprint"]
        event.update(self._constant)

    def _make_right(self, choice: JSON) -> bool:
        """Repair one choice in place; False when it holds nothing for the caller before the end."""
        index = choice.get("index")
        if not isinstance(index, int):
            index = choice["index"] = 0
        state = self._choices.get(index)
        if state is None:
            state = self._choices[index] = _Choice()
        reason, choice["finish_reason"] = choice.get("finish_reason"), None
        if self.wanted.chat:
            delta = self._repaired_delta(choice, state)
            says = any(delta.values())
        else:
            says = bool(choice.get("text"))
        self._tokens += says
        if reason is not None and (reason := _standard_reason(reason)) is not None:
            state.reason = reason
        if not says and state.reason is not None:
            state.final = choice if state.final is None else {**choice, **state.final}
            return False
        if reason is not None:
            self._keep_for_the_end(choice, state)
        if self.wanted.chat and not state.begun:
            state.begun = True
            choice["delta"] = {"role": "assistant", **choice["delta"]}
        return True

    def _repaired_delta(self, choice: JSON, state: _Choice) -> JSON:
        """Repair the delta in place; its role is left out."""
        delta = choice.get("delta")
        if not isinstance(delta, dict):
            delta = choice["delta"] = {}
        delta.pop("role", None)
        if "tool_calls" in delta:
            if state.calls is None:
                state.calls = ToolCalls(1 if self.wanted.single_call else None)
            calls = state.calls.repair(delta.pop("tool_calls"))
            if calls:
                delta["tool_calls"] = calls
        return delta

    def _keep_for_the_end(self, choice: JSON, state: _Choice) -> None:
        """Move what belongs beside a `finish_reason` (`stop_reason`, …) from a choice with text to the final one."""
        others = {name: choice.pop(name) for name in choice.keys() - USUAL_FIELDS}
        state.final = {"index": choice["index"], **(state.final or {}), **others}

    def _final_choices(self) -> Iterator[JSON]:
        """Return the last choice of each index: the reason, and what is still missing."""
        chat = self.wanted.chat
        for index, state in sorted(self._choices.items()) if len(self._choices) > 1 else self._choices.items():
            final = state.final or {"index": index}
            final["finish_reason"] = state.reason
            if chat:
                final["delta"] = self._final_delta(index, state, final.get("delta") or {})
            else:
                final["text"] = self._joiner.rest(("choices", index, "text"))
            yield final

    def _final_delta(self, index: int, state: _Choice, delta: JSON) -> JSON:
        if not state.begun:
            delta = {"role": "assistant", **delta}
        if self._joiner.open and (rest := self._joiner.rest(("choices", index, "delta", "content"))):
            delta["content"] = rest
        if state.calls is not None and (calls := state.calls.missing_arguments()):
            delta["tool_calls"] = calls
        return delta

    @property
    def _ended(self) -> bool:
        """A `finish_reason` has come: what comes now is looked at in full."""
        return any(choice.reason is not None for choice in self._choices.values())

    def _take_tokens(self) -> int:
        tokens, self._tokens = self._tokens, 0
        return tokens

    def _check_end(self) -> None:
        """Decide on each choice's `finish_reason`. Raises BackendError where the answer is not complete."""
        choices = self._choices.values()
        if not self.done and not (choices and all(choice.reason is not None for choice in choices)):
            raise BackendError("the backend's stream ended before it was complete", transient=True)
        if not choices:
            raise BackendError("the backend's stream ended without an answer", transient=True)
        for choice in choices:
            if choice.reason in (None, "stop"):
                choice.reason = "tool_calls" if choice.calls else "stop"

    def _usage(self) -> JSON | None:
        return combined_usage(self._usages, self.wanted.n, self.wanted.choices)


def _too_few(given: int, wanted: int) -> BackendRefused:
    return BackendRefused(f"this backend does not support n > 1: it gave {given} of {wanted} choices", param="n")


def _standard_reason(reason: Any) -> str | None:
    """Return OpenAI's word for a `finish_reason`; None where it is missing."""
    if not isinstance(reason, str) or not reason:
        return None
    if reason in OPENAI_REASONS:
        return reason
    lower = reason.lower()
    return REASONS.get(lower, lower if lower in OPENAI_REASONS else reason)


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
        rest.setdefault("usage", None)
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
        self._ended_out = False
        self._out: list[bytes] = []

    def finish(self) -> Iterator[Output]:
        self._say_end()
        if self._out:
            yield Chunk(b"".join(self._out), 0)
        yield Finish(_finish_usage(self._usage()), "text/event-stream")

    def _say_end(self) -> None:
        """Write the final chunks and the usage, once."""
        if self._ended_out:
            return
        self._check_end()
        if len(self._choices) < self.wanted.choices:
            raise _too_few(len(self._choices), self.wanted.choices)
        self._ended_out = True
        usage, final = self._usage(), {**self._extras, **self._constant}
        head = _constant_bytes(final, self.wanted.include_usage)
        self._out += [head + orjson.dumps(choice) + b"]}\n\n" for choice in self._final_choices()]
        if self.wanted.include_usage and usage is not None:
            self._out.append(b"data: " + orjson.dumps({**final, "choices": [], "usage": usage}) + b"\n\n")

    def _output(self) -> Chunk | None:
        if self.done:
            self._say_end()
        if not self._tokens:
            return None
        out, self._out = self._out, []
        return Chunk(out[0] if len(out) == 1 else b"".join(out), self._take_tokens())

    def _plain(self, block: bytes) -> bool:
        pattern = self._pattern
        if pattern is None or self._joiner.open or not pattern.fits(block):
            return False
        count, odd = divmod(block.count(b"\n"), 2)
        if (
            odd
            or (count > 1 and block.count(pattern.seam) != count - 1)
            or block.count(self._unfinished) != count
            or (TOOL_CALLS in block and not _no_calls(block))
            or ((ESCAPE in block or not block.isascii()) and not broken_text.is_whole(block))
        ):
            return False
        if ROLE in block:
            for form in ROLES:
                block = block.replace(form, b"")
            if ROLE in block:
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
        if not broken_text.is_whole(payload):
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
        for choice in self._final_choices():
            self._add(choice)
        if len(self._merged) < wanted.choices:
            raise _too_few(len(self._merged), wanted.choices)
        usage = self._usage()
        body = {**self._extras, **self._top, **self._constant}
        body["object"] = "chat.completion" if wanted.chat else "text_completion"
        body["choices"] = [finished_choice(choice, wanted.chat) for _, choice in sorted(self._merged.items())]
        if usage is not None:
            body["usage"] = usage
        yield Chunk(orjson.dumps(body), self._take_tokens())
        yield Finish(_finish_usage(usage))

    def _add(self, choice: JSON) -> None:
        merged = self._merged.setdefault(choice["index"], choice)
        if merged is not choice:
            merge(merged, choice)

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
        if pattern is None or self._joiner.open or not pattern.fits(block):
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
            text = b'"' + b"".join(self._texts) + b'"'
            self._texts.clear()
            # As an event, so that halves of characters find each other.
            event = b'{"choices":[{%b}]}' % ((b'"delta":{"content":%b}' if self.wanted.chat else b'"text":%b') % text)
            choice, into = self._parsed(event)["choices"][0], self._merged[0]
            if self.wanted.chat:
                choice, into = choice["delta"], into["delta"]
            merge(into, choice)

    def _slow(self, payload: bytes) -> None:
        self._flush()
        event = self._understood(payload)
        if event is None:
            return
        for choice in event["choices"]:
            self._add(choice)
        self._top.update((name, value) for name, value in event.items() if value is not None and name != "choices")
        if self._ended:
            self._pattern = None
        elif self._learning and self.wanted.choices == 1:
            self._learn(payload)

    def _learn(self, payload: bytes) -> None:
        """Take from this event what surrounds its text, if the text is all that it adds."""
        if ROLE in payload or not broken_text.is_whole(payload):
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
