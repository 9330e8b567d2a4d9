"""Which models there are, and what is said about those that cannot be used."""

from __future__ import annotations

import pytest

from gateway.catalogue import Catalogue
from schemas.errors import InvalidRequest, ModelNotFound, Unavailable
from schemas.jobs import Capability
from schemas.presence import CatalogueEntry, ModelOffer, Snapshot, WorkerPresence, WorkerState

CHAT = (Capability.CHAT,)
BOTH = (Capability.CHAT, Capability.COMPLETIONS)


def worker(name: str, *offers: ModelOffer, state: WorkerState = WorkerState.READY) -> WorkerPresence:
    return WorkerPresence(id=name, backend="echo", host="here", models=offers, state=state)


def offer(name: str, capabilities: tuple[Capability, ...] = CHAT, **more: int) -> ModelOffer:
    return ModelOffer(name=name, capabilities=capabilities, **more)  # type: ignore[arg-type]


def catalogue(*workers: WorkerPresence, known: tuple[CatalogueEntry, ...] = ()) -> Catalogue:
    made = Catalogue()
    made.load(Snapshot(workers={w.id: w for w in workers}, models={entry.name: entry for entry in known}))
    return made


def test_before_the_first_snapshot_nobody_knows() -> None:
    """Before the registry has been read, an unknown model is 503, not 404: it may exist."""
    fresh = Catalogue()
    assert not fresh.ready
    with pytest.raises(Unavailable):
        fresh.resolve("m", Capability.CHAT)


def test_a_live_model_resolves() -> None:
    """A model that a ready worker offers can be used."""
    made = catalogue(worker("w", offer("org/m:tag")))
    assert made.ready
    assert made.resolve("org/m:tag", Capability.CHAT) == "org/m:tag"
    assert [model.name for model in made.live()] == ["org/m:tag"]


def test_an_unknown_model_is_404() -> None:
    """An unknown name is `model_not_found`, with `param` and, if it is long, cut short."""
    with pytest.raises(ModelNotFound) as caught:
        catalogue(worker("w", offer("m"))).resolve("x" * 250, Capability.CHAT)
    assert caught.value.info.param == "model"
    assert "x" * 100 + "…" in caught.value.info.message
    assert "x" * 101 not in caught.value.info.message


@pytest.mark.parametrize("state", [WorkerState.DRAINING, WorkerState.UNHEALTHY])
def test_a_model_without_a_ready_worker_is_503(state: WorkerState) -> None:
    """A model whose workers all drain or are ill exists, but cannot be used; nor is it listed."""
    made = catalogue(worker("w", offer("m"), state=state))
    assert made.live() == []
    assert made.get("m") is not None
    with pytest.raises(Unavailable, match="no live worker"):
        made.resolve("m", Capability.CHAT)


def test_a_model_that_was_served_once_is_503() -> None:
    """So is one that only the catalogue of all time knows."""
    made = catalogue(known=(CatalogueEntry(name="old", capabilities=CHAT, created=5),))
    with pytest.raises(Unavailable):
        made.resolve("old", Capability.CHAT)
    old = made.get("old")
    assert old is not None
    assert (old.created, made.live()) == (5, [])


def test_a_model_that_cannot_do_that_is_400() -> None:
    """Embeddings from a chat model are a wrong request, and retrying does not help."""
    with pytest.raises(InvalidRequest) as caught:
        catalogue(worker("w", offer("m"))).resolve("m", Capability.EMBEDDINGS)
    assert (caught.value.info.code, caught.value.info.param) == ("unsupported_model", "model")


def test_what_several_workers_offer_is_joined() -> None:
    """A model can do what any of its ready workers can."""
    made = catalogue(
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
    made = catalogue(worker("w", offer("z"), offer("a"), offer("m")))
    assert [model.name for model in made.live()] == ["a", "m", "z"]
    made.load(Snapshot(workers={"w": worker("w", offer("m"))}))
    assert [model.name for model in made.live()] == ["m"]
    assert made.get("a") is None
