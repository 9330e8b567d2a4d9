"""The options of a request that shape the answer to a chat or text completion."""

from __future__ import annotations

from typing import NamedTuple


class CompletionOptions(NamedTuple):
    """The parts of a request that a completion reader needs."""

    chat: bool
    model: str
    """The name that the answer carries."""
    fallback_id: str
    """The answer's `id`, where the server gives none."""
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
        """How many choices the answer must have."""
        return self.n * self.prompts
