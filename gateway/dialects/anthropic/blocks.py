"""Orders the pieces of a chat answer into blocks of content, of which one at a time is open. Pure."""

from __future__ import annotations

from typing import Any

import orjson

from gateway.chat_chunks import call_index
from schemas.errors import BackendFailed

JSON = dict[str, Any]

MAX_BLOCKS = 1024
SIGNATURE = "unsigned"
"""Stands for the signature of a thinking block: Nexus vouches for no thoughts, and clients keep only blocks with a signature."""
INVALID_JSON = "INVALID_JSON"
"""The field of a tool's input that holds arguments which are not a JSON object: the name that Anthropic suggests for them."""

TEXT, THINKING, TOOL_USE = "text", "thinking", "tool_use"
DELTAS = {
    TEXT: ("text_delta", "text"),
    THINKING: ("thinking_delta", "thinking"),
    TOOL_USE: ("input_json_delta", "partial_json"),
}
"""The type of a block's deltas, and the field with the text."""


def tool_input(arguments: str) -> JSON:
    """Return a call's arguments as an object."""
    value: Any = {}
    if arguments.strip():
        try:
            value = orjson.loads(arguments)
        except orjson.JSONDecodeError:
            value = None
    return value if isinstance(value, dict) else {INVALID_JSON: arguments}


def tool_use(call_id: str, name: str, given: JSON) -> JSON:
    """Return a block that calls a tool."""
    return {"type": TOOL_USE, "id": call_id, "name": name, "input": given}


class _Block:
    """One block, and what of it was not sent."""

    __slots__ = ("arguments", "call_id", "kind", "name", "started", "unsent")

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.unsent: list[str] = []
        self.call_id = self.name = ""
        self.arguments: list[str] = []
        self.started = False

    @property
    def is_whole(self) -> bool:
        """Whether nothing can follow in this block: pieces of several calls may come in turns."""
        if self.kind != TOOL_USE:
            return True
        try:
            orjson.loads("".join(self.arguments))
        except orjson.JSONDecodeError:
            return False
        return True

    def shape(self) -> JSON:
        """Return the block as its start announces it."""
        if self.kind == TOOL_USE:
            return tool_use(self.call_id, self.name, {})
        if self.kind == THINKING:
            return {"type": THINKING, "thinking": "", "signature": ""}
        return {"type": TEXT, "text": ""}


class BlockSequence:
    """Makes the events of blocks. A block whose turn has not come holds its pieces."""

    def __init__(self) -> None:
        self._blocks: list[_Block] = []
        self._open = 0
        self._calls: dict[int, _Block] = {}

    @property
    def has_calls(self) -> bool:
        """Whether the answer calls a tool."""
        return bool(self._calls)

    def add_text(self, kind: str, text: str) -> list[JSON]:
        """Add text of the kind TEXT or THINKING, and return the events."""
        block = self._blocks[-1] if self._blocks else None
        if block is None or block.kind != kind:
            block = self._append(kind)
        block.unsent.append(text)
        return self._advance()

    def add_call(self, piece: JSON) -> list[JSON]:
        """Add a piece of a tool call, and return the events."""
        index = call_index(piece, len(self._calls))
        block = self._calls.get(index)
        if block is None:
            block = self._calls[index] = self._append(TOOL_USE)
        function = piece.get("function") or {}
        block.call_id = block.call_id or str(piece.get("id") or "")
        block.name = block.name or str(function.get("name") or "")
        if arguments := function.get("arguments"):
            block.unsent.append(str(arguments))
            block.arguments.append(str(arguments))
        return self._advance()

    def close(self) -> list[JSON]:
        """Return the events that end all blocks. An answer without any gets an empty text."""
        if not self._blocks:
            self._append(TEXT)
        return self._advance(last=True)

    def _append(self, kind: str) -> _Block:
        if len(self._blocks) >= MAX_BLOCKS:
            raise BackendFailed(f"The answer has more than {MAX_BLOCKS} blocks of content. Check the worker's server.")
        block = _Block(kind)
        self._blocks.append(block)
        return block

    def _advance(self, *, last: bool = False) -> list[JSON]:
        """Return the events of the open block, and of those after it whose turn has come."""
        events: list[JSON] = []
        while self._open < len(self._blocks):
            block, index = self._blocks[self._open], self._open
            if block.kind == TOOL_USE and not block.name and not last:
                break
            if not block.started:
                block.started = True
                events.append({"type": "content_block_start", "index": index, "content_block": block.shape()})
            if block.unsent:
                kind, field = DELTAS[block.kind]
                events.append(_delta(index, kind, field, "".join(block.unsent)))
                block.unsent.clear()
            if not last and (index == len(self._blocks) - 1 or not block.is_whole):
                break
            if block.kind == THINKING:
                events.append(_delta(index, "signature_delta", "signature", SIGNATURE))
            events.append({"type": "content_block_stop", "index": index})
            self._open += 1
        return events


def _delta(index: int, kind: str, field: str, text: str) -> JSON:
    return {"type": "content_block_delta", "index": index, "delta": {"type": kind, field: text}}
