"""`nexus up --model FILE.gguf`: the user's own models, each on a llama.cpp server."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from cli.embedded import embeddings_server, llama_server
from cli.embedded.gguf import GgufModel, InvalidModelFile, read_model
from cli.errors import ConsoleError
from cli.stack.bundled_models import SPEECH_MODEL, LocalModel
from schemas.installation import install_hint

DEFAULT_CONTEXT = 4096
SLOTS_BY_CONTEXT = ((8192, 4), (32_768, 2))
"""Slots for models up to this context; 1 above all of them. Memory grows with both."""
RESERVED_NAMES = frozenset({SPEECH_MODEL, embeddings_server.MODEL_NAME, "whisper-tiny.en"})
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,127}")


@dataclass(frozen=True, slots=True)
class UserModel:
    """A GGUF file and the name under which it is served."""

    name: str
    file: GgufModel
    context: int
    """Tokens of each request, including its answer."""

    @property
    def slots(self) -> int:
        """Requests that the model serves at once."""
        return next((slots for most, slots in SLOTS_BY_CONTEXT if self.context <= most), 1)

    @property
    def flag(self) -> str:
        """Value of `--model` for this file, valid in any folder."""
        return f"{self.name}={self.file.path.absolute()}"

    @property
    def note(self) -> str:
        """Warning for the user; empty if there is none."""
        if self.file.embeds or self.file.has_chat_template:
            return ""
        return (
            f"{self.file.path.name} has no chat template: {self.name} gets chats as ChatML, for which it may not be trained. "
            "/v1/completions needs no template."
        )


def read_user_models(wanted: list[str], context: int | None, *, default_chat: bool) -> list[UserModel]:
    """Read the files of `--model`, each FILE or NAME=FILE. Raises ConsoleError."""
    if wanted and not llama_server.is_installed():
        raise ConsoleError(
            f"--model needs llama.cpp, which is not installed. To install it: {install_hint(llama_server.EXTRA)}"
        )
    if context is not None and not wanted:
        raise ConsoleError("--context applies to the models of --model, and none is given.", exit_code=2)
    found: dict[str, UserModel] = {}
    taken = RESERVED_NAMES | ({llama_server.MODEL_NAME} if default_chat else set())
    for one in wanted:
        model = _read_user_model(one, context)
        if model.name in taken or model.name in found:
            raise ConsoleError(
                f"--model {one}: another model is called {model.name}. Choose a name: --model NAME={model.file.path}"
            )
        found[model.name] = model
    return list(found.values())


def _read_user_model(wanted: str, context: int | None) -> UserModel:
    name, path = _split(wanted)
    try:
        file = read_model(path)
    except InvalidModelFile as error:
        raise ConsoleError(f"--model: {error}") from error
    if name and not _NAME.fullmatch(name):
        raise ConsoleError(
            f"--model: {name!r} is not a valid model name. Use letters, digits and . _ : / @ + -", exit_code=2
        )
    most = file.context or context or DEFAULT_CONTEXT
    if context is not None and context > most:
        raise ConsoleError(
            f"--context {context}: {path.name} was trained for at most {most} tokens. Choose {most} or fewer."
        )
    return UserModel(name or _default_name(file), file, context or min(DEFAULT_CONTEXT, most))


def _split(wanted: str) -> tuple[str, Path]:
    """Split NAME=FILE. An existing file with `=` in its name has no NAME."""
    name, equals, path = wanted.partition("=")
    if not equals or Path(wanted).is_file():
        return "", Path(wanted).expanduser()
    return name, Path(path).expanduser()


def _default_name(file: GgufModel) -> str:
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", file.name).strip("-.")[:128] or "model"


def plan_servers(models: list[UserModel]) -> list[LocalModel]:
    """Return the server and the worker for each model."""
    workers: list[str] = []
    for one in models:
        token = re.sub(r"[^A-Za-z0-9_-]", "-", one.name)[:48]
        workers.append(f"{token}-{len(workers) + 1}" if token in workers else token)
    return [_plan_server(one, worker) for one, worker in zip(models, workers, strict=True)]


def _plan_server(model: UserModel, worker: str) -> LocalModel:
    fixed = ["--model", str(model.file.path.absolute()), "--alias", model.name]
    fixed += ["--ctx", str(model.context * model.slots), "--parallel", str(model.slots)]
    fixed += ["--embeddings"] if model.file.embeds else []
    fixed += ["--pooling", "mean"] if model.file.embeds and not model.file.pools else []
    return LocalModel(
        name=f"llama-{worker}",
        title=f"llama.cpp, {model.name}",
        module="cli.embedded.llama_server",
        arguments=lambda port: [*fixed, "--port", str(port)],
        ready_path="/health",
        worker=worker,
        worker_title="llama.cpp",
        backend="openai",
        slots=model.slots,
        options={"capabilities": "embeddings"} if model.file.embeds else {},
        chat=not model.file.embeds,
        required=True,
    )
