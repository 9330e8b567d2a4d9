"""Output items that are being built, and the events about them.

Methods return events as (type, fields); `from_chat` numbers them.
"""

from __future__ import annotations

from typing import Any, Protocol

JSON = dict[str, Any]
ItemEvent = tuple[str, JSON]


class OutputItem(Protocol):
    """An output item that is being built."""

    def close(self, status: str) -> list[ItemEvent]:
        """Close the item with the status `completed` or `incomplete`, and return the events. Idempotent."""

    def shape(self) -> JSON:
        """Return the item's current object."""


class _Base:
    def __init__(self, index: int, item_id: str) -> None:
        self.index = index
        self.id = item_id
        self.status = "in_progress"

    def event(self, kind: str, **fields: Any) -> ItemEvent:
        return kind, {"item_id": self.id, "output_index": self.index, **fields}

    def frame(self, kind: str, shape: JSON) -> ItemEvent:
        return kind, {"output_index": self.index, "item": shape}


class _Part:
    """A content part whose text grows."""

    def __init__(self, item: _Base, index: int, kind: str) -> None:
        self._item = item
        self._index = index
        self.kind = kind
        self._pieces: list[str] = []
        self._logprobs: list[JSON] = []
        self._done = False

    # The event prefix and the text field of each kind of part.
    NAMES = {
        "output_text": ("response.output_text", "text"),
        "refusal": ("response.refusal", "refusal"),
        "reasoning_text": ("response.reasoning_text", "text"),
    }

    def _event(self, kind: str, **fields: Any) -> ItemEvent:
        return self._item.event(kind, content_index=self._index, **fields)

    def open(self) -> list[ItemEvent]:
        return [self._event("response.content_part.added", part=self.shape())]

    def add(self, text: str, logprobs: list[JSON]) -> list[ItemEvent]:
        self._pieces.append(text)
        self._logprobs += logprobs
        fields = {"logprobs": logprobs} if self.kind == "output_text" else {}
        return [self._event(self.NAMES[self.kind][0] + ".delta", delta=text, **fields)]

    def close(self) -> list[ItemEvent]:
        if self._done:
            return []
        self._done = True
        name, field = self.NAMES[self.kind]
        fields: JSON = {field: "".join(self._pieces)}
        if self.kind == "output_text":
            fields["logprobs"] = self._logprobs
        return [
            self._event(name + ".done", **fields),
            self._event("response.content_part.done", part=self.shape()),
        ]

    def shape(self) -> JSON:
        shape: JSON = {"type": self.kind, self.NAMES[self.kind][1]: "".join(self._pieces)}
        if self.kind == "output_text":
            shape |= {"annotations": [], "logprobs": list(self._logprobs)}
        return shape


class TextItem(_Base):
    """A message or reasoning item, whose last content part grows."""

    def __init__(self, index: int, hex_id: str, *, reasoning: bool) -> None:
        super().__init__(index, f"{'rs' if reasoning else 'msg'}_{hex_id}_{index}")
        self.reasoning = reasoning
        self._parts: list[_Part] = []

    def open(self) -> list[ItemEvent]:
        """Return the events of a new, empty item."""
        return [self.frame("response.output_item.added", self.shape())]

    def add(self, kind: str, text: str, logprobs: list[JSON]) -> list[ItemEvent]:
        """Add text to a part of this kind, and return the events."""
        events: list[ItemEvent] = []
        if not self._parts or self._parts[-1].kind != kind:
            if self._parts:
                events += self._parts[-1].close()
            self._parts.append(_Part(self, len(self._parts), kind))
            events += self._parts[-1].open()
        if text:
            events += self._parts[-1].add(text, logprobs)
        return events

    def close(self, status: str) -> list[ItemEvent]:
        if self.status != "in_progress":
            return []
        events = self._parts[-1].close() if self._parts else []
        self.status = status
        return [*events, self.frame("response.output_item.done", self.shape())]

    def shape(self) -> JSON:
        content = [part.shape() for part in self._parts]
        if self.reasoning:
            return {"id": self.id, "type": "reasoning", "status": self.status, "summary": [], "content": content}
        return {"id": self.id, "type": "message", "status": self.status, "role": "assistant", "content": content}


class FunctionCallItem(_Base):
    """A function call whose arguments may arrive in pieces."""

    def __init__(self, index: int, hex_id: str) -> None:
        super().__init__(index, f"fc_{hex_id}_{index}")
        self._call_id = ""
        self._name = ""
        self._arguments: list[str] = []
        self._is_visible = False

    def add(self, call_id: str, name: str, arguments: str) -> list[ItemEvent]:
        """Add a piece and return the events. There are none until the function's name is known."""
        self._call_id = self._call_id or call_id
        if name != self._name:  # the name may arrive in pieces
            self._name += name
        if self._is_visible or not self._name:
            if arguments:
                self._arguments.append(arguments)
            return self._delta(arguments) if self._is_visible and arguments else []
        earlier = "".join(self._arguments)
        events = self._open()
        arguments = earlier + arguments
        if arguments:
            self._arguments = [arguments]
            events += self._delta(arguments)
        return events

    def _open(self) -> list[ItemEvent]:
        self._is_visible = True
        self._call_id = self._call_id or self.id.replace("fc_", "call_")
        self._arguments = []
        return [self.frame("response.output_item.added", self.shape())]

    def _delta(self, arguments: str) -> list[ItemEvent]:
        return [self.event("response.function_call_arguments.delta", delta=arguments)]

    def close(self, status: str) -> list[ItemEvent]:
        if self.status != "in_progress":
            return []
        events: list[ItemEvent] = []
        if not self._is_visible:
            earlier = "".join(self._arguments)
            events += self._open()
            events += self.add("", "", earlier)
        if not "".join(self._arguments) and status == "completed":
            events += self.add("", "", "{}")  # callers parse the arguments as JSON
        arguments = "".join(self._arguments)
        events.append(self.event("response.function_call_arguments.done", name=self._name, arguments=arguments))
        self.status = status
        return [*events, self.frame("response.output_item.done", self.shape())]

    def shape(self) -> JSON:
        return {
            "id": self.id,
            "type": "function_call",
            "status": self.status,
            "call_id": self._call_id,
            "name": self._name,
            "arguments": "".join(self._arguments),
        }
