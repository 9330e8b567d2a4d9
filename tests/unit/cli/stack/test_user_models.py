"""`nexus up --model`: the files that it accepts, the names of models, and the errors for other files."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest

from cli.embedded.gguf import InvalidModelFile, read_model
from cli.embedded.llama_server import MODEL_NAME, find_model, is_installed
from cli.errors import ConsoleError
from cli.stack.user_models import UserModel, plan_servers, read_user_models

needs_llama = pytest.mark.skipif(not is_installed(), reason="the local-chat extra is not installed")
CHAT = {"general.architecture": "llama", "llama.context_length": 8192, "tokenizer.chat_template": "{{ messages }}"}


def gguf(path: Path, expected: dict[str, Any], *, version: int = 3, cut: int | None = None) -> Path:
    """A file with this head, and nothing behind it."""
    head = b"GGUF" + struct.pack("<IQQ", version, 0, len(expected))
    for key, value in expected.items():
        head += _string(key) + _value(value)
    path.write_bytes(head[:cut])
    return path


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _value(value: Any) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, list) and isinstance(value[0], list):
        return struct.pack("<IIQ", 9, 9, len(value)) + b"".join(_value(one)[4:] for one in value)
    if isinstance(value, list) and isinstance(value[0], str):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_string, value))
    if isinstance(value, list):
        return struct.pack("<IIQ", 9, 4, len(value)) + struct.pack(f"<{len(value)}I", *value)
    return struct.pack("<II", 4, value)


def test_the_bundled_model() -> None:
    """A real file, as llama.cpp's converter wrote it."""
    path = find_model()
    if path is None:
        pytest.skip("the local-chat extra is not installed")
    model = read_model(path)
    assert (model.architecture, model.context, model.has_chat_template, model.embeds) == ("llama", 8192, True, False)
    assert model.name == "SmolLM2-135M-Instruct.Q4_1"


def test_arrays_of_all_kinds_are_skipped(tmp_path: Path) -> None:
    """Vocabularies stand before what is wanted."""
    lists = {"a": ["", "one", "zwölf"], "b": [1, 2, 3], "c": [[1, 2], [3]], "d": 1.5}
    assert read_model(gguf(tmp_path / "m.gguf", lists | CHAT)).context == 8192


