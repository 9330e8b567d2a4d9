"""Read the header of a GGUF file: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.

The package `gguf` takes two seconds to import, reads every tensor's description, and belongs to an extra that need not be
installed.
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
"""Type in the file, and the letter of `struct` for it."""
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
RERANK_POOLING = 4
"""Pooling type of rerankers."""
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})")


class InvalidModelFile(Exception):
    """The file cannot be served. The message tells the user why, and what to do."""


@dataclass(frozen=True, slots=True)
class GgufModel:
    """A GGUF file with a complete model."""

    path: Path
    architecture: str
    context: int
    """Tokens that the model was trained for; 0 if the file does not say."""
    has_chat_template: bool
    embeds: bool
    """Whether it makes embeddings instead of text."""
    pools: bool
    """Whether the file sets how token embeddings are pooled."""

    @property
    def name(self) -> str:
        """The file's name without its ending and the number of its part."""
        stem = self.path.name.removesuffix(".gguf")
        part = _SHARD.fullmatch(stem)
        return part.group(1) if part else stem


def read_model(path: Path) -> GgufModel:
    """Read the header of a file. Raises InvalidModelFile."""
    try:
        with path.open("rb") as file:
            header = dict(_entries(path, file))
    except OSError as error:
        raise InvalidModelFile(f"{path}: {_describe(error)}") from error
    except (struct.error, EOFError, UnicodeDecodeError) as error:
        raise InvalidModelFile(f"{path} is broken: it ends within its header. Download it again.") from error
    return _model(path, header)


def _describe(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return "the file does not exist"
    if isinstance(error, IsADirectoryError):
        return "it is a folder; name the .gguf file in it"
    return str(error.strerror or error)


def _model(path: Path, header: dict[str, Any]) -> GgufModel:
    architecture = str(header.get("general.architecture", ""))
    kind = str(header.get("general.type", "model"))
    if not architecture:
        raise InvalidModelFile(f"{path} names no architecture: it holds no model.")
    if kind == "adapter":
        raise InvalidModelFile(f"{path} is a LoRA adapter, not a model. Merge it into its model first.")
    if kind in {"mmproj", "imatrix"} or architecture == "clip":
        raise InvalidModelFile(
            f"{path} is the {kind if kind != 'model' else 'mmproj'} of a model, not a model. Name the model's own file."
        )
    _check_parts(path)
    pooling = header.get(f"{architecture}.pooling_type")
    if pooling == RERANK_POOLING:
        raise InvalidModelFile(
            f"{path} is a reranker, which `nexus up` does not serve. Run llama-server --reranking, and a worker beside it."
        )
    context = header.get(f"{architecture}.context_length", 0)
    embeds = architecture in EMBEDDING_ARCHITECTURES or bool(pooling)
    return GgufModel(
        path=path,
        architecture=architecture,
        context=context if isinstance(context, int) else 0,
        has_chat_template=bool(header.get("tokenizer.chat_template")),
        embeds=embeds,
        pools=bool(pooling),
    )


def _check_parts(path: Path) -> None:
    """Raise InvalidModelFile unless `path` is a whole model, or the first part with all others beside it."""
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
        raise InvalidModelFile(f"{path} is the first of {count} parts, and {missing[0]} is not beside it")


def _entries(path: Path, file: BinaryIO) -> Iterator[tuple[str, Any]]:
    """Yield the keys and values of the header; the value of an array is None."""
    if (magic := file.read(4)) != MAGIC:
        problem = "empty" if not magic else "not a GGUF file"
        raise InvalidModelFile(
            f"{path} is {problem}. llama.cpp serves .gguf files: download one, or convert the model with llama.cpp's converter."
        )
    (version,) = _unpack(file, "I")
    if version not in VERSIONS:
        raise InvalidModelFile(
            f"{path} is a GGUF of version {version}, which llama.cpp does not read. Convert or download it again."
        )
    _, count = _unpack(file, "QQ")
    if count > MAX_ENTRIES:
        raise InvalidModelFile(f"{path} is broken: its header claims {count} entries. Download it again.")
    for _ in range(count):
        key = _string(file, MAX_KEY_BYTES)
        (kind,) = _unpack(file, "I")
        yield key, _value(file, kind)


def _value(file: BinaryIO, kind: int) -> Any:
    if kind in SCALARS:
        return _unpack(file, SCALARS[kind])[0]
    if kind == STRING:
        return _string(file, MAX_STRING_BYTES)
    if kind == ARRAY:
        return _skip_array(file)
    raise EOFError(f"type {kind}")


def _skip_array(file: BinaryIO, depth: int = 0) -> None:
    kind, count = _unpack(file, "IQ")
    if kind in SCALARS:
        _skip(file, count * struct.calcsize("<" + SCALARS[kind]))
        return
    for _ in range(count):
        if kind == STRING:
            (size,) = _unpack(file, "Q")
            _skip(file, size)
        elif kind == ARRAY and depth < 4:
            _skip_array(file, depth + 1)
        else:
            raise EOFError(f"type {kind}")


def _skip(file: BinaryIO, size: int) -> None:
    """Skip bytes. Raises EOFError if the file ends before."""
    if size > os.fstat(file.fileno()).st_size - file.tell():
        raise EOFError
    file.seek(size, 1)


def _string(file: BinaryIO, limit: int) -> str:
    (size,) = _unpack(file, "Q")
    if size > limit:
        raise EOFError(f"a string of {size} bytes")
    text = file.read(size)
    if len(text) < size:
        raise EOFError
    return text.decode(errors="replace")


def _unpack(file: BinaryIO, form: str) -> tuple[Any, ...]:
    form = "<" + form
    return struct.unpack(form, file.read(struct.calcsize(form)))
