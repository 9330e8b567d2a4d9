"""The official OpenAI SDK for Node: `node/client.mjs` uses it, the tests look at what it saw."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.cluster import KEY, Cluster

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(180)]

FOLDER = Path(__file__).parent / "node"
MODELS = ["echo", "org/name:tag", "a.b *c>/d", "modèle-日本"]
INSTALL_S = 90
RUN_S = 60


async def run(*command: str, timeout_s: float, env: dict[str, str] | None = None) -> tuple[int, bytes, bytes]:
    """Run a program in the folder of the Node client; it does not outlive its time."""
    process = await asyncio.create_subprocess_exec(
        *command, cwd=FOLDER, env=env, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(timeout_s):
            out, err = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        return -1, b"", f"not done within {timeout_s:g} s".encode()
    return process.returncode or 0, out, err


async def install() -> None:
    """Put the SDK at the version of package-lock.json into node_modules, unless it is there."""
    lock = (FOLDER / "package-lock.json").read_text()
    stamp = FOLDER / "node_modules" / ".nexus-lock"
    if stamp.is_file() and stamp.read_text() == lock:
        return
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is not on PATH, so that the Node SDK cannot be installed")
    code, _, err = await run(npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", timeout_s=INSTALL_S)
    if code:
        pytest.skip(f"npm could not install the Node SDK: {err.decode(errors='replace')[-500:]}")
    stamp.write_text(lock)


async def run_client(program: str, cluster: Cluster) -> dict[str, Any]:
    """Run a program that uses an SDK; return what each of its tests saw."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not on PATH")
    await install()
    env = os.environ | {"NEXUS_URL": cluster.url, "NEXUS_KEY": KEY, "NEXUS_MODELS": json.dumps(MODELS)}
    code, out, err = await run(node, program, timeout_s=RUN_S, env=env)
    assert code == 0, err.decode(errors="replace")[-2000:]
    answers: dict[str, Any] = json.loads(out)
    unexpected = {name: a["unexpected"] for name, a in answers.items() if isinstance(a, dict) and "unexpected" in a}
    assert not unexpected
    return answers


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def seen(cluster: Cluster) -> dict[str, Any]:
    """What each of the client's tests saw."""
    return await run_client("client.mjs", cluster)


def check_chunks(chunks: list[dict[str, Any]]) -> str:
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert choices[0]["delta"]["role"] == "assistant"
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["stop"]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


async def test_an_answer(seen: dict[str, Any]) -> None:
    """Chat and text completions answer in one piece."""
    assert seen["answer"]["choices"][0]["message"]["content"] == "one two three"
    assert seen["answer"]["usage"]["total_tokens"] == 6
    assert seen["completion"]["choices"][0]["text"] == "to be"


async def test_streams(seen: dict[str, Any]) -> None:
    """A stream comes as chunks, and the SDK's helper makes an answer of them."""
    assert check_chunks(seen["stream"]) == "one two three"
    assert all(chunk.get("usage") is None for chunk in seen["stream"])
    assert seen["helper"]["choices"][0]["message"]["content"] == "one two three"


async def test_a_stream_with_usage(seen: dict[str, Any]) -> None:
    """`include_usage` adds one last chunk without choices."""
    *chunks, last = seen["usage"]
    assert check_chunks(chunks) == "one two three"
    assert (last["choices"], last["usage"]["total_tokens"]) == ([], 6)
    assert all(chunk["usage"] is None for chunk in chunks)


async def test_models(seen: dict[str, Any]) -> None:
    """Models are listed and found by name, whatever it holds."""
    assert set(MODELS) <= {model["id"] for model in seen["models"]}
    assert all(isinstance(model["created"], int) and model["owned_by"] for model in seen["models"])
    assert seen["retrieved"] == MODELS