@pytest.mark.parametrize(
    ("expected", "embeds", "pools"),
    [
        (CHAT, False, False),
        (CHAT | {"llama.pooling_type": 0}, False, False),
        ({"general.architecture": "bert", "bert.pooling_type": 1}, True, True),
        ({"general.architecture": "nomic-bert"}, True, False),
        ({"general.architecture": "qwen3", "qwen3.pooling_type": 3}, True, True),
        ({"general.architecture": "gemma-embedding"}, True, False),
    ],
)
def test_embeddings_models_are_known_by_their_file(
    tmp_path: Path, expected: dict[str, Any], embeds: bool, pools: bool
) -> None:
    """By architecture, or because it says how to pool."""
    model = read_model(gguf(tmp_path / "m.gguf", expected))
    assert (model.embeds, model.pools) == (embeds, pools)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is empty"),
        (b"PK\3\4 a zip", "is not a GGUF file"),
        (b"<!DOCTYPE html>", "is not a GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1", "is not a GGUF file"),
        (b"GGUF", "ends within its header"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "of version 1"),
        (b"FUGG" + struct.pack(">IQQ", 3, 0, 0), "is not a GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), "header claims"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 2**50), "ends within"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + _string("a") + struct.pack("<IIQ", 9, 8, 2**60), "ends within"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + _string("a") + struct.pack("<IIQ", 9, 4, 2**63 - 1), "ends within"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + _string("a") + struct.pack("<I", 99), "ends within"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "names no architecture"),
    ],
)
def test_files_that_are_no_model_are_rejected(tmp_path: Path, content: bytes, expected: str) -> None:
    """With the file's name and what it is."""
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(InvalidModelFile, match=expected) as caught:
        read_model(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("cut", [5, 20, 30, 60, 90])
def test_a_download_that_broke_off(tmp_path: Path, cut: int) -> None:
    """Wherever it did."""
    with pytest.raises(InvalidModelFile, match=r"ends within its header\. Download it again"):
        read_model(gguf(tmp_path / "m.gguf", CHAT, cut=cut))


@pytest.mark.parametrize(
    ("expected", "word"),
    [
        ({"general.architecture": "clip", "general.type": "mmproj"}, "mmproj"),
        ({"general.architecture": "clip"}, "mmproj"),
        (CHAT | {"general.type": "adapter"}, "LoRA"),
        (CHAT | {"general.type": "imatrix"}, "imatrix"),
        ({"general.architecture": "bert", "bert.pooling_type": 4}, "reranker"),
    ],
)
def test_other_things_in_gguf_files(tmp_path: Path, expected: dict[str, Any], word: str) -> None:
    """What lies beside models in the same repositories."""
    with pytest.raises(InvalidModelFile, match=word):
        read_model(gguf(tmp_path / "m.gguf", expected))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    """A folder, and nothing."""
    with pytest.raises(InvalidModelFile, match="it is a folder"):
        read_model(tmp_path)
    with pytest.raises(InvalidModelFile, match="the file does not exist"):
        read_model(tmp_path / "none")


def test_a_model_in_parts(tmp_path: Path) -> None:
    """The first part names the model; all others must be beside it."""
    first = gguf(tmp_path / "m-00001-of-00003.gguf", CHAT)
    second = gguf(tmp_path / "m-00002-of-00003.gguf", CHAT)
    with pytest.raises(InvalidModelFile, match=r"m-00003-of-00003\.gguf is not beside it"):
        read_model(first)
    with pytest.raises(InvalidModelFile, match=r"name the first one, m-00001-of-00003\.gguf"):
        read_model(second)
    gguf(tmp_path / "m-00003-of-00003.gguf", CHAT)
    assert read_model(first).name == "m"


def chosen(*wanted: str, context: int | None = None, default_chat: bool = False) -> list[UserModel]:
    return read_user_models(list(wanted), context, default_chat=default_chat)


@needs_llama
def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the file, or given; a `=` in a file's own name is no separator."""
    monkeypatch.chdir(tmp_path)
    for name in ("Qwen3-8B-Q4_K_M.gguf", "a=b.gguf", "my model (1).gguf"):
        gguf(tmp_path / name, CHAT)
    found = chosen("Qwen3-8B-Q4_K_M.gguf", "a=b.gguf", "org/qwen:8b=Qwen3-8B-Q4_K_M.gguf", "my model (1).gguf")
    assert [one.name for one in found] == ["Qwen3-8B-Q4_K_M", "a-b", "org/qwen:8b", "my-model-1"]
    assert [one.worker for one in plan_servers(found)] == ["Qwen3-8B-Q4_K_M", "a-b", "org-qwen-8b", "my-model-1"]
    assert [one.worker for one in plan_servers(chosen("a.b=a=b.gguf", "a-b=a=b.gguf"))] == ["a-b", "a-b-2"]
    assert chosen(found[2].flag)[0] == UserModel("org/qwen:8b", read_model(tmp_path / "Qwen3-8B-Q4_K_M.gguf"), 4096)
    for wanted in (["a=b.gguf", "a-b=a=b.gguf"], ["piper-joe=a=b.gguf"]):
        with pytest.raises(ConsoleError, match="another model is called"):
            chosen(*wanted)
    with pytest.raises(ConsoleError, match="is not a valid model name"):
        chosen("a b=a=b.gguf")
    assert chosen(f"{MODEL_NAME}=a=b.gguf")
    with pytest.raises(ConsoleError, match="another model is called"):
        chosen(f"{MODEL_NAME}=a=b.gguf", default_chat=True)


@needs_llama
def test_context(tmp_path: Path) -> None:
    """Of each request: never more than the model was made for, and fewer at once where it is much."""
    small = str(gguf(tmp_path / "small.gguf", CHAT | {"llama.context_length": 2048}))
    large = str(gguf(tmp_path / "large.gguf", CHAT | {"llama.context_length": 131_072}))
    assert [(one.context, one.slots) for one in chosen(small, large)] == [(2048, 4), (4096, 4)]
    assert [(one.context, one.slots) for one in chosen(large, context=16_384)] == [(16_384, 2)]
    arguments = plan_servers(chosen(large, context=65_536))[0].arguments(1)
    assert arguments[arguments.index("--ctx") : arguments.index("--ctx") + 4] == ["--ctx", "65536", "--parallel", "1"]
    with pytest.raises(ConsoleError, match=r"small\.gguf was trained for at most 2048 tokens"):
        chosen(large, small, context=4096)
    with pytest.raises(ConsoleError, match="none is given"):
        chosen(context=4096)


@needs_llama
def test_a_missing_chat_template_is_a_warning(tmp_path: Path) -> None:
    """Of a model that would chat; an embeddings model needs none."""
    base = {name: value for name, value in CHAT.items() if name != "tokenizer.chat_template"}
    assert "has no chat template" in chosen(str(gguf(tmp_path / "base.gguf", base)))[0].note
    assert not chosen(str(gguf(tmp_path / "chat.gguf", CHAT)))[0].note
    embeds = chosen(str(gguf(tmp_path / "embeds.gguf", base | {"llama.pooling_type": 1})))
    assert not embeds[0].note
    assert plan_servers(embeds)[0].options == {"capabilities": "embeddings"}
    assert not plan_servers(embeds)[0].chat
