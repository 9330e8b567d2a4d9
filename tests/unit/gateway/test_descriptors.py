"""The catalog: what models can be told, by workers that are not trusted and may differ."""

from __future__ import annotations

import json
from typing import Any

import pytest
from structlog.testing import capture_logs

from gateway.descriptors.bounds import find_violation
from gateway.descriptors.entries import CatalogEntries
from gateway.descriptors.merge import merge_descriptors
from gateway.descriptors.reader import DescriptorReader
from gateway.model_catalog import ModelCatalog
from gateway.paused_models import PausedModels
from schemas.descriptors import EndpointDescriptor, ModelDescriptor, digest_of
from schemas.jobs import Capability
from schemas.parameters.fields import body, choice, integer, size, text
from schemas.presence import (
    Alias,
    CatalogEntry,
    Limitation,
    ModelHold,
    ModelOffer,
    Pause,
    RegistrySnapshot,
    WorkerPresence,
    WorkerState,
)

GENERATIONS = "/v1/images/generations"
IMAGES = (Capability.IMAGES,)


def descriptor(*, required: tuple[str, ...] = (), **fields: Any) -> ModelDescriptor:
    example = dict.fromkeys(required, "x")
    return ModelDescriptor(
        endpoints={GENERATIONS: EndpointDescriptor(parameters=body(fields, required), example=example)}
    )


def worker(name: str, model: str = "m", *, digest: str = "", **more: Any) -> WorkerPresence:
    offer = ModelOffer(name=model, capabilities=IMAGES, descriptor=digest, loaded=more.pop("loaded", None))
    return WorkerPresence(id=name, backend="comfyui", host="h", models=(offer,), **more)


class Gateway:
    """The parts of a gateway that make the catalog."""

    def __init__(self, *workers: WorkerPresence, descriptors: dict[str, bytes] | None = None, **more: Any) -> None:
        self.catalog, self.paused, self.reader = ModelCatalog(), PausedModels(), DescriptorReader()
        self.entries = CatalogEntries(self.catalog, self.paused, self.reader)
        self.load(*workers, descriptors=descriptors, **more)

    def load(self, *workers: WorkerPresence, descriptors: dict[str, bytes] | None = None, **more: Any) -> None:
        snapshot = RegistrySnapshot(workers={one.id: one for one in workers}, descriptors=descriptors or {}, **more)
        for part in (self.catalog, self.paused, self.reader):
            part.load(snapshot)

    def entry(self, name: str, *, problems: bool = True) -> dict[str, Any]:
        model = self.catalog.get(name)
        assert model is not None
        return self.entries.entry(model, problems=problems)


def published(*descriptors: ModelDescriptor) -> tuple[list[str], bytes]:
    texts = {digest_of(one.encode()): one.encode() for one in descriptors}
    return list(texts), json.dumps(texts).encode()


def test_a_model_has_the_parameters_of_its_worker() -> None:
    [digest], value = published(descriptor(cut=integer("Cut", least=1, most=9), required=("cut",)))
    entry = Gateway(worker("w", digest=digest, loaded=True), descriptors={"w": value}).entry("m")
    assert entry["state"] == "loaded"
    assert entry["workers"] == [{"id": "w", "backend": "comfyui", "state": "ready", "slots": 1, "load": "loaded"}]
    assert entry["modalities"] == {"input": ["text"], "output": ["image"]}
    assert list(entry["endpoints"]) == [GENERATIONS]
    endpoint = entry["endpoints"][GENERATIONS]
    assert endpoint["parameters"]["properties"]["cut"]["maximum"] == 9
    assert endpoint["example"] == {"model": "m", "cut": "x"}
    assert endpoint["content_type"] == "application/json"


def test_a_worker_without_descriptors_has_the_usual_parameters() -> None:
    """As an older one, or one whose descriptors are not in the registry yet."""
    for gateway in (Gateway(worker("w")), Gateway(worker("w", digest="0" * 32))):
        entry = gateway.entry("m")
        assert set(entry["endpoints"]) == {GENERATIONS, "/v1/images/edits"}
        assert entry["endpoints"]["/v1/images/edits"]["content_type"] == "multipart/form-data"
        assert entry["modalities"]["input"] == ["image", "text"]
        assert "problems" not in entry


