"""Which model of an OpenAI-style server serves what: such servers seldom say. Pure.

The first of these that answers counts:

1. the option `capabilities.PATTERN=embeddings`, for names that match the pattern (`*`, `?`; case makes no difference);
2. the option `capabilities=chat+embeddings`, for all models;
3. the server's own words: a model's `type` (LM Studio, Together), `task` (speaches) or `capabilities` (Infinity,
   LocalAI, Mistral), and TEI's `model_type`. llama.cpp's are not believed: it calls every model a `completion`;
4. well-known names: whisper, kokoro, e5, bge, rerank, sdxl, flux, …
5. chat and completions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from schemas.endpoints import CAPABILITIES, ENDPOINTS
from schemas.jobs import Capability

JSON = dict[str, Any]
Capabilities = tuple[Capability, ...]

OPTION = "capabilities"
SEPARATORS = re.compile(r"[+,]")
"""A comma separates options where they are one setting."""
TEXT: Capabilities = (Capability.CHAT, Capability.COMPLETIONS)
WORDS: Mapping[str, Capabilities] = {
    **dict.fromkeys(("llm", "vlm", "chat", "language", "code", "completion", "completions", "completion_chat"), TEXT),
    **dict.fromkeys(("text-generation", "text2text-generation", "image-text-to-text", "generate"), TEXT),
    **{word: (spec.capability,) for spec in ENDPOINTS for word in spec.model_types},
}
NAMES: tuple[tuple[re.Pattern[str], Capabilities], ...] = (
    *((re.compile(spec.model_names), (spec.capability,)) for spec in ENDPOINTS if spec.model_names),
    *(
        (re.compile(rf"(?<![a-z0-9])(?:{words})" if bound else words), capabilities)
        for words, bound, capabilities in (
            (r"rerank|cross-encoder|ms-marco", False, (Capability.RERANK,)),
            (r"whisper|transcribe|parakeet|moonshine|sensevoice|wav2vec", False, (Capability.TRANSCRIPTIONS,)),
            (r"(?:stt|asr)(?![a-z])", True, (Capability.TRANSCRIPTIONS,)),
            (r"kokoro|piper|xtts|parler|speecht5|chatterbox", False, (Capability.SPEECH,)),
            (r"tts(?![a-z])", True, (Capability.SPEECH,)),
            (r"embed|minilm", False, (Capability.EMBEDDINGS,)),
            (r"(?:e5|bge|gte|mxbai)(?![a-z0-9])|nomic-", True, (Capability.EMBEDDINGS,)),
            (r"stable-diffusion|sdxl|dall-?e|gpt-image|qwen-image|z-image|hidream", False, (Capability.IMAGES,)),
            (r"flux(?![a-z])|sd[-_.]?(?:1|2|3|turbo)(?![a-z])", True, (Capability.IMAGES,)),
        )
    ),
)


class CapabilitySelector:
    """What an operator and a server say together. Raises ValueError when an option names what there is not."""

    def __init__(self, options: Mapping[str, str]) -> None:
        self._all = _read(options[OPTION]) if OPTION in options else None
        self._patterns = [
            (name.partition(".")[2].lower(), _read(value))
            for name, value in options.items()
            if name.startswith(f"{OPTION}.")
        ]

    def select(self, name: str, model: JSON) -> Capabilities:
        """What the model called `name` serves, of which the server says `model`."""
        for pattern, capabilities in self._patterns:
            if fnmatchcase(name.lower(), pattern):
                return capabilities
        return self._all or _said(model) or _known(name) or TEXT


def is_capability_option(name: str) -> bool:
    """Whether an option of this name is read here."""
    return name == OPTION or (name.startswith(f"{OPTION}.") and len(name) > len(OPTION) + 1)


def _read(value: str) -> Capabilities:
    names = [name.strip() for name in SEPARATORS.split(value)]
    unknown = [name for name in names if name not in CAPABILITIES]
    if unknown:
        raise ValueError(
            f"there is no capability {', '.join(map(repr, unknown))}; there are: {', '.join(CAPABILITIES)}"
        )
    return tuple(Capability(name) for name in names)


def _said(model: JSON) -> Capabilities:
    for field in ("type", "task", "model_type", "capabilities"):
        found = _meant(_words(model.get(field)))
        if found:
            return found
    return ()


def _words(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        return (value,)
    if isinstance(value, dict):  # `{"completion_chat": true}`, or TEI's `{"embedding": {…}}`
        return tuple(str(name) for name, there in value.items() if there not in (False, None))
    return tuple(one for one in value if isinstance(one, str)) if isinstance(value, list) else ()


def _meant(words: Iterable[str]) -> Capabilities:
    found = {one for word in words for one in WORDS.get(word.lower().removeprefix("flag_"), ())}
    return tuple(one for one in CAPABILITIES if one in found)


def _known(name: str) -> Capabilities:
    lower = name.lower()
    return next((capabilities for pattern, capabilities in NAMES if pattern.search(lower)), ())
