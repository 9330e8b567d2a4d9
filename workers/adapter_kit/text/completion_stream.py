"""An OpenAI-compatible server's answer to a chat or text completion, as what the caller gets.

`new_completion_reader` is all that an adapter needs: feed it the bytes that arrive, yield the chunks that it returns.
"""

from __future__ import annotations

from workers.adapter_kit.text.completion_collector import CompletionCollector
from workers.adapter_kit.text.completion_options import CompletionOptions
from workers.adapter_kit.text.completion_reader import CompletionReader
from workers.adapter_kit.text.completion_relay import CompletionRelay
from workers.backends.base import Push

__all__ = ["CompletionOptions", "CompletionReader", "new_completion_reader"]


def new_completion_reader(options: CompletionOptions, push: Push | None = None) -> CompletionReader:
    """Return the reader of an answer for this caller: one that relays events, some of them by `push`, or one that collects a body."""
    return CompletionRelay(options, push) if options.stream else CompletionCollector(options)
