"""From an OpenAI-compatible server's event stream to what the caller gets: pure.

`CompletionRelay` answers a caller who streams, `CompletionCollector` one who does not. Both make right what servers get wrong (see
`CompletionReader`), and both recognise, by comparing bytes, the events that need no parsing: those that differ from an event
already understood only in their text. Inside a JSON string a quote is always escaped and a line end never stands
alone, so a pattern that holds either can only match structure, never what the model said.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import orjson
from pydantic import ValidationError

from schemas.jobs import Usage
from workers.adapter_kit.error_mapping import error_from_payload, is_error_body
from workers.adapter_kit.sse import FIELDS, EventTooLarge, SseSplitter, is_done_marker, lenient_payloads
from workers.adapter_kit.text import unicode_repair
from workers.adapter_kit.text.choices import repair_function_call, take_delta, take_text, take_tool_calls
from workers.adapter_kit.text.chunk_merge import combine_usage, finish_choice, merge_choice, merge_objects
from workers.adapter_kit.text.finish_reasons import is_failure, standard_reason
from workers.adapter_kit.text.token_usage import final_usage, take_usage
from workers.adapter_kit.text.tool_calls import ToolCallRepair
from workers.backends.base import BackendError, BackendRefused, Chunk, Finish, Output

JSON = dict[str, Any]

SIGN_OF_LIFE_S = 1.0
LEARNING_ATTEMPTS = 3
"""How often in a row a pattern may be learnt and never match, before it is left at parsing."""
TEACHERS = 2
"""Events within which a server's form shows: the first has a role, the second only text."""
UNFINISHED = (b'"finish_reason":null', b'"finish_reason": null')
FINISHED = (b'"finish_reason":"', b'"finish_reason": "')
CALLS = (b'"tool_calls"', b'"function_call"')
CALL = b"_call"
NO_NUMBERS = (b"NaN", b"Infinity")
"""Python's servers write them, JSON has none."""
ESCAPE = rb"\u"
ROLE = b'"role"'
ROLES = (b'"role":"assistant",', b'"role": "assistant", ', b',"role":"assistant"', b', "role": "assistant"')
"""As servers write it that repeat it in every delta. A quote inside a string is escaped: these match structure alone."""
INDEXES = (b'"index":0', b'"index": 0')
USUAL_FIELDS = frozenset({"index", "delta", "text", "logprobs", "finish_reason"})
"""Of a choice; what a server adds to them when it ends belongs into the final chunk."""
UNUSUAL_FIELDS = frozenset({"message", "error", "usage"})
"""Of a choice, which must be parsed."""
MILLISECONDS = 100_000_000_000
"""`created` above this is none in seconds."""
PINGS = frozenset({b"ping", b"pong", b"heartbeat", b"keep-alive", b"keepalive"})


@dataclass(frozen=True, slots=True)
class CompletionOptions:
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
    legacy_functions: bool = False
    """The caller sent `functions`, and reads `function_call`."""
    stream: bool = False
    whole_calls: bool = False
    """The server sends a tool call in one piece."""

    @property
    def choices(self) -> int:
        return self.n * self.prompts


@dataclass(slots=True)
class _ChoiceState:
    """What has been seen of one choice."""

    begun: bool = False
    reason: str | None = None
    """The newest `finish_reason`: it is final once the stream has ended."""
    settled: bool = False
    """It came without text, and no text has come since."""
    said: set[str] = field(default_factory=set)
    """The texts of its deltas that were not empty."""
    calls: ToolCallRepair | None = None
    function: str | None = None
    """The name of its `function_call`, OpenAI's older form."""
    final: JSON | None = None
    """Fields of the final chunk beside the reason."""


