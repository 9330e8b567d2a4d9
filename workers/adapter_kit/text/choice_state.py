"""The state of one choice while its answer is read, and the `finish_reason` that follows from it: pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from workers.adapter_kit.error_mapping import error_from_payload
from workers.adapter_kit.text.tool_calls import ToolCallRepair
from workers.backends.base import BackendError

JSON = dict[str, Any]


@dataclass(slots=True)
class ChoiceState:
    """What a completion reader has read of one choice."""

    begun: bool = False
    """Its first delta, with the role, has been passed on."""
    reason: str | None = None
    """The newest `finish_reason`; it becomes final when the stream ends."""
    complete: bool = False
    """The reason came without text, and no text has come since."""
    delta_fields: set[str] = field(default_factory=set)
    """The names of the texts that its deltas have carried."""
    calls: ToolCallRepair | None = None
    function: str | None = None
    """The name of its `function_call`, OpenAI's older form."""
    final: JSON | None = None
    """Fields of the final chunk beside the reason."""

    def final_reason(self) -> str:
        """Return the `finish_reason`; tool calls decide it where a server says `stop`, or names the other form of call."""
        reason = self.reason or "stop"
        if self.function is not None:
            return "function_call" if reason in ("stop", "tool_calls") else reason
        if self.calls:
            return "tool_calls" if reason in ("stop", "function_call") else reason
        return "stop" if reason == "function_call" else reason


def broken_off_error(choice: JSON, reason: str) -> BackendError:
    """Return the error for a choice that the server broke off: its own error, or the reason that it gives."""
    error = choice.get("error")
    if error:
        return error_from_payload({"error": error})
    return BackendError(f"the backend broke the answer off: {reason}", transient=True)


def remove_repeated_texts(message: JSON, delta_fields: set[str]) -> None:
    """Remove from a whole message, which MiniMax sends after the deltas, the texts that the deltas have carried."""
    for name in [name for name, value in message.items() if name in delta_fields and isinstance(value, str)]:
        del message[name]
