"""`nexus up --model FILE.gguf`, with real weights on a real llama.cpp server."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
from pathlib import Path

import pytest

from cli.embedded.llama_server import find_model
from tests.stack.test_up import Up

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def weights() -> Path:
    path = find_model()
    if path is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("the local-chat extra is not installed")
    return path


def as_embedder(weights: Path, target: Path) -> Path:
    """The same weights, in a file that prints that a text's embedding is the mean of its tokens'."""
    output = weights.read_bytes()
    key = b"llama.pooling_type"
    entry = struct.pack("<Q", len(key)) + key + struct.pack("<II", 4, 1)
    version, tensors, count = struct.unpack("<IQQ", output[4:24])
    # A longer head moves the tensors, whose place is counted from its aligned end: the padding takes it up, or grows by 32.
    padding = struct.pack("<Q", 5) + b"x.pad" + struct.pack("<IQ", 8, 0)
    fill = -(len(entry) + len(padding)) % 32
    padding = struct.pack("<Q", 5) + b"x.pad" + struct.pack("<IQ", 8, fill) + b"x" * fill
    target.write_bytes(b"GGUF" + struct.pack("<IQQ", version, tensors, count + 2) + entry + padding + output[24:])
    return target


async def test_user_models_are_served(tmp_path: Path, weights: Path) -> None:
    """Under their names; the bundled chat model is not served, and embeddings need no option."""
    mine = shutil.copy(weights, tmp_path / "My Model.Q4.gguf")
    embedder = as_embedder(weights, tmp_path / "embedder.gguf")
    flags = ["--model", str(mine), "--model", f"vectors={embedder}", "--context", "1024", "--no-local-models"]
    async with Up(tmp_path / "nexus", *flags) as up:
        await up.is_up()
        code, output, _ = await up.command("models", "--json")
        assert code == 0
        models = {one["id"]: one["capabilities"] for one in json.loads(output)["data"]}
        assert models.keys() == {"My-Model.Q4", "vectors"}
        assert "chat" in models["My-Model.Q4"]
        assert models["vectors"] == ["embeddings"]
        chat, embeddings = await up.answers_to_its_lines()
        assert json.loads(chat)["choices"][0]["message"]["content"]
        assert len(json.loads(embeddings)["data"][0]["embedding"]) == 576
        up.process.send_signal(signal.SIGINT)
        assert await up.ended() == 0


async def test_a_model_that_does_not_load_fails_the_start(tmp_path: Path, weights: Path) -> None:
    """Its header is complete, the rest is missing: llama.cpp's log is shown, and no process is left."""
    with weights.open("rb") as whole:
        (tmp_path / "cut.gguf").write_bytes(whole.read(4_000_000))
    async with Up(tmp_path / "nexus", "--model", str(tmp_path / "cut.gguf"), "--no-local-models") as up:
        await up.prints("Nexus could not start")
        assert await up.ended() == 1
        assert "corrupted or incomplete" in up.output