class CompletionReader(ABC):
    """A server's answer as it arrives.

    What comes out of it holds, whatever the server does: `id`, `created`, `model` and `object` are constant; the first
    delta of a choice has a role, and no other; `finish_reason` is there, null until exactly one final chunk a choice, after
    its last text; tool calls are as `ToolCallRepair` says; characters are whole; there is no usage but in its place; comments,
    pings and empty events are gone.

    `feed` raises BackendError for an error object, an event that is not JSON, or one that is too large. `finish` raises
    it when the stream ended with neither `[DONE]` nor a `finish_reason` for each choice.
    """

    def __init__(self, wanted: CompletionOptions) -> None:
        self.wanted = wanted
        self.done = False
        """`[DONE]` has been read."""
        self._splitter = SseSplitter(single_lines=True)
        self._constant: JSON = {}
        self._choices: dict[int, _ChoiceState] = {}
        self._usages: list[JSON] = []
        self._joiner = unicode_repair.CharacterJoiner()
        self._extras: JSON = {}
        self._tokens = 0
        self._pattern: _EventPattern | None = None
        self._at_end = False

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

    def feed_end(self) -> Chunk | None:
        """Take the end of the stream: its last event may lack its empty line, or be cut off where the answer is complete without it."""
        self._at_end = True
        return self.feed(b"\n\n")

    @property
    def is_complete(self) -> bool:
        """Whether the answer is complete, also where the connection breaks now.

        Not by a `finish_reason` beside text: some servers put one into every event.
        """
        choices = self._choices.values()
        return len(choices) >= self.wanted.choices and all(choice.settled for choice in choices)

    def feed_whole(self, data: bytes, *, cut_short: bool = False) -> Chunk | None:
        """Take an answer that was read to its end: JSON, JSON by the line, or a stream after all.

        Raises BackendError, transient where `cut_short` says that the end of the data may be missing.
        """
        text = data.strip()
        if text.startswith(FIELDS):
            return self.feed(data + b"\n\n")
        body, mark, tail = text.rpartition(b"data:")
        if mark and is_done_marker(tail):  # behind JSON that is no event
            text = body.strip()
        lines = text.split(b"\n")
        if len(lines) > 1 and all(map(_is_object, filter(None, map(bytes.strip, lines)))):
            for line in filter(None, map(bytes.strip, lines)):
                self._slow(line)
        else:
            self._take_whole(text, cut_short)
        self.done = True
        return self._output()

    def _take_whole(self, text: bytes, cut_short: bool) -> None:
        try:
            answer = orjson.loads(text)
        except orjson.JSONDecodeError:
            try:
                answer = unicode_repair.CharacterJoiner(last=True).repair(unicode_repair.parse_broken_json(text))
            except (ValueError, RecursionError) as error:
                raise BackendError("the backend's answer is not JSON", transient=cut_short) from error
        answer = _unwrapped(answer)
        if is_error_body(answer):
            raise error_from_payload(answer)
        choices = answer.get("choices") if isinstance(answer, dict) else None
        if not isinstance(choices, list) or not choices:
            raise BackendError("the backend's answer has no choices")
        self._take(text, answer)

    @abstractmethod
    def finish(self) -> Iterator[Output]:
        """What is left to say at the end of the stream. Raises BackendError when that was no proper end."""

    @abstractmethod
    def _plain(self, block: bytes) -> bool:
        """Take `block`, if every event in it is one that needs no parsing."""

    @abstractmethod
    def _take(self, payload: bytes, event: Any) -> None:
        """Take one event, which was parsed."""

    def _passed_on(self) -> set[str]:
        """The names of texts that were taken unparsed, beside those that events said which were parsed."""
        return set()

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
        for payload in lenient_payloads(block):
            if is_done_marker(payload):
                self.done = True
                return
            if not self._plain(b"data: " + payload + b"\n\n"):
                self._slow(payload)

    def _slow(self, payload: bytes) -> None:
        """Take one event by parsing it."""
        try:
            event = self._parsed(payload)
        except BackendError:
            if _is_noise(payload) or (self._at_end and self.is_complete):
                return
            if payload.lower().startswith(b"error"):
                raise error_from_payload(payload.decode("utf-8", "replace")) from None
            raise
        self._take(payload, event)

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
            return unicode_repair.parse_broken_json(payload)
        except (ValueError, RecursionError) as error:
            raise BackendError(f"the backend sent an event that is not JSON: {error}", transient=True) from error

    def _understood(self, event: Any) -> JSON | None:
        """The event, made right; None when there is nothing in it for the caller."""
        choices = event.get("choices") if isinstance(event, dict) else None
        if not isinstance(choices, list) or "error" in event:
            event = _without_complaint(_unwrapped(event))
            event.pop("error", None)  # empty, and some clients throw at an empty object
            choices = event.get("choices")
        if "usage" in event or "x_groq" in event:
            self._count(event, take_usage(event))
        if not isinstance(choices, list):
            return None
        if choices:
            self._make_constant(event)
        alone = len(choices) == self.wanted.choices == 1
        event["choices"] = choices = [
            one for one in choices if isinstance(one, dict) and self._make_right(one, event, alone=alone)
        ]
        if not choices:
            event.pop("usage", None)
            self._extras = self._extras | event if self._extras else event
            return None
        return cast("JSON", event)

    def _count(self, event: JSON, usage: JSON | None) -> None:
        if usage is not None:
            self._usages.append(usage)
            if (
                len(self._usages) > self.wanted.choices + 1
            ):  # one in each event: of these, the last that counts is enough
                self._usages[:2] = [final_usage(self._usages[:2])]
            if self.wanted.continuous_usage:
                event["usage"] = usage

    def _make_constant(self, event: JSON) -> None:
        if not self._constant:
            self._constant = {
                "id": str(event.get("id") or self.wanted.fallback_id),
                "object": "chat.completion.chunk" if self.wanted.chat else "text_completion",
                "created": _seconds(event.get("created")),
                "model": self.wanted.model,
            }
            if event.get("system_fingerprint") is not None:
                self._constant["system_fingerprint"] = event["system_fingerprint"]
        event.update(self._constant)

    def _make_right(self, choice: JSON, event: JSON, *, alone: bool) -> bool:
        """Repair a choice in place; False when it holds nothing for the caller before the end. `alone`: it is the only one ever."""
        index = 0 if alone else choice.get("index")  # some count their events there
        if not isinstance(index, int) or index < 0:
            index = 0
        choice["index"] = index
        if "usage" in choice:
            self._count(event, take_usage(choice))
        state = self._choices.get(index)
        if state is None:
            state = self._choices[index] = _ChoiceState()
        reason, choice["finish_reason"] = choice.get("finish_reason"), None
        if self.wanted.chat:
            in_pieces = "delta" in choice
            if reason and not in_pieces and isinstance(choice.get("message"), dict):
                _leave_out_said(choice["message"], state.said | self._passed_on())
            delta = self._repaired_delta(choice, state)
            says = any(delta.values())
            if says and in_pieces:
                state.said.update(name for name, value in delta.items() if value)
        else:
            says = bool(take_text(choice))
        self._tokens += says
        if reason is not None and (reason := standard_reason(reason)) is not None:
            if is_failure(reason) or choice.get("error"):
                raise _broken_off(choice, reason)
            state.reason = reason
            state.settled = not says
        elif says:
            state.settled = False
        if not says and state.reason is not None:
            state.final = choice if state.final is None else {**choice, **state.final}
            return False
        if reason is not None:
            self._keep_for_the_end(choice, state)
        if self.wanted.chat and not state.begun:
            state.begun = True
            choice["delta"] = {"role": "assistant", **choice["delta"]}
        return True

    def _repaired_delta(self, choice: JSON, state: _ChoiceState) -> JSON:
        """Repair the delta in place; its role is left out."""
        delta = take_delta(choice)
        if "tool_calls" in delta or "function_call" in delta:
            calls = take_tool_calls(delta, legacy=self.wanted.legacy_functions)
            if "function_call" in delta:
                state.function = repair_function_call(delta, state.function or "")
            elif calls:
                if state.calls is None:
                    state.calls = ToolCallRepair(
                        1 if self.wanted.single_call else None, come_whole=self.wanted.whole_calls
                    )
                repaired = state.calls.repair(calls)
                if repaired:
                    delta["tool_calls"] = repaired
        return delta

    def _keep_for_the_end(self, choice: JSON, state: _ChoiceState) -> None:
        """Move what belongs beside a `finish_reason` (`stop_reason`, …) from a choice with text to the final one."""
        others = {name: choice.pop(name) for name in choice.keys() - USUAL_FIELDS}
        state.final = {"index": choice["index"], **(state.final or {}), **others}

    def _final_choices(self) -> Iterator[JSON]:
        """Return the last choice of each index: the reason, and what is still missing."""
        chat = self.wanted.chat
        for index, state in sorted(self._choices.items()) if len(self._choices) > 1 else self._choices.items():
            final = state.final or {"index": index}
            if state.calls is not None and (calls := state.calls.rest()):
                role = {} if state.begun else {"role": "assistant"}
                state.begun = True
                yield {"index": index, "delta": {**role, "tool_calls": calls}, "finish_reason": None}
            final["finish_reason"] = state.reason
            if chat:
                final["delta"] = self._final_delta(index, state, final.get("delta") or {})
            else:
                final["text"] = self._joiner.rest(("choices", index, "text"))
            yield final

    def _final_delta(self, index: int, state: _ChoiceState, delta: JSON) -> JSON:
        if not state.begun:
            delta = {"role": "assistant", **delta}
        if self._joiner.open:
            delta |= self._joiner.halves(("choices", index, "delta"))
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
            choice.reason = _final_reason(choice)

    def _usage(self) -> JSON | None:
        return combine_usage(self._usages, self.wanted.n, self.wanted.choices)


