"""Reading an OpenAI-compatible server's answer: events are parsed, repaired and made uniform. Pure.

`CompletionReader` holds what its two subclasses share; `CompletionRelay` answers a caller who streams, and
`CompletionCollector` one who does not.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, cast

import orjson
from pydantic import ValidationError

from schemas.jobs import Usage
from workers.adapter_kit.error_mapping import error_from_payload, is_error_body
from workers.adapter_kit.sse import FIELDS, EventTooLarge, SseSplitter, is_done_marker, lenient_payloads
from workers.adapter_kit.text import unicode_repair
from workers.adapter_kit.text.choice_state import ChoiceState, broken_off_error, remove_repeated_texts
from workers.adapter_kit.text.choices import repair_function_call, take_delta, take_text, take_tool_calls
from workers.adapter_kit.text.chunk_merge import combine_usage
from workers.adapter_kit.text.completion_options import CompletionOptions
from workers.adapter_kit.text.event_pattern import EventPattern
from workers.adapter_kit.text.finish_reasons import is_failure, standard_reason
from workers.adapter_kit.text.token_usage import final_usage, take_usage
from workers.adapter_kit.text.tool_calls import ToolCallRepair
from workers.backends.base import BackendError, BackendRefused, Chunk, Output

JSON = dict[str, Any]

LEARNING_EVENTS = 2
"""Events that show a server's form: the first has a role, the second only text."""
FINISHED_FORMS = (b'"finish_reason":"', b'"finish_reason": "')
USUAL_FIELDS = frozenset({"index", "delta", "text", "logprobs", "finish_reason"})
"""Fields of a choice. A server's further fields beside a `finish_reason` belong into the final chunk."""
MAX_CREATED_S = 100_000_000_000
"""A larger `created` counts milliseconds."""
PING_PAYLOADS = frozenset({b"ping", b"pong", b"heartbeat", b"keep-alive", b"keepalive"})