@pytest.mark.attack
@pytest.mark.parametrize("wrong", ["schema", "digest", "json", "list"])
def test_a_bad_descriptor_never_breaks_the_catalog(wrong: str) -> None:
    """The operator is told, in the log and in the entry; callers see the usual parameters, and nothing of the reason."""
    bad = descriptor(x={"$ref": "https://evil.example"})
    [digest], value = published(bad)
    if wrong == "digest":
        value = json.dumps({digest: descriptor(x=text("X")).encode()}).encode()
    elif wrong in ("json", "list"):
        value = b"{nonsense" if wrong == "json" else b"[1]"
    with capture_logs() as logs:
        gateway = Gateway(worker("w", digest=digest), descriptors={"w": value})
        entry, public = gateway.entry("m"), gateway.entry("m", problems=False)
    assert set(entry["endpoints"]) == {GENERATIONS, "/v1/images/edits"} == set(public["endpoints"])
    assert "problems" not in public
    told = wrong in ("schema", "digest")
    assert [log["event"] for log in logs] == (["catalog.descriptor_rejected"] if told else [])
    assert ("problems" in entry) is told


@pytest.mark.attack
def test_a_worker_cannot_describe_the_models_of_another_one() -> None:
    """A digest stands for one text, and each worker's own descriptors count for its own models."""
    [digest], value = published(descriptor(x=text("X")))
    forged = json.dumps({digest: descriptor(evil=text("Evil")).encode()}).encode()
    gateway = Gateway(
        worker("bad", "other", digest=digest), worker("good", digest=digest), descriptors={"bad": forged, "good": value}
    )
    gateway.entry("other")
    assert set(gateway.entry("m")["endpoints"][GENERATIONS]["parameters"]["properties"]) == {"x"}


@pytest.mark.attack
def test_a_descriptor_of_endpoints_that_the_model_does_not_serve_is_cut() -> None:
    """Only the endpoints of the offered capabilities count; the others of them have the usual parameters."""
    chat = EndpointDescriptor(parameters=body({"x": text("X")}))
    [digest], value = published(ModelDescriptor(endpoints={"/v1/chat/completions": chat, "/v1/nowhere": chat}))
    entry = Gateway(worker("w", digest=digest), descriptors={"w": value}).entry("m")
    assert set(entry["endpoints"]) == {GENERATIONS, "/v1/images/edits"}


def test_models_with_the_same_parameters_share_one_descriptor() -> None:
    [digest], value = published(descriptor(x=text("X")))
    offers = tuple(ModelOffer(name=f"m{n:04}", capabilities=IMAGES, descriptor=digest) for n in range(2000))
    presence = WorkerPresence(id="w", backend="comfyui", host="h", models=offers)
    gateway = Gateway(presence, descriptors={"w": value})
    listed = gateway.entries.listing(gateway.catalog.list_all(), problems=False)
    assert len(listed["data"]) == 2000
    [shared] = listed["descriptors"]
    assert {entry["descriptor"] for entry in listed["data"]} == {shared}
    assert set(listed["descriptors"][shared]) == {GENERATIONS}


def test_states_of_models() -> None:
    pause = Pause(model="p", reason="busy", seconds=60, until=0)
    gateway = Gateway(
        worker("a", "plain"),
        worker("b", "cold", loaded=False),
        worker("c", "p", pauses=(pause,), limitations=(Limitation(model="p", feature="n", since=0, until=1),)),
        worker("d", "ill", state=WorkerState.UNHEALTHY),
        worker("e", "kept", loaded=True),
        models={"old": CatalogEntry(name="old", capabilities=IMAGES)},
        holds={"kept": ModelHold(model="kept", since=0)},
        aliases={"best": Alias(name="best", targets=("ill", "cold")), "lost": Alias(name="lost", targets=("gone",))},
    )
    found = {one["id"]: one for one in gateway.entries.listing(gateway.catalog.list_all(), problems=False)["data"]}
    states = {name: entry["state"] for name, entry in found.items()}
    assert states == {
        "plain": "ready",
        "cold": "cold",
        "p": "paused",
        "ill": "offline",
        "kept": "held",
        "old": "offline",
        "best": "cold",
        "lost": "offline",
    }
    assert (found["best"]["alias_for"], found["best"]["resolves_to"]) == (["ill", "cold"], "cold")
    assert found["p"]["limitations"] == ["n"]
    assert found["old"]["descriptor"]
    assert "descriptor" not in found["lost"]