def _too_few(given: int, wanted: int) -> BackendRefused:
    return BackendRefused(f"this backend does not support n > 1: it gave {given} of {wanted} choices", param="n")


def _final_reason(choice: _ChoiceState) -> str:
    """Return the `finish_reason`; calls decide it where a server says `stop`, or the older form's word for the newer one."""
    reason = choice.reason or "stop"
    if choice.function is not None:
        return "function_call" if reason in ("stop", "tool_calls") else reason
    if choice.calls:
        return "tool_calls" if reason in ("stop", "function_call") else reason
    return "stop" if reason == "function_call" else reason


def _broken_off(choice: JSON, reason: str) -> BackendError:
    error = choice.get("error")
    if error:
        return error_from_payload({"error": error})
    return BackendError(f"the backend broke the answer off: {reason}", transient=True)


def _leave_out_said(message: JSON, said: set[str]) -> None:
    """Take out of a whole message, which MiniMax sends behind the deltas, the texts that these have said."""
    for name in [name for name, value in message.items() if name in said and isinstance(value, str)]:
        del message[name]


def _unwrapped(event: Any) -> Any:
    """Return what some gateways put into `data`, and Gemini into a list of one."""
    if isinstance(event, list) and len(event) == 1:
        event = event[0]
    if isinstance(event, dict) and "choices" not in event:
        inner = event.get("data")
        if isinstance(inner, dict) and "choices" in inner:
            return inner
    return event