class CompletionReader(ABC):
    """Reads a server's answer as it arrives, and repairs what deviates from OpenAI's format.

    The output holds to the following, whatever the server does:

    - `id`, `created`, `model` and `object` are constant.
    - The first delta of a choice has a role, and no other delta has one.
    - `finish_reason` is present: null until exactly one final chunk per choice, after the choice's last text.
    - Tool calls are as `ToolCallRepair` describes them, and every character is complete.
    - `usage` stands only where OpenAI has it; comments, pings and empty events are dropped.

    `feed` raises BackendError for an error object, an event that is not JSON, or one that is too large. `finish` raises
    BackendError when the stream ended with neither `[DONE]` nor a `finish_reason` for each choice.
    """

    def __init__(self, options: CompletionOptions) -> None:
        self.options = options
        self.done = False
        """`[DONE]` has been read."""
        self._splitter = SseSplitter(single_lines=True)
        self._constant: JSON = {}
        self._choices: dict[int, ChoiceState] = {}
        self._usages: list[JSON] = []
        self._joiner = unicode_repair.CharacterJoiner()
        self._extras: JSON = {}
        self._tokens = 0
        self._pattern: EventPattern | None = None
        self._at_end = False

    def feed(self, data: bytes) -> Chunk | None:
        """Read bytes that have arrived; return the output that they complete, if any."""
        try:
            block = self._splitter.feed(data)
        except EventTooLarge as error:
            raise BackendError(str(error)) from error
        if not block:
            return None
        if not self._take_plain(block):
            self._take_mixed(block)
        return self._take_output()

    def feed_end(self) -> Chunk | None:
        """Read the end of the stream: its last event may lack its empty line, or be cut off where the answer is complete without it."""
        self._at_end = True
        return self.feed(b"\n\n")

    def feed_whole(self, data: bytes, *, cut_short: bool = False) -> Chunk | None:
        """Read an answer that has arrived completely: JSON, JSON by the line, or a stream after all.

        Raises BackendError, transient where `cut_short` says that the end of the data may be missing.
        """
        text = data.strip()
        if text.startswith(FIELDS):
            return self.feed(data + b"\n\n")
        body, mark, tail = text.rpartition(b"data:")
        if mark and is_done_marker(tail):  # after JSON that is no event
            text = body.strip()
        lines = text.split(b"\n")
        if len(lines) > 1 and all(map(_is_object, filter(None, map(bytes.strip, lines)))):
            for line in filter(None, map(bytes.strip, lines)):
                self._take_payload(line)
        else:
            self._take_whole(text, cut_short)
        self.done = True
        return self._take_output()

    @abstractmethod
    def take(self, data: bytes) -> bool:
        """Take bytes in place of `feed`, if they are ordinary and nobody need know of them at once. Return False for any others."""

    @property
    def is_complete(self) -> bool:
        """Whether the answer is complete, even if the connection breaks now.

        A `finish_reason` beside text does not complete a choice: some servers put one into every event.
        """
        choices = self._choices.values()
        return len(choices) >= self.options.choices and all(choice.complete for choice in choices)

    @abstractmethod
    def finish(self) -> Iterator[Output]:
        """Yield the rest of the output and `Finish`. Raises BackendError when the stream did not end properly."""

    # Implemented by subclasses

    @abstractmethod
    def _take_plain(self, block: bytes) -> bool:
        """Take `block` without parsing it, if every event in it fits the pattern; return False where one does not."""

    @abstractmethod
    def _take_event(self, payload: bytes, event: Any) -> None:
        """Take one event that was parsed."""

    @abstractmethod
    def _take_output(self) -> Chunk | None:
        """Return the output for what was taken since the last call."""

    def _plain_fields(self) -> set[str]:
        """Return the names of the texts that were taken without parsing, beside those that parsed events have carried."""
        return set()

    # Blocks and events

    def _take_mixed(self, block: bytes) -> None:
        """Take events of all kinds: those from which the pattern is learned, then a run that fits it, then the rest."""
        for _ in range(LEARNING_EVENTS):
            if self._pattern is not None:
                break
            end = block.find(b"\n\n") + 2
            self._take_events(block[:end])
            block = block[end:]
        front = self._find_plain_end(block)
        if front and self._take_plain(block[:front]):
            block = block[front:]
        self._take_events(block)

    def _find_plain_end(self, block: bytes) -> int:
        """Return where the run of events that may fit the pattern ends at the latest."""
        end = len(block)
        for form in FINISHED_FORMS:
            at = block.find(form)
            if at >= 0:
                end = min(end, block.rfind(b"\n\n", 0, at) + 2)
        tail = self._pattern.tail if self._pattern is not None else b""
        return block.rfind(tail, 0, end) + len(tail) if tail and tail in block[:end] else 0

    def _take_events(self, block: bytes) -> None:
        if self.done:
            return
        for payload in lenient_payloads(block):
            if is_done_marker(payload):
                self.done = True
                return
            if not self._take_plain(b"data: " + payload + b"\n\n"):
                self._take_payload(payload)

    def _take_payload(self, payload: bytes) -> None:
        """Parse one event and take it."""
        try:
            event = self._parse(payload)
        except BackendError:
            if _is_noise(payload) or (self._at_end and self.is_complete):
                return
            if payload.lower().startswith(b"error"):
                raise error_from_payload(payload.decode("utf-8", "replace")) from None
            raise
        self._take_event(payload, event)

    def _take_whole(self, text: bytes, cut_short: bool) -> None:
        try:
            answer = orjson.loads(text)
        except orjson.JSONDecodeError:
            try:
                answer = unicode_repair.CharacterJoiner(last=True).repair(unicode_repair.parse_broken_json(text))
            except (ValueError, RecursionError) as error:
                raise BackendError("the backend's answer is not JSON", transient=cut_short) from error
        answer = _unwrap(answer)
        if is_error_body(answer):
            raise error_from_payload(answer)
        choices = answer.get("choices") if isinstance(answer, dict) else None
        if not isinstance(choices, list) or not choices:
            raise BackendError("the backend's answer has no choices")
        self._take_event(text, answer)

    def _parse(self, payload: bytes) -> Any:
        try:
            event = orjson.loads(payload)
        except orjson.JSONDecodeError:
            event = self._joiner.repair(_parse_broken(payload))
        else:
            if self._joiner.open:
                event = self._joiner.repair(event)
        return event

    # Repair

    def _repair_event(self, event: Any) -> JSON | None:
        """Return the event, repaired; None when it holds nothing for the caller."""
        choices = event.get("choices") if isinstance(event, dict) else None
        if not isinstance(choices, list) or "error" in event:
            event = _require_no_error(_unwrap(event))
            event.pop("error", None)  # empty, and some clients throw at an empty object
            choices = event.get("choices")
        if "usage" in event or "x_groq" in event:
            self._add_usage(event, take_usage(event))
        if not isinstance(choices, list):
            return None
        if choices:
            self._set_constant_fields(event)
        alone = len(choices) == self.options.choices == 1
        event["choices"] = choices = [
            one for one in choices if isinstance(one, dict) and self._repair_choice(one, event, alone=alone)
        ]
        if not choices:
            event.pop("usage", None)
            self._extras = self._extras | event if self._extras else event
            return None
        return cast("JSON", event)

    def _add_usage(self, event: JSON, usage: JSON | None) -> None:
        if usage is not None:
            self._usages.append(usage)
            if len(self._usages) > self.options.choices + 1:
                # The server sends one in each event: the last that counts is enough.
                self._usages[:2] = [final_usage(self._usages[:2])]
            if self.options.continuous_usage:
                event["usage"] = usage

    def _set_constant_fields(self, event: JSON) -> None:
        if not self._constant:
            self._constant = {
                "id": str(event.get("id") or self.options.fallback_id),
                "object": "chat.completion.chunk" if self.options.chat else "text_completion",
                "created": _created_s(event.get("created")),
                "model": self.options.model,
            }
            if event.get("system_fingerprint") is not None:
                self._constant["system_fingerprint"] = event["system_fingerprint"]
        event.update(self._constant)

    def _repair_choice(self, choice: JSON, event: JSON, *, alone: bool) -> bool:
        """Repair a choice in place; return False when it holds nothing for the caller before the end.

        `alone`: the answer has only this choice.
        """
        index = 0 if alone else choice.get("index")  # some servers number their events there
        if not isinstance(index, int) or index < 0:
            index = 0
        choice["index"] = index
        if "usage" in choice:
            self._add_usage(event, take_usage(choice))
        state = self._choices.get(index)
        if state is None:
            state = self._choices[index] = ChoiceState()
        reason, choice["finish_reason"] = choice.get("finish_reason"), None
        if self.options.chat:
            in_pieces = "delta" in choice
            if reason and not in_pieces and isinstance(choice.get("message"), dict):
                remove_repeated_texts(choice["message"], state.delta_fields | self._plain_fields())
            delta = self._repair_delta(choice, state)
            has_output = any(delta.values())
            if has_output and in_pieces:
                state.delta_fields.update(name for name, value in delta.items() if value)
        else:
            has_output = bool(take_text(choice))
        self._tokens += has_output
        if reason is not None and (reason := standard_reason(reason)) is not None:
            if is_failure(reason) or choice.get("error"):
                raise broken_off_error(choice, reason)
            state.reason = reason
            state.complete = not has_output
        elif has_output:
            state.complete = False
        if not has_output and state.reason is not None:
            state.final = choice if state.final is None else {**choice, **state.final}
            return False
        if reason is not None:
            self._move_to_final(choice, state)
        if self.options.chat and not state.begun:
            state.begun = True
            choice["delta"] = {"role": "assistant", **choice["delta"]}
        return True

    def _repair_delta(self, choice: JSON, state: ChoiceState) -> JSON:
        """Repair the delta in place, and remove its role."""
        delta = take_delta(choice)
        if "tool_calls" in delta or "function_call" in delta:
            calls = take_tool_calls(delta, legacy=self.options.legacy_functions)
            if "function_call" in delta:
                state.function = repair_function_call(delta, state.function or "")
            elif calls:
                if state.calls is None:
                    limit = 1 if self.options.single_call else None
                    state.calls = ToolCallRepair(limit, come_whole=self.options.whole_calls)
                repaired = state.calls.repair(calls)
                if repaired:
                    delta["tool_calls"] = repaired
        return delta

    def _move_to_final(self, choice: JSON, state: ChoiceState) -> None:
        """Move the fields that belong beside a `finish_reason` (`stop_reason`, …) from a choice with text to the final one."""
        others = {name: choice.pop(name) for name in choice.keys() - USUAL_FIELDS}
        state.final = {"index": choice["index"], **(state.final or {}), **others}

    # The end

    def _final_choices(self) -> Iterator[JSON]:
        """Yield the last choice of each index: the reason, and the output that is still missing."""
        chat = self.options.chat
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

    def _final_delta(self, index: int, state: ChoiceState, delta: JSON) -> JSON:
        if not state.begun:
            delta = {"role": "assistant", **delta}
        if self._joiner.open:
            delta |= self._joiner.halves(("choices", index, "delta"))
        if state.calls is not None and (calls := state.calls.missing_arguments()):
            delta["tool_calls"] = calls
        return delta

    @property
    def _has_reason(self) -> bool:
        """Whether a `finish_reason` has come: every event after it is parsed."""
        return any(choice.reason is not None for choice in self._choices.values())

    def _take_tokens(self) -> int:
        tokens, self._tokens = self._tokens, 0
        return tokens

    def _settle_reasons(self) -> None:
        """Settle each choice's `finish_reason`. Raises BackendError where the answer is not complete."""
        choices = self._choices.values()
        if not self.done and not (choices and all(choice.reason is not None for choice in choices)):
            raise BackendError("the backend's stream ended before it was complete", transient=True)
        if not choices:
            raise BackendError("the backend's stream ended without an answer", transient=True)
        for choice in choices:
            choice.reason = choice.final_reason()

    def _require_all_choices(self, given: int) -> None:
        """Raise BackendRefused where the server gave fewer choices than were requested."""
        if given < self.options.choices:
            raise BackendRefused(
                f"this backend does not support n > 1: it gave {given} of {self.options.choices} choices", param="n"
            )

    def _usage(self) -> JSON | None:
        return combine_usage(self._usages, self.options.n, self.options.choices)


