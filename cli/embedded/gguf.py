"""What the head of a GGUF file says of the model in it: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.

The package `gguf` reads it too, but takes two seconds to import and reads every tensor's description; and the extra that
brings it need not be there to say that a file is none.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_ENTRIES = 100_000
MAX_KEY_BYTES = 65_535
MAX_STRING_BYTES = 64 * 1024 * 1024
STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""By type in the file: `struct`'s letter."""
EMBEDDING_ARCHITECTURES = frozenset(
    {
        "bert",
        "nomic-bert",
        "nomic-bert-moe",
        "jina-bert-v2",
        "jina-bert-v3",
        "modern-bert",
        "neo-bert",
        "eurobert",
        "gemma-embedding",
        "t5encoder",
    }
)
RANK = 4
"""The pooling type of rerankers."""
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})")


class InvalidModelFile(Exception):
    """The file cannot be served. The message is for the user, and says why and what to do."""


@dataclass(frozen=True, slots=True)
class GgufModel:
    """A GGUF with a model of its own."""

    path: Path
    architecture: str
    context: int
    """Tokens that the model was trained for; 0: the file does not say."""
    has_chat_template: bool
    embeds: bool
    """It makes embeddings, not text."""
    pools: bool
    """The file says how embeddings come of its tokens'."""

    @property
    def name(self) -> str:
        """What the file's name says: without its ending, and without the number of its part."""
        stem = self.path.name.removesuffix(".gguf")
        part = _SHARD.fullmatch(stem)
        return part.group(1) if part else stem


def read_model(path: Path) -> GgufModel:
    """Read the head of a file. Raises InvalidModelFile."""
    try:
        with path.open("rb") as file:
            said = dict(_entries(path, file))
    except OSError as error:
        raise InvalidModelFile(f"{path}: {_why(error)}") from error
    except (struct.error, EOFError, UnicodeDecodeError) as error:
        raise InvalidModelFile(f"{path} is broken: it ends before its head does; download it again") from error
    return _model(path, said)


def _why(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, IsADirectoryError):
        return "that is a folder; name the .gguf file in it"
    return str(error.strerror or error)


def _model(path: Path, said: dict[str, Any]) -> GgufModel:
    architecture = str(said.get("general.architecture", ""))
    kind = str(said.get("general.type", "model"))
    if not architecture:
        raise InvalidModelFile(f"{path} does not say its architecture: it holds no model")
    if kind == "adapter":
        raise InvalidModelFile(f"{path} is a LoRA adapter, not a model; merge it into its model first")
    if kind in {"mmproj", "imatrix"} or architecture == "clip":
        raise InvalidModelFile(
            f"{path} is the {kind if kind != 'model' else 'mmproj'} of a model, not a model; name the model's own file"
        )
    _check_parts(path)
    pooling = said.get(f"{architecture}.pooling_type")
    if pooling == RANK:
        raise InvalidModelFile(
            f"{path} is a reranker, which `nexus up` does not serve; run llama-server --reranking, and a worker beside it"
        )
    context = said.get(f"{architecture}.context_length", 0)
    embeds = architecture in EMBEDDING_ARCHITECTURES or bool(pooling)
    return GgufModel(
        path=path,
        architecture=architecture,
        context=context if isinstance(context, int) else 0,
        has_chat_template=bool(said.get("tokenizer.chat_template")),
        embeds=embeds,
        pools=bool(pooling),
    )


def _check_parts(path: Path) -> None:
    """Raise InvalidModelFile unless `path` is whole, or the first part of a model whose others are beside it."""
    part = _SHARD.fullmatch(path.name.removesuffix(".gguf"))
    if part is None:
        return
    base, number, count = part.group(1), int(part.group(2)), int(part.group(3))
    if number != 1:
        raise InvalidModelFile(
            f"{path} is part {number} of {count}; name the first one, {base}-00001-of-{count:05}.gguf"
        )
    missing = [
        name for n in range(2, count + 1) if not path.with_name(name := f"{base}-{n:05}-of-{count:05}.gguf").is_file()
    ]
    if missing:
        raise InvalidModelFile(f"{path} is the first of {count} parts, and there is no {missing[0]} beside it")


def _entries(path: Path, file: BinaryIO) -> Iterator[tuple[str, Any]]:
    """The keys and values of the head; of arrays only that they are there."""
    if (magic := file.read(4)) != MAGIC:
        what = "empty" if not magic else "not a GGUF file"
        raise InvalidModelFile(
            f"{path} is {what}; llama.cpp serves models in files that end in .gguf, made by its converter or downloaded"
        )
    (version,) = _take(file, "I")
    if version not in VERSIONS:
        raise InvalidModelFile(
            f"{path} is a GGUF of version {version}, which llama.cpp does not read any more; convert or download it again"
        )
    _, count = _take(file, "QQ")
    if count > MAX_ENTRIES:
        raise InvalidModelFile(f"{path} is broken: it claims {count} entries in its head; download it again")
    for _ in range(count):
        key = _string(file, MAX_KEY_BYTES)
        (kind,) = _take(file, "I")
        yield key, _value(file, kind)


def _value(file: BinaryIO, kind: int) -> Any:
    if kind in SCALARS:
        return _take(file, SCALARS[kind])[0]
    if kind == STRING:
        return _string(file, MAX_STRING_BYTES)
    if kind == ARRAY:
        return _skip_array(file)
    raise EOFError(f"type {kind}")


def _skip_array(file: BinaryIO, depth: int = 0) -> None:
    kind, count = _take(file, "IQ")
    if kind in SCALARS:
        _skip(file, count * struct.calcsize("<" + SCALARS[kind]))
        return
    for _ in range(count):
        if kind == STRING:
            (size,) = _take(file, "Q")
            _skip(file, size)
        elif kind == ARRAY and depth < 4:
            _skip_array(file, depth + 1)
        else:
            raise EOFError(f"type {kind}")


def _skip(file: BinaryIO, size: int) -> None:
    """Raise EOFError where the file ends before."""
    if size > os.fstat(file.fileno()).st_size - file.tell():
        raise EOFError
    file.seek(size, 1)


def _string(file: BinaryIO, limit: int) -> str:
    (size,) = _take(file, "Q")
    if size > limit:
        raise EOFError(f"a string of {size} bytes")
    text = file.read(size)
    if len(text) < size:
        raise EOFError
    return text.decode(errors="replace")


def _take(file: BinaryIO, form: str) -> tuple[Any, ...]:
    form = "<" + form
    return struct.unpack(form, file.read(struct.calcsize(form)))