def _without_complaint(event: Any) -> JSON:
    """Return an event that is an object. Raises BackendError for an error."""
    if not event:
        return {}  # llama.cpp begins the answer to a list of prompts with null
    if is_error_body(event):
        raise error_from_payload(event)
    if not isinstance(event, dict):
        raise BackendError("the backend sent an event that is not an object")
    return event


def _seconds(created: Any) -> int:
    """Return a time in whole seconds, now where a server gives none."""
    if isinstance(created, str) and created.strip().isdecimal():
        created = int(created)
    if not isinstance(created, int | float) or not math.isfinite(created) or created <= 0:
        return int(time.time())
    return int(created / 1000 if created > MILLISECONDS else created)


def _is_noise(payload: bytes) -> bool:
    """Whether an event that is not JSON only keeps the connection alive."""
    return payload.startswith(b":") or not payload.strip() or payload.strip().lower() in PINGS


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(orjson.loads(line), dict)
    except orjson.JSONDecodeError:
        return False


def _no_calls(block: bytes) -> bool:
    """Whether every `tool_calls` and `function_call` in it is null."""
    return all(block.count(name) == sum(block.count(name + form) for form in (b":null", b": null")) for name in CALLS)


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
class _EventPattern:
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


class CompletionRelay(CompletionReader):
    """For a caller who streams: whole SSE frames, as many as arrived together in one Chunk.

    What holds no output yet (a first delta with nothing but a role) waits for the first token, so that until then the
    attempt can still be given to another worker.
    """

    def __init__(self, wanted: CompletionOptions) -> None:
        super().__init__(wanted)
        self._unfinished = b""
        self._index = b""
        self._name = ""
        """What the pattern's text is called."""
        self._wide = False
        """The pattern ends before a choice does: what follows its text differs from event to event, as `logprobs` do."""
        self._learnt = False
        self._new_tail = b""
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
            or (self._wide and not self._is_sound(block, count))
            or (CALL in block and not _no_calls(block))
            or ((ESCAPE in block or not block.isascii()) and not unicode_repair.has_whole_characters(block))
        ):
            return False
        if not self._as_it_is:
            middle = pattern.between(block).replace(pattern.seam, self._new_seam)
            block = b"".join((self._new_head, middle, self._new_tail))
        if ROLE in block:
            block = _without_role(block)
            if ROLE in block:
                return False
        self._learning = LEARNING_ATTEMPTS
        self._tokens += count
        self._out.append(block)
        return True

    def _is_sound(self, block: bytes, count: int) -> bool:
        """Whether what follows the texts of `count` events, which the pattern does not hold, needs no repair."""
        return (
            block.count(self._unfinished) == count
            and (not self._index or block.count(self._index) == count)
            and not any(word in block for word in NO_NUMBERS)
        )

    def _passed_on(self) -> set[str]:
        passed = self._pattern is not None and self._learning == LEARNING_ATTEMPTS  # reset by each run of plain events
        return {self._name} if passed else set()

    def _take(self, payload: bytes, event: Any) -> None:
        event = self._understood(event)
        if event is None:
            return
        head = _constant_bytes(event, self.wanted.include_usage)
        if self._ended:
            self._pattern = None
        elif self._learning and self.wanted.choices == 1:
            self._learn(payload, head)
        self._out.append(head + orjson.dumps(event["choices"])[1:-1] + b"]}\n\n")

    def _learn(self, payload: bytes, new_head: bytes) -> None:
        """Take from this event what surrounds its text and what follows, if that is beyond doubt."""
        pattern = self._pattern
        if pattern is not None and payload.startswith(pattern.head[6:]) and payload.endswith(pattern.tail[:-2]):
            return
        event = _learnable(payload)
        unfinished = next((form for form in UNFINISHED if form in payload), b"")
        if event is None or not unfinished:
            return
        choice, event["choices"] = event["choices"][0], []
        begin = payload.find(b"[", payload.find(b'"choices"')) + 1
        end = payload.rfind(b"]")
        written = payload[begin:end]
        front, back = _around_text(written, choice, self.wanted.chat)
        self._name = front.rpartition(b'"')[0].rpartition(b'":')[0].rpartition(b'"')[2].decode()
        if not front or not _same(payload, begin, end, event):
            return
        self._wide = not _is_steady(choice, self.wanted.chat)
        if self._wide:
            back = b""
        plain_front, plain_back = _without_role(front), _without_role(back)
        if ROLE in plain_front or ROLE in plain_back:
            return
        self._learning -= 1
        if not self._learnt:  # the first event has a role, and most servers never repeat it
            front, back = plain_front, plain_back
        self._learnt = True
        self._unfinished = unfinished
        self._index = b"" if b'"index"' in front else next((one for one in INDEXES if one in written), b"")
        head, tail = payload[:begin] + front, back + payload[end:]
        self._pattern = _EventPattern(b"data: " + head, tail + b"\n\n")
        if "index" not in choice:
            plain_front = b'{"index":0,' + plain_front.partition(b"{")[2]
        self._new_head = new_head + plain_front
        self._new_tail = plain_back + b"]}\n\n"
        self._new_seam = self._new_tail + self._new_head
        self._as_it_is = self._new_head[6:] == head and self._new_tail[:-2] == tail


