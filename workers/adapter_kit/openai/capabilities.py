"""The capabilities of an OpenAI-style server's models, which such servers rarely declare. Pure.

The first of these that applies counts:

1. the option `capabilities.PATTERN=embeddings`, for names that match the pattern (`*`, `?`; case is ignored);
2. the option `capabilities=chat+embeddings`, for all models;
3. the server's own declaration: a model's `type` (LM Studio, Together), `task` (speaches) or `capabilities` (Infinity,
   LocalAI, Mistral), and TEI's `model_type`. llama.cpp's is ignored: it calls every model a `completion`;
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
"""Separators of names; a comma also separates options where all of them are one setting."""
TEXT: Capabilities = (Capability.CHAT, Capability.COMPLETIONS)
DECLARED_TYPES: Mapping[str, Capabilities] = {
    **dict.fromkeys(("llm", "vlm", "chat", "language", "code", "completion", "completions", "completion_chat"), TEXT),
    **dict.fromkeys(("text-generation", "text2text-generation", "image-text-to-text", "generate"), TEXT),
    **{word: (spec.capability,) for spec in ENDPOINTS for word in spec.model_types},
}
NAME_PATTERNS: tuple[tuple[re.Pattern[str], Capabilities], ...] = (
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
    """Selects the capabilities of models, by the operator's options and the server's declarations.

    Raises ValueError when an option names an unknown capability.
    """

    def __init__(self, options: Mapping[str, str]) -> None:
        self._all = _parse_option(options[OPTION]) if OPTION in options else None
        self._patterns = [
            (name.partition(".")[2].lower(), _parse_option(value))
            for name, value in options.items()
            if name.startswith(f"{OPTION}.")
        ]

    def select(self, name: str, model: JSON) -> Capabilities:
        """Return the capabilities of the model called `name`; `model` is the server's entry for it."""
        for pattern, capabilities in self._patterns:
            if fnmatchcase(name.lower(), pattern):
                return capabilities
        return self._all or _declared(model) or _guess_by_name(name) or TEXT


def is_capability_option(name: str) -> bool:
    """Return whether an option of this name is read here."""
    return name == OPTION or (name.startswith(f"{OPTION}.") and len(name) > len(OPTION) + 1)


def _parse_option(value: str) -> Capabilities:
    names = [name.strip() for name in SEPARATORS.split(value)]
    unknown = [name for name in names if name not in CAPABILITIES]
    if unknown:
        raise ValueError(f"unknown capability {', '.join(map(repr, unknown))}; choose from {', '.join(CAPABILITIES)}")
    return tuple(Capability(name) for name in names)


def _declared(model: JSON) -> Capabilities:
    for field in ("type", "task", "model_type", "capabilities"):
        found = _map_words(_declared_words(model.get(field)))
        if found:
            return found
    return ()


def _declared_words(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        return (value,)
    if isinstance(value, dict):  # `{"completion_chat": true}`, or TEI's `{"embedding": {…}}`
        return tuple(str(name) for name, has in value.items() if has not in (False, None))
    return tuple(one for one in value if isinstance(one, str)) if isinstance(value, list) else ()


def _map_words(words: Iterable[str]) -> Capabilities:
    found = {one for word in words for one in DECLARED_TYPES.get(word.lower().removeprefix("flag_"), ())}
    return tuple(one for one in CAPABILITIES if one in found)


def _guess_by_name(name: str) -> Capabilities:
    lower = name.lower()
    return next((capabilities for pattern, capabilities in NAME_PATTERNS if pattern.search(lower)), ())
