"""The model catalog: resolution of names, and the errors for models that cannot be used."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.model_catalog import ModelCatalog
from schemas.errors import InvalidRequest, ModelNotFound, Unavailable
from schemas.jobs import Capability
from schemas.presence import Alias, CatalogEntry, ModelOffer, RegistrySnapshot, WorkerPresence, WorkerState

CHAT = (Capability.CHAT,)
BOTH = (Capability.CHAT, Capability.COMPLETIONS)


def worker(name: str, *offers: ModelOffer, state: WorkerState = WorkerState.READY) -> WorkerPresence:
    return WorkerPresence(id=name, backend="echo", host="here", models=offers, state=state)


def offer(name: str, capabilities: tuple[Capability, ...] = CHAT, **more: Any) -> ModelOffer:
    return ModelOffer(name=name, capabilities=capabilities, **more)


def catalog(
    *workers: WorkerPresence,
    known: tuple[CatalogEntry, ...] = (),
    aliases: dict[str, tuple[str, ...]] | None = None,
) -> ModelCatalog:
    made = ModelCatalog()
    made.load(
        RegistrySnapshot(
            workers={w.id: w for w in workers},
            models={entry.name: entry for entry in known},
            aliases={name: Alias(name=name, targets=targets) for name, targets in (aliases or {}).items()},
        )
    )
    return made


def test_before_the_first_snapshot_requests_are_503() -> None:
    """Before the registry has been read, an unknown model is 503, not 404: it may exist."""
    fresh = ModelCatalog()
    assert not fresh.ready
    with pytest.raises(Unavailable):
        fresh.resolve("m", Capability.CHAT)


def test_a_live_model_resolves() -> None:
    """A model that a ready worker offers can be used."""
    made = catalog(worker("w", offer("org/m:tag")))
    assert made.ready
    assert made.resolve("org/m:tag", Capability.CHAT) == "org/m:tag"
    assert [model.name for model in made.list_live()] == ["org/m:tag"]


def test_an_unknown_model_is_404() -> None:
    """An unknown name is `model_not_found`, with `param` and, if it is long, cut short."""
    with pytest.raises(ModelNotFound) as caught:
        catalog(worker("w", offer("m"))).resolve("x" * 250, Capability.CHAT)
    assert caught.value.info.param == "model"
    assert "x" * 100 + "…" in caught.value.info.message
    assert "x" * 101 not in caught.value.info.message


@pytest.mark.parametrize("state", [WorkerState.DRAINING, WorkerState.UNHEALTHY])
def test_a_model_without_a_ready_worker_is_503(state: WorkerState) -> None:
    """A model whose workers all drain or are ill exists, but cannot be used; nor is it listed."""
    made = catalog(worker("w", offer("m"), state=state))
    assert made.list_live() == []
    assert made.get("m") is not None
    with pytest.raises(Unavailable, match="no live worker"):
        made.resolve("m", Capability.CHAT)


def test_a_model_that_was_served_once_is_503() -> None:
    """So is one that only the catalog of all time knows."""
    made = catalog(known=(CatalogEntry(name="old", capabilities=CHAT, created=5),))
    with pytest.raises(Unavailable):
        made.resolve("old", Capability.CHAT)
    old = made.get("old")
    assert old is not None
    assert (old.created, made.list_live()) == (5, [])


def test_a_model_that_cannot_do_that_is_400() -> None:
    """Embeddings from a chat model are a wrong request, and retrying does not help."""
    with pytest.raises(InvalidRequest) as caught:
        catalog(worker("w", offer("m"))).resolve("m", Capability.EMBEDDINGS)
    assert (caught.value.info.code, caught.value.info.param) == ("unsupported_model", "model")


def test_offers_of_several_workers_are_merged() -> None:
    """A model can do what any of its ready workers can."""
    made = catalog(
        worker("a", offer("m", BOTH), state=WorkerState.DRAINING),
        worker("b", offer("m", CHAT, context_length=4096)),
        worker("c", offer("m", CHAT, created=7)),
    )
    model = made.get("m")
    assert model is not None
    assert model.capabilities == frozenset(BOTH)
    assert model.live == frozenset(CHAT)
    assert (model.context_length, model.created) == (4096, 7)
    with pytest.raises(Unavailable):
        made.resolve("m", Capability.COMPLETIONS)


def test_a_snapshot_replaces_the_one_before() -> None:
    """What is gone from the registry is gone from the list, which is sorted by name."""
    made = catalog(worker("w", offer("z"), offer("a"), offer("m")))
    assert [model.name for model in made.list_live()] == ["a", "m", "z"]
    made.load(RegistrySnapshot(workers={"w": worker("w", offer("m"))}))
    assert [model.name for model in made.list_live()] == ["m"]
    assert made.get("a") is None


SPEECH = (Capability.SPEECH,)
GONE = CatalogEntry(name="gone", capabilities=CHAT)


def test_voices_and_embedding_lengths_are_merged() -> None:
    """Each voice once, in the order of the workers."""
    made = catalog(
        worker("a", offer("m", SPEECH, voices=("joe", "amy"))),
        worker("b", offer("m", SPEECH, voices=("amy", "zoe"))),
        worker("c", offer("e", (Capability.EMBEDDINGS,), embedding_length=384)),
    )
    speaker, embedder = made.get("m"), made.get("e")
    assert speaker is not None
    assert embedder is not None
    assert speaker.voices == ("joe", "amy", "zoe")
    assert embedder.embedding_length == 384


class TestAliases:
    def test_the_first_live_target_serves(self) -> None:
        """In the order of the targets, whatever else is live."""
        made = catalog(worker("w", offer("a"), offer("b")), known=(GONE,), aliases={"x": ("missing", "gone", "b", "a")})
        assert made.resolve("x", Capability.CHAT) == "b"

    def test_each_capability_finds_its_own_target(self) -> None:
        """One alias may stand for a model that chats and one that speaks."""
        made = catalog(worker("w", offer("talk", SPEECH), offer("chat")), aliases={"x": ("talk", "chat")})
        assert made.resolve("x", Capability.CHAT) == "chat"
        assert made.resolve("x", Capability.SPEECH) == "talk"

    def test_a_model_has_precedence_over_an_alias_of_its_name(self) -> None:
        """Also one without a live worker: its requests are never answered by another model."""
        made = catalog(
            worker("w", offer("m"), offer("other")),
            known=(GONE,),
            aliases={"m": ("other",), "gone": ("other",)},
        )
        assert made.resolve("m", Capability.CHAT) == "m"
        with pytest.raises(Unavailable):
            made.resolve("gone", Capability.CHAT)
        assert [(model.name, model.alias_for) for model in made.list_usable()] == [("m", ()), ("other", ())]

    @pytest.mark.parametrize("aliases", [{"x": ("y",), "y": ("m",)}, {"x": ("y",), "y": ("x",)}, {"x": ("x",)}])
    def test_an_alias_is_not_followed_to_another_one(self, aliases: dict[str, tuple[str, ...]]) -> None:
        """However they got there, they cannot make a loop."""
        with pytest.raises(ModelNotFound):
            catalog(worker("w", offer("m")), aliases=aliases).resolve("x", Capability.CHAT)

    def test_targets_without_a_live_worker_are_503(self) -> None:
        """Later it may work; the message says what the alias stands for."""
        made = catalog(worker("w", offer("talk", SPEECH)), known=(GONE,), aliases={"x": ("talk", "gone")})
        with pytest.raises(Unavailable) as caught:
            made.resolve("x", Capability.CHAT)
        assert "alias 'x' (for 'talk', 'gone')" in caught.value.info.message

    def test_no_known_target_is_404(self) -> None:
        """It names the alias and its targets, so that a misspelt one is seen."""
        with pytest.raises(ModelNotFound) as caught:
            catalog(worker("w", offer("m")), aliases={"x": ("mm", "n")}).resolve("x", Capability.CHAT)
        assert "alias 'x' (for 'mm', 'n')" in caught.value.info.message
        assert caught.value.info.param == "model"

    def test_targets_that_cannot_do_that_are_400(self) -> None:
        """As for a model."""
        with pytest.raises(InvalidRequest) as caught:
            catalog(worker("w", offer("m")), aliases={"x": ("m",)}).resolve("x", Capability.SPEECH)
        assert (caught.value.info.code, caught.value.info.param) == ("unsupported_model", "model")

    def test_listed_are_those_that_resolve(self) -> None:
        """With what the model behind them has, sorted among the models."""
        made = catalog(
            worker("w", offer("m", BOTH, context_length=4096, created=7), offer("z", SPEECH, voices=("joe",))),
            known=(GONE,),
            aliases={"x": ("gone", "m", "z"), "dead": ("gone",), "void": ("nothing",)},
        )
        assert [model.name for model in made.list_usable()] == ["m", "x", "z"]
        alias = made.get("x")
        assert alias is not None
        assert (alias.alias_for, alias.resolves_to, alias.owned_by) == (("gone", "m", "z"), "m", "nexus")
        assert (alias.context_length, alias.created, alias.voices) == (4096, 7, ())
        assert alias.live == frozenset({*BOTH, Capability.SPEECH})
        dead = made.get("dead")
        assert dead is not None
        assert (dead.resolves_to, dead.live) == (None, frozenset())
        assert made.get("void") is None

    def test_the_default_for_a_capability_is_an_alias(self) -> None:
        """`default-<capability>`, where there is one."""
        made = catalog(worker("w", offer("a"), offer("b")), aliases={"default-chat": ("b",)})
        assert made.resolve(made.default(Capability.CHAT), Capability.CHAT) == "b"


class TestNamesWithoutATag:
    def test_a_bare_name_is_latest(self) -> None:
        """It goes to the same queue, and the list has one entry for both."""
        made = catalog(worker("w", offer("llama3:latest"), offer("org/llama3:8b")))
        assert made.resolve("llama3", Capability.CHAT) == "llama3:latest"
        assert made.resolve("llama3:latest", Capability.CHAT) == "llama3:latest"
        assert [model.name for model in made.list_usable()] == ["llama3:latest", "org/llama3:8b"]
        found = made.get("llama3")
        assert found is not None
        assert found.name == "llama3:latest"
        with pytest.raises(ModelNotFound):
            made.resolve("org/llama3", Capability.CHAT)

    def test_latest_is_the_bare_name(self) -> None:
        """A server that lists models without tags serves what a client of Ollama asks for."""
        assert catalog(worker("w", offer("llama3"))).resolve("llama3:latest", Capability.CHAT) == "llama3"

    def test_with_both_forms_live_the_exact_name_serves(self) -> None:
        """Exactly the name that was asked for goes first."""
        made = catalog(worker("v", offer("llama3")), worker("o", offer("llama3:latest")))
        assert made.resolve("llama3", Capability.CHAT) == "llama3"
        assert made.resolve("llama3:latest", Capability.CHAT) == "llama3:latest"

    def test_a_live_model_has_precedence_over_an_absent_one(self) -> None:
        """A worker that offered the bare name has been replaced by one that offers the other."""
        gone = CatalogEntry(name="llama3", capabilities=CHAT)
        made = catalog(worker("w", offer("llama3:latest")), known=(gone,))
        assert made.resolve("llama3", Capability.CHAT) == "llama3:latest"
        alone = catalog(known=(gone,))
        assert alone.resolve("llama3:latest", Capability.CHAT, may_wait=True) == "llama3"
        with pytest.raises(Unavailable):
            alone.resolve("llama3:latest", Capability.CHAT)

    def test_aliases_have_both_forms_as_targets_and_go_before_the_other_form(self) -> None:
        made = catalog(worker("w", offer("llama3:latest"), offer("m")), aliases={"x": ("llama3",), "llama3": ("m",)})
        assert made.resolve("x", Capability.CHAT) == "llama3:latest"
        assert made.resolve("llama3", Capability.CHAT) == "m", "an operator's own word"
        shown = made.get("llama3")
        assert shown is not None
        assert shown.resolves_to == "m"


def test_which_workers_hold_a_model_is_known() -> None:
    """Of those that are ready and whose servers say so; the smallest context counts, as any of them may get a request."""
    made = catalog(
        worker("a", offer("m", loaded=False, context_length=8192)),
        worker("b", offer("m", loaded=False, loading=True, context_length=4096)),
        worker("c", offer("m", loaded=True, context_length=6144)),
        worker("d", offer("m", loaded=True), state=WorkerState.DRAINING),
        worker("e", offer("m")),
    )
    model = made.get("m")
    assert model is not None
    assert model.loads == (("a", "cold"), ("b", "loading"), ("c", "loaded"))
    assert model.context_length == 4096


def test_workers_that_only_manage_models_are_not_listed() -> None:
    """Nor known by its name; its queue is open all the same."""
    made = catalog(worker("w", offer("m"), offer("worker:w", (Capability.MODELS,))), aliases={"x": ("worker:w",)})
    assert [model.name for model in made.list_usable()] == ["m"]
    assert (made.get("worker:w"), made.get("x")) == (None, None)
    assert [model.name for model in made.list_live()] == ["m", "worker:w"]
    assert made.resolve("worker:w", Capability.MODELS) == "worker:w"
