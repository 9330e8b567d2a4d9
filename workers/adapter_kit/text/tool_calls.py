"""Repair of the tool calls in a streamed answer. Pure.

Servers repeat ids and names in every delta, give two calls one index, leave out ids and indexes, and send arguments as objects,
null or not at all. A caller gets OpenAI's form: the first delta of a call has its index, id, type and name; each later one has
only more of its arguments, which are a string of JSON.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from secrets import token_hex
from typing import Any

import orjson

JSON = dict[str, Any]
NO_ARGUMENTS = frozenset({"{}", "null", "None"})
"""Arguments in a call's first delta that are withheld: the real ones may still come; `{}` is sent at the end where they do not."""
IDENTITY = frozenset({"index", "id", "type", "function"})


@dataclass(slots=True)
class _ToolCallState:
    """One call, as the caller has received it."""

    index: int
    server_index: int | None
    server_id: str
    name: str
    function: bool
    arguments: list[str] = field(default_factory=list)
    withheld: bool = False
    """Its first delta had empty arguments, and is held back."""

    @property
    def is_valid_json(self) -> bool:
        """Whether its arguments are complete JSON."""
        return self.withheld or _parse_json("".join(self.arguments)) is not _INVALID

    @property
    def is_ended_object(self) -> bool:
        """Whether its arguments are a complete JSON object; cheap where they are not."""
        last = next((piece.rstrip() for piece in reversed(self.arguments) if piece.strip()), "")
        return last.endswith("}") and self.is_valid_json


class ToolCallRepair:
    """Repairs the calls of one choice; those beyond the first `limit` are dropped."""

    def __init__(self, limit: int | None = None, *, come_whole: bool = False) -> None:
        """Create a repair. `come_whole`: the server sends a call in one piece; from others, an empty object may be only a beginning."""
        self._come_whole = come_whole
        self._calls: list[_ToolCallState] = []
        self._limit = limit
        self._withheld: JSON | None = None
        """The first delta of the last call, while its arguments may still come."""

    def __bool__(self) -> bool:
        return bool(self._calls)

    def repair(self, deltas: Any) -> list[JSON]:
        """Return the deltas that the caller gets for the `tool_calls` of one event."""
        if not isinstance(deltas, list):
            return []
        return self._within_limit([one for delta in deltas if isinstance(delta, dict) for one in self._repair(delta)])

    def rest(self) -> list[JSON]:
        """Return the call that was withheld until the end."""
        return self._within_limit(self._release("{}"))

    def missing_arguments(self) -> list[JSON]:
        """Return a last delta with an empty object for each call that never had arguments."""
        calls = [call for call in self._calls if call.function and not any(map(str.strip, call.arguments))]
        return self._within_limit([{"index": call.index, "function": {"arguments": "{}"}} for call in calls])

    def _within_limit(self, deltas: list[JSON]) -> list[JSON]:
        return deltas if self._limit is None else [delta for delta in deltas if delta["index"] < self._limit]

    def _release(self, arguments: str) -> list[JSON]:
        """Return the withheld delta with these arguments."""
        delta, self._withheld = self._withheld, None
        if delta is None:
            return []
        call = self._calls[delta["index"]]
        call.withheld = False
        call.arguments.append(arguments)
        delta["function"]["arguments"] = arguments
        return [delta]

    def _repair(self, delta: JSON) -> list[JSON]:
        function = delta.get("function")
        if not isinstance(function, dict):
            function = {name: delta.pop(name) for name in ("name", "arguments") if name in delta}
        server_id, index = str(delta.get("id") or ""), _parse_index(delta.get("index"))
        name, arguments = str(function.get("name") or ""), _arguments_text(function.get("arguments"))
        extras = {key: value for key, value in delta.items() if key not in IDENTITY}
        more = {key: value for key, value in function.items() if key not in ("name", "arguments")}
        call = self._find(index, server_id, name, arguments, is_function=bool(function))
        if call is not None and arguments and call.is_ended_object:
            if _is_another(call, arguments):  # under the index of the call before it
                name, call = name or call.name, None
            else:
                arguments = ""  # a repetition, or a brace too many
        if call is not None:
            return self._continue(call, name, arguments, more, extras)
        released = self._release("{}")
        call = self._new(index, server_id, name, is_function=bool(function) or not extras)
        own_id = call.server_id and not self._is_taken(call)
        first: JSON = {
            "index": call.index,
            "id": call.server_id if own_id else f"call_{token_hex(12)}",
            "type": delta.get("type") or "function",
        }
        if call.function:
            first["function"] = {"name": name, "arguments": arguments, **more}
        first |= extras
        if call.function and not self._come_whole and arguments.strip() in NO_ARGUMENTS:
            call.withheld, self._withheld = True, first
            return released
        call.arguments.append(arguments)
        return [*released, first]

    def _continue(self, call: _ToolCallState, name: str, arguments: str, more: JSON, extras: JSON) -> list[JSON]:
        rest: JSON = dict(more)
        if name and name != call.name and not any(call.arguments) and not call.withheld:
            # The server sends the name in pieces, or repeats it with each piece added.
            name = name.removeprefix(call.name) or name
            call.name += name
            rest["name"] = name
        if call.withheld and arguments.strip() in NO_ARGUMENTS:
            arguments = ""
        if arguments:
            rest["arguments"] = arguments
        if not rest and not extras:
            return []
        if call.withheld:
            (first,) = self._release(arguments or "{}")
            first["function"] |= rest
            return [first | extras]
        if arguments:
            call.arguments.append(arguments)
        return [{"index": call.index, **({"function": rest} if rest else {}), **extras}]

    def _new(self, index: int | None, server_id: str, name: str, *, is_function: bool) -> _ToolCallState:
        call = _ToolCallState(len(self._calls), index, server_id, name, is_function)
        self._calls.append(call)
        return call

    def _is_taken(self, call: _ToolCallState) -> bool:
        """Return whether an earlier call has its id."""
        return bool(call.server_id) and any(other.server_id == call.server_id for other in self._calls[: call.index])

    def _find(
        self, index: int | None, server_id: str, name: str, arguments: str, *, is_function: bool
    ) -> _ToolCallState | None:
        """Return the call that a delta continues; None where it begins a new one."""
        if server_id:
            for call in reversed(self._calls):
                if call.server_id == server_id and (index in (None, call.server_index) or not name):
                    return call
        same = next((c for c in reversed(self._calls) if index is None or c.server_index == index), None)
        if same is None:
            return None
        if server_id and (name or (same.server_id and not is_function)):
            return None  # a new id without a name begins no call: some servers make up an id for each delta
        if not name:
            return same
        if index is None:
            return same if name == same.name and any(same.arguments) and not same.is_valid_json else None
        return None if arguments and same.is_valid_json else same


_INVALID = object()


def _parse_json(text: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return _INVALID


def _is_another(call: _ToolCallState, arguments: str) -> bool:
    """Return whether arguments that follow complete ones belong to one more call."""
    value = _parse_json(arguments)
    return isinstance(value, dict) and value != _parse_json("".join(call.arguments))


def _parse_index(index: Any) -> int | None:
    if isinstance(index, str) and index.isdecimal():
        return int(index)
    return int(index) if isinstance(index, int | float) and index >= 0 else None


def _arguments_text(arguments: Any) -> str:
    if arguments is None:
        return ""
    return arguments if isinstance(arguments, str) else orjson.dumps(arguments).decode()