def test_a_job_may_go_to_any_worker_so_the_common_part_counts() -> None:
    """The narrower bounds, the common choices, no parameter that only some have; and all these are named."""
    one = descriptor(
        steps=integer("Steps", least=1, most=50),
        sampler=choice("Sampler", ("a", "b")),
        own=text("Own"),
        same=text("Same"),
    )
    other = descriptor(
        steps=integer("Steps", least=5, most=90), sampler=choice("Sampler", ("b", "c")), same=text("Same")
    )
    [first, second], _ = published(one, other)
    gateway = Gateway(
        worker("w1", digest=first),
        worker("w2", digest=second),
        descriptors={"w1": published(one)[1], "w2": published(other)[1]},
    )
    entry = gateway.entry("m")
    properties = entry["endpoints"][GENERATIONS]["parameters"]["properties"]
    assert (properties["steps"]["minimum"], properties["steps"]["maximum"]) == (5, 50)
    assert properties["sampler"]["enum"] == ["b"]
    assert set(properties) == {"steps", "sampler", "same"}
    assert entry["differing"] == ["own", "sampler", "steps"]


def test_parameters_without_a_common_value_are_left_out() -> None:
    one = descriptor(x=choice("X", ("a",)), y=integer("Y", least=1, most=2), z=text("Z"), required=("z",))
    other = descriptor(x=choice("X", ("b",)), y=integer("Y", least=5, most=9), z=integer("Z"), required=("z",))
    merged, differing = merge_descriptors([one, other])
    assert merged.endpoints[GENERATIONS].parameters["properties"] == {}
    assert merged.endpoints[GENERATIONS].example == {}
    assert differing == ("x", "y", "z")


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        (integer("X", least=1, most=9), [1, 9, "3", 4.0], [0, 10, "x", True, [1]]),
        (choice("X", ("a", "b")), ["a"], ["c", 1, ["a"]]),
        (text("X", maxLength=3), ["abc", ""], ["abcd", 5]),
        ({"type": "boolean"}, [True, False, "true"], [1, []]),
        ({"type": ["string", "array"]}, ["a", ["a"], 1], []),
        (size(side={"minimum": 64, "multipleOf": 8}), ["64x128", "auto"], ["60x64", "0x0", "56x56", 64]),
        ({}, ["anything", 1, []], []),
    ],
)
def test_bounds_of_one_value(schema: dict[str, Any], good: list[Any], bad: list[Any]) -> None:
    """Of a form, numbers and booleans are text. What is not described passes."""
    parameters = body({"x": schema})
    for value in (None, *good):
        assert find_violation(parameters, {"x": value, "other": object()}) is None
    for value in bad:
        name, must = find_violation(parameters, {"x": value}) or ("", "")
        assert name == "x"
        assert must.startswith("must ")


def test_only_what_every_worker_certainly_refuses_is_refused_early() -> None:
    """A worker that does not promise it, or accepts the value, gets the job."""

    def gateway(*certain: tuple[bool, int]) -> Gateway:
        made = {
            f"w{number}": ModelDescriptor(
                endpoints={
                    GENERATIONS: EndpointDescriptor(
                        parameters=body({"steps": integer("Steps", least=1, most=most)}, enforced=enforced)
                    )
                }
            )
            for number, (enforced, most) in enumerate(certain)
        }
        workers = [worker(name, digest=published(one)[0][0]) for name, one in made.items()]
        return Gateway(*workers, descriptors={name: published(one)[1] for name, one in made.items()})

    values = {"prompt": "x", "steps": 60}
    assert gateway((True, 50)).reader.violation("m", GENERATIONS, values) == ("steps", "must be at most 50")
    assert gateway((True, 50), (True, 55)).reader.violation("m", GENERATIONS, values) is not None
    assert gateway((True, 50), (True, 100)).reader.violation("m", GENERATIONS, values) is None
    assert gateway((True, 50), (False, 50)).reader.violation("m", GENERATIONS, values) is None
    assert gateway((True, 50)).reader.violation("other", GENERATIONS, values) is None
    assert gateway((True, 50)).reader.violation("m", "/v1/images/edits", values) is None


def test_a_worker_that_is_not_ready_does_not_count() -> None:
    one, other = descriptor(x=text("X")), descriptor(y=text("Y"))
    [first, second], _ = published(one, other)
    gateway = Gateway(
        worker("w1", digest=first),
        worker("w2", digest=second, state=WorkerState.DRAINING),
        descriptors={"w1": published(one)[1], "w2": published(other)[1]},
    )
    entry = gateway.entry("m")
    assert set(entry["endpoints"][GENERATIONS]["parameters"]["properties"]) == {"x"}
    assert "differing" not in entry
