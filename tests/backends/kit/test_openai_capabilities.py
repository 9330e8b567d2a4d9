"""The capabilities of models."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from schemas.frames import Progress
from schemas.jobs import Capability
from tests.backends.contract import chat
from tests.backends.doubles.openai import OpenAIDouble
from tests.backends.doubles.router import RouterDouble
from workers.adapter_kit.openai.capabilities import TEXT, CapabilitySelector
from workers.backends.base import BackendConfig
from workers.backends.openai import OpenAIBackend

EMBEDDINGS, IMAGES, SPEECH, TRANSCRIPTIONS, RERANK = (
    (Capability.EMBEDDINGS,),
    (Capability.IMAGES,),
    (Capability.SPEECH,),
    (Capability.TRANSCRIPTIONS,),
    (Capability.RERANK,),
)


@pytest.mark.parametrize(
    ("name", "capabilities"),
    [
        ("multilingual-e5-small-q4", EMBEDDINGS),
        ("text-embedding-3-small", EMBEDDINGS),
        ("nomic-embed-text-v1.5", EMBEDDINGS),
        ("BAAI/bge-m3", EMBEDDINGS),
        ("sentence-transformers/all-MiniLM-L6-v2", EMBEDDINGS),
        ("BAAI/bge-reranker-v2-m3", RERANK),
        ("Qwen3-Reranker-0.6B", RERANK),
        ("whisper-1", TRANSCRIPTIONS),
        ("Systran/faster-whisper-small", TRANSCRIPTIONS),
        ("gpt-4o-mini-transcribe", TRANSCRIPTIONS),
        ("nvidia/parakeet-tdt-0.6b", TRANSCRIPTIONS),
        ("tts-1-hd", SPEECH),
        ("gpt-4o-mini-tts", SPEECH),
        ("kokoro", SPEECH),
        ("en_US-joe-piper", SPEECH),
        ("dall-e-3", IMAGES),
        ("gpt-image-1", IMAGES),
        ("stabilityai/sdxl-turbo", IMAGES),
        ("FLUX.1-schnell", IMAGES),
        ("sd-turbo", IMAGES),
        ("smollm2", TEXT),
        ("llama3.1:8b", TEXT),
        ("Qwen2.5-Coder", TEXT),
        ("gpt-4o", TEXT),
        ("phi-3.5-mini", TEXT),
        ("attstat", TEXT),
        ("fluxion", TEXT),
    ],
)
def test_well_known_names(name: str, capabilities: Any) -> None:
    assert CapabilitySelector({}).select(name, {}) == capabilities


@pytest.mark.parametrize(
    ("model", "capabilities"),
    [
        ({"type": "embeddings", "capabilities": ["tool_use"]}, EMBEDDINGS),  # LM Studio
        ({"type": "vlm"}, TEXT),
        ({"type": "rerank"}, RERANK),  # Together
        ({"task": "automatic-speech-recognition"}, TRANSCRIPTIONS),  # speaches
        ({"task": "text-to-speech"}, SPEECH),
        ({"capabilities": ["embed", "rerank"]}, (*EMBEDDINGS, *RERANK)),  # Infinity
        ({"capabilities": ["FLAG_TRANSCRIPT"]}, TRANSCRIPTIONS),  # LocalAI
        ({"capabilities": {"completion_chat": True, "vision": False}}, TEXT),  # Mistral
        ({"model_type": {"reranker": {"id2label": {}}}}, RERANK),  # TEI
        ({"type": "model", "capabilities": "nonsense"}, SPEECH),
        ({"type": 7, "task": None, "capabilities": [1]}, SPEECH),
    ],
)
def test_the_servers_word_counts_before_the_name(model: dict[str, Any], capabilities: Any) -> None:
    assert CapabilitySelector({}).select("tts-1", model) == capabilities


@pytest.mark.parametrize("both", ["chat+embeddings", "chat, embeddings"])
def test_the_operators_word_counts_first(both: str) -> None:
    choice = CapabilitySelector({"capabilities": both, "capabilities.*Mini*": "rerank"})
    assert choice.select("whisper", {"type": "tts"}) == (Capability.CHAT, Capability.EMBEDDINGS)
    assert choice.select("all-minilm", {"type": "tts"}) == RERANK


@pytest.mark.parametrize("options", [{"capabilities": "dance"}, {"capabilities.x": ""}, {"capabilities.": "chat"}])
def test_an_option_that_makes_no_sense_is_an_error(options: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"capability|no option"):
        OpenAIBackend(BackendConfig(url="http://localhost", options=options))


@pytest.mark.parametrize("kind", ["llamacpp", "llama-swap"])
async def test_servers_that_load_models_say_which_they_hold(kind: Literal["llamacpp", "llama-swap"]) -> None:
    """llama.cpp's router reports them in its list, llama-swap beside it; models of a peer of llama-swap are not its own."""
    async with RouterDouble(("a", "b", "c"), 2, kind) as router:
        router.states = {"a": "loaded", "b": "loading"}
        backend = OpenAIBackend(BackendConfig(url=router.url))
        offers = {offer.name: offer for offer in (await backend.discover()).models}
        states = {name: (offer.loaded, offer.loading) for name, offer in offers.items()}
        ours = {"a": (True, False), "b": (False, True), "c": (False, False)}
        assert states == ours | ({"peer/big": (None, False)} if kind == "llama-swap" else {})
        assert await backend.resident_models() == frozenset({"a", "b"})
        router.states = {"c": "loaded"}
        assert await backend.resident_models() == frozenset({"c"})
        if kind == "llamacpp":
            assert offers["a"].context_length == 512, "as it is loaded"
        await backend.close()


async def test_a_model_that_is_not_loaded_gets_the_time_to_load() -> None:
    async with RouterDouble(("a", "b"), 1) as router:
        router.states = {"a": "loaded"}
        backend = OpenAIBackend(BackendConfig(url=router.url))
        await backend.discover()
        for name, phases in (("b", ["load", "run"]), ("a", [])):
            outputs = [output async for output in backend.run(chat(name))]
            assert [one.phase for one in outputs if isinstance(one, Progress)] == phases
        await backend.close()


async def test_other_servers_say_nothing_of_memory() -> None:
    async with OpenAIDouble() as server:
        backend = OpenAIBackend(BackendConfig(url=server.url))
        await backend.discover()
        assert await backend.resident_models() is None
        await backend.close()