@pytest.mark.parametrize(
    ("case", "name", "status", "code", "param"),
    [
        ("unknownModel", "NotFoundError", 404, "model_not_found", "model"),
        ("unknownModelStreamed", "NotFoundError", 404, "model_not_found", "model"),
        ("wrongKey", "AuthenticationError", 401, "invalid_api_key", None),
        ("wrongField", "BadRequestError", 400, None, "temperature"),
        ("tooLarge", "APIError", 413, "request_too_large", None),
        ("emptyFile", "BadRequestError", 400, None, "file"),
        ("wrongSize", "BadRequestError", 400, None, "size"),
        ("wrongKeyUpload", "AuthenticationError", 401, "invalid_api_key", None),
        ("responseCancelled", "BadRequestError", 400, "response_not_background", None),
    ],
)
async def test_errors(
    seen: dict[str, Any], case: str, name: str, status: int, code: str | None, param: str | None
) -> None:
    """Errors are the SDK's classes, with status, code, param and request id, and without the key."""
    error = seen[case]
    assert (error["name"], error["status"], error["code"], error["param"]) == (name, status, code, param)
    assert error["requestID"].startswith("req_")
    assert "sk-secret" not in error["message"]


async def test_a_broken_stream(seen: dict[str, Any]) -> None:
    """A stream that fails after it began is an error; one that the caller leaves is none."""
    assert seen["brokenStream"]["name"] == "APIError"
    assert seen["leftStream"] == "assistant"


async def test_request_ids(seen: dict[str, Any]) -> None:
    """Every answer has its own request id, streams too."""
    first, second = seen["requestIds"]
    assert first.startswith("req_")
    assert second.startswith("req_")
    assert first != second


async def test_embeddings(seen: dict[str, Any]) -> None:
    """The SDK asks for base64 and unpacks it: the same numbers as without; token ids are accepted."""
    packed, plain = seen["embedding"]
    assert [len(vector) for vector in packed] == [8, 8]
    assert packed[1] == pytest.approx(plain[1])
    assert seen["tokenIds"] == 2


async def test_images(seen: dict[str, Any]) -> None:
    """Pictures come as data, by URL and as a stream; edits take several, and a mask."""
    assert seen["image"] == ["iVBORw0K"] * 2
    assert seen["imageUrl"] == [200, "image/png"]
    assert seen["imageStream"] == ["image_generation.partial_image", "image_generation.completed"]
    assert seen["edit"] == 2


async def test_speech(seen: dict[str, Any]) -> None:
    """Sound comes whole, as it is made, and as events."""
    content_type, begin, length = seen["speech"]
    assert (content_type, begin) == ("audio/wav", "RIFF")
    assert length > 1000
    assert seen["speechStream"] is True
    assert set(seen["speechEvents"][:-1]) == {"speech.audio.delta"}
    assert seen["speechEvents"][-1] == "speech.audio.done"


async def test_transcriptions(seen: dict[str, Any]) -> None:
    """Every kind of file that the SDK takes arrives whole, and every format is understood."""
    first, *others = seen["transcription"]
    assert first.startswith("Echo heard 21 bytes")
    assert others == [first, first]
    assert seen["translation"] == first
    subtitles, words, segments = seen["transcriptionFormats"]
    assert subtitles.startswith("WEBVTT")
    assert (words, segments) == (len(first.split()), 1)
    assert set(seen["transcriptionStream"][:-1]) == {"transcript.text.delta"}
    assert seen["transcriptionStream"][-1] == "transcript.text.done"


async def test_responses(seen: dict[str, Any]) -> None:
    """Responses come whole, as events that the SDK's helper understands, and in the background, resumed where they were left."""
    assert seen["response"]["output_text"] == "one two three"
    kinds, text = seen["responseHelper"]
    assert (kinds[0], kinds[-1], text) == ("response.created", "response.completed", "one two three")
    numbers, text, items, cancelled = seen["responseResumed"]
    assert numbers == list(range(5, 5 + len(numbers)))
    assert (text, items, cancelled) == ("one two three", 1, "completed")