def validated_usage(usage: JSON | None) -> Usage | None:
    """Return the usage for `Finish`; None where the server's figures make no sense."""
    try:
        return None if usage is None else Usage.model_validate(usage)
    except ValidationError:
        return None


def _parse_broken(payload: bytes) -> Any:
    try:
        return unicode_repair.parse_broken_json(payload)
    except (ValueError, RecursionError) as error:
        raise BackendError(f"the backend sent an event that is not JSON: {error}", transient=True) from error


def _unwrap(event: Any) -> Any:
    """Return the event itself, which some gateways put into `data`, and Gemini into a list of one."""
    if isinstance(event, list) and len(event) == 1:
        event = event[0]
    if isinstance(event, dict) and "choices" not in event:
        inner = event.get("data")
        if isinstance(inner, dict) and "choices" in inner:
            return inner
    return event


def _require_no_error(event: Any) -> JSON:
    """Return an event that is an object. Raises BackendError for an error."""
    if not event:
        return {}  # llama.cpp begins the answer to a list of prompts with null
    if is_error_body(event):
        raise error_from_payload(event)
    if not isinstance(event, dict):
        raise BackendError("the backend sent an event that is not an object")
    return event


def _created_s(created: Any) -> int:
    """Return a time in whole seconds; the present one where a server gives none."""
    if isinstance(created, str) and created.strip().isdecimal():
        created = int(created)
    if not isinstance(created, int | float) or not math.isfinite(created) or created <= 0:
        return int(time.time())
    return int(created / 1000 if created > MAX_CREATED_S else created)


def _is_noise(payload: bytes) -> bool:
    """Return whether an event that is not JSON only keeps the connection alive."""
    return payload.startswith(b":") or not payload.strip() or payload.strip().lower() in PING_PAYLOADS


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(orjson.loads(line), dict)
    except orjson.JSONDecodeError:
        return False