class CompletionCollector(CompletionReader):
    """For a caller who does not stream: one body, at the end. Until then, once a second, a Chunk without data."""

    def __init__(self, wanted: CompletionOptions) -> None:
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
        body["choices"] = [finish_choice(choice, wanted.chat) for _, choice in sorted(self._merged.items())]
        if usage is not None:
            body["usage"] = usage
        yield Chunk(orjson.dumps(body), self._take_tokens())
        yield Finish(_finish_usage(usage))

    def _add(self, choice: JSON) -> None:
        merged = self._merged.setdefault(choice["index"], choice)
        if merged is not choice:
            merge_choice(merged, choice)

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
            merge_objects(into, choice)

    def _slow(self, payload: bytes) -> None:
        self._flush()  # before it: this event may end with half a character, or begin with one
        super()._slow(payload)

    def _take(self, payload: bytes, event: Any) -> None:
        event = self._understood(event)
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
        event = None if ROLE in payload else _learnable(payload)
        if event is None:
            return
        target = _only_text(event, self.wanted.chat)
        name = "content" if self.wanted.chat else "text"
        if target is None or not target[name]:
            return
        start = payload.find(b'"', payload.find(b'"%b"' % name.encode()) + len(name) + 2) + 1
        end = payload.find(b'"', start)
        target[name] = ""
        if _same(payload, start, end, event):
            self._learning -= 1
            self._pattern = _EventPattern(b"data: " + payload[:start], payload[end:] + b"\n\n")


