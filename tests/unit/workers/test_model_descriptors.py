"""What a worker publishes of its models' parameters."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from schemas.descriptors import MAX_WORKER_BYTES, EndpointDescriptor, ModelDescriptor, digest_of
from schemas.jobs import Capability
from schemas.parameters.fields import body, choice, text
from schemas.presence import ModelOffer
from workers.backends.base import Backend, BackendConfig, Discovery, Output, Task
from workers.model_descriptors import ModelDescriptors


class Described(Backend):
    """Describes each model as `descriptors` says."""

    def __init__(self) -> None:
        super().__init__(BackendConfig())
        self.descriptors: dict[str, Any] = {}

    def describe(self, offer: ModelOffer) -> ModelDescriptor | None:
        found = self.descriptors.get(offer.name)
        if isinstance(found, Exception):
            raise found
        return found

    async def discover(self) -> Discovery:
        return Discovery(())

    async def health(self) -> None:
        pass

    async def run(self, _task: Task) -> AsyncIterator[Output]:
        raise NotImplementedError
        yield


def chats(*names: str) -> tuple[ModelOffer, ...]:
    return tuple(ModelOffer(name=name, capabilities=(Capability.CHAT,)) for name in names)


def descriptor(**fields: Any) -> ModelDescriptor:
    return ModelDescriptor(endpoints={"/v1/chat/completions": EndpointDescriptor(parameters=body(fields))})


def test_equal_descriptors_are_published_once() -> None:
    """2,000 models with the same parameters cost one descriptor."""
    backend = Described()
    names = [f"m{number}" for number in range(2000)]
    backend.descriptors = {name: descriptor(x=text("X")) for name in names}
    published = ModelDescriptors(backend)
    models, problems = published.describe(chats(*names))
    assert problems == ()
    [(digest, encoded)] = json.loads(published.encoded).items()
    assert {model.descriptor for model in models} == {digest} == {digest_of(encoded)}
    assert len(published.encoded) < 1000


def test_a_model_that_cannot_be_described_is_served_all_the_same() -> None:
    """The operator reads why; the other models keep their descriptors."""
    backend = Described()
    backend.descriptors = {
        "good": descriptor(x=text("X")),
        "bad": descriptor(x={"$ref": "elsewhere"}),
        "wrong": RuntimeError("a bug"),
    }
    published = ModelDescriptors(backend)
    models, problems = published.describe(chats("good", "bad", "wrong", "plain"))
    assert [bool(model.descriptor) for model in models] == [True, False, False, False]
    assert [model.name for model in models] == ["good", "bad", "wrong", "plain"]
    bad, wrong = problems
    assert "'bad'" in bad and "$ref" in bad
    assert "'wrong'" in wrong and "a bug" in wrong


def test_what_does_not_fit_is_left_out() -> None:
    """etcd takes no more in one value: the first models keep their descriptors."""
    backend = Described()
    names = [f"m{number}" for number in range(40)]
    choices = ["x" * 90 + f"{number:04}" for number in range(300)]
    backend.descriptors = {name: descriptor(x=choice(name, choices)) for name in names}
    published = ModelDescriptors(backend)
    models, problems = published.describe(chats(*names))
    assert len(published.encoded) <= MAX_WORKER_BYTES
    served = [bool(model.descriptor) for model in models]
    assert served[0] and not served[-1]
    assert len(problems) == served.count(False)


def test_a_changed_descriptor_has_another_digest() -> None:
    backend = Described()
    published = ModelDescriptors(backend)
    backend.descriptors = {"m": descriptor(x=text("X"))}
    [before], _ = published.describe(chats("m"))
    backend.descriptors = {"m": descriptor(y=text("Y"))}
    [after], _ = published.describe(chats("m"))
    assert before.descriptor != after.descriptor
    assert list(json.loads(published.encoded)) == [after.descriptor]
    backend.descriptors = {}
    published.describe(chats("m"))
    assert published.encoded == b""
