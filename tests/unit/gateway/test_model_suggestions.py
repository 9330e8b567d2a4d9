"""Suggestions for unknown models."""

from __future__ import annotations

import random

import pytest

from gateway.model_suggestions import BURST, MAX_CANDIDATES, MAX_LETTERS, RATE, ModelSuggestions, did_you_mean
from schemas.errors import ModelNotFound
from schemas.jobs import Capability
from schemas.presence import WorkerState
from tests.unit.gateway.test_model_catalog import catalog, offer, worker

MODELS = ("smollm2", "piper-joe", "whisper-tiny.en", "multilingual-e5-small-q4", "org/Qwen2.5-7B-Instruct")


def suggestions(*names: str) -> ModelSuggestions:
    made = ModelSuggestions()
    made.load(names)
    return made


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("smolm2", "smollm2"),
        ("SmolLM2", "smollm2"),
        ("smollm2:latest", "smollm2"),
        ("joe", "piper-joe"),
        ("whisper", "whisper-tiny.en"),
        ("e5-small", "multilingual-e5-small-q4"),
        ("qwen2.5-7b-instruct", "org/Qwen2.5-7B-Instruct"),
        ("org/Qwen2.5-7B-Intsruct", "org/Qwen2.5-7B-Instruct"),
        ("gpt-4o", None),
        ("", None),
        ("q" * 256, None),
        ("\x00\ud800", None),
    ],
)
def test_similar_names_are_suggested(name: str, meant: str | None) -> None:
    """Typing errors, case, parts of names; nothing is better than a name that has little in common."""
    assert suggestions(*MODELS).nearest(name) == meant


def test_without_models_there_is_no_suggestion() -> None:
    assert suggestions().nearest("smollm2") is None
    assert did_you_mean(None) == ""


def test_new_names_count_at_once() -> None:
    """What was said of a name is forgotten when there are other models."""
    made = suggestions("llama3")
    assert made.nearest("smolm2") is None
    made.load(("llama3", "smollm2"))
    assert made.nearest("smolm2") == "smollm2"
    made.load(("llama3",))
    assert made.nearest("smolm2") is None


def test_a_flood_of_unknown_names_does_little_work() -> None:
    """Beyond the rate nothing is looked for, but what was found before is remembered."""
    now = 0.0
    made = ModelSuggestions(clock=lambda: now)
    made.load(MODELS)
    found = [made.nearest(f"smollm{number}") for number in range(3, 1000)]
    assert found.count("smollm2") == BURST
    assert made.nearest("smollm3") == "smollm2"
    now = 1.0
    assert [made.nearest(f"smolm{number}") for number in range(1000)].count("smollm2") == min(BURST, RATE)


def test_of_two_thousand_names_six_are_compared_letter_by_letter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The slowest kind of names: all alike. Letter pairs choose the few that difflib compares."""
    rng = random.Random(1)
    families = ("llama3.1", "qwen2.5", "mistral-small", "deepseek-r1-distill")
    made = suggestions(*(f"org{n % 60}/{rng.choice(families)}-{rng.randrange(400)}b-q{n}" for n in range(2000)))
    compared: list[tuple[str, str]] = []

    def count(one: str, other: str) -> float:
        compared.append((one, other))
        return 0.9

    monkeypatch.setattr("gateway.model_suggestions._ratio", count)
    for number in range(20):
        assert made.nearest(f"org7/qwen2.5-{number}b") is not None
    assert len(compared) == 20 * MAX_CANDIDATES


class TestInTheCatalog:
    """Where callers see it."""

    def test_the_error_for_an_unknown_model_suggests_a_name(self) -> None:
        made = catalog(worker("w", offer("smollm2"), offer("worker:w", (Capability.MODELS,))))
        with pytest.raises(ModelNotFound, match=r"'smolm2' does not exist\. Did you mean 'smollm2'"):
            made.resolve("smolm2", Capability.CHAT)
        with pytest.raises(ModelNotFound) as caught:
            made.resolve("worker:x", Capability.CHAT)
        assert "Did you mean" not in caught.value.info.message, "workers are no models"

    def test_unusable_models_are_not_suggested(self) -> None:
        made = catalog(worker("w", offer("smollm2"), state=WorkerState.DRAINING))
        with pytest.raises(ModelNotFound) as caught:
            made.resolve("smolm2", Capability.CHAT)
        assert "Did you mean" not in caught.value.info.message

    def test_aliases_are_suggested_and_may_lack_targets(self) -> None:
        made = catalog(worker("w", offer("piper-joe")), aliases={"team-chat": ("piper-joe",), "tts-1": ("joe",)})
        with pytest.raises(ModelNotFound, match="Did you mean 'team-chat'"):
            made.resolve("team_chat", Capability.CHAT)
        with pytest.raises(ModelNotFound, match=r"for 'joe'\) exists\. Did you mean 'piper-joe'"):
            made.resolve("tts-1", Capability.SPEECH)


def test_a_long_name_is_not_cached_whole() -> None:
    """A path may hold some thousand letters."""
    made = suggestions(*MODELS)
    for number in range(10):
        made.nearest("smolm2" + "x" * 10_000 + str(number))
    assert [len(name) for name in made._cache] == [MAX_LETTERS]