def _learnable(payload: bytes) -> JSON | None:
    """Return an event with one usual choice, of which a pattern may be learnt."""
    if not unicode_repair.has_whole_characters(payload):
        return None
    try:
        event = orjson.loads(payload)
    except orjson.JSONDecodeError:
        return None
    choices = event.get("choices") if isinstance(event, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        return None
    choice = choices[0]
    return event if choice.get("index", 0) == 0 and not choice.keys() & UNUSUAL_FIELDS else None


def _around_text(written: bytes, choice: JSON, chat: bool) -> tuple[bytes, bytes]:
    """Return how a choice is written up to its first text, and after it, with the quotes; nothing where that is not beyond doubt."""
    target = choice.get("delta") if chat else choice
    if not isinstance(target, dict):
        return b"", b""
    name = next((k for k, v in target.items() if isinstance(v, str) and k != "role"), "") if chat else "text"
    if not isinstance(target.get(name), str):
        return b"", b""
    at = written.find(b'"%b"' % name.encode())
    start = written.find(b'"', at + len(name) + 2) + 1
    end = written.find(b'"', start)
    target[name] = ""
    return (written[:start], written[end:]) if _same(written, start, end, choice) else (b"", b"")


def _is_steady(choice: JSON, chat: bool) -> bool:
    """Whether nothing but its text, which is empty now, sets a choice apart from the next."""
    delta = choice["delta"].items() if chat else ()
    values = [v for k, v in (*choice.items(), *delta) if k not in ("delta", "role")]
    return all(not value for value in values)


def _without_role(text: bytes) -> bytes:
    for form in ROLES:
        text = text.replace(form, b"")
    return text


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


def new_completion_reader(wanted: CompletionOptions) -> CompletionReader:
    """Return the reader of an answer for this caller."""
    return CompletionRelay(wanted) if wanted.stream else CompletionCollector(wanted)
