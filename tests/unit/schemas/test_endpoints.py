"""The table of endpoints: what every row must keep to."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from schemas.endpoints import BY_PATH, ENDPOINTS, SERVED, TIME_LIMITS, Capability, EndpointSpec
from schemas.keys import Scope
from schemas.openai.score import ScoreRequest
from schemas.presence import CatalogEntry, ModelOffer


def test_a_path_and_a_short_name_mean_one_endpoint() -> None:
    assert len(BY_PATH) == len(ENDPOINTS)
    assert len({spec.name for spec in SERVED}) == len(SERVED)
    words = [word for spec in SERVED for word in spec.service_words]
    assert len(set(words)) == len(words)


def test_every_capability_is_served_by_an_endpoint() -> None:
    assert set(TIME_LIMITS) == set(Capability)


@pytest.mark.parametrize("spec", ENDPOINTS, ids=lambda spec: str(spec.path))
def test_a_row_is_whole(spec: EndpointSpec) -> None:
    """The gateway reads three fields of every request; rows of one capability have one kind of time limits."""
    schema = spec.schema.model_json_schema()["properties"]
    assert {"model", "service_tier"} <= set(schema)
    assert spec.time_limits is TIME_LIMITS[spec.capability]
    assert spec.batchable is (spec.scope is Scope.INFERENCE)
    assert not spec.relayed or spec.description is not None


def test_capabilities_of_a_newer_nexus_are_skipped() -> None:
    """A worker that is newer than this gateway is still seen, with what both know."""
    for kind in (ModelOffer, CatalogEntry):
        read = kind.model_validate_json(b'{"name": "m", "capabilities": ["chat", "telepathy"]}')
        assert read.capabilities == (Capability.CHAT,)


@pytest.mark.parametrize(
    ("left", "right"), [("a", "b"), ("a", ["b", "c"]), (["a"], ["b", "c"]), (["a", "b"], ["c", "d"])]
)
def test_texts_form_pairs(left: str | list[str], right: str | list[str]) -> None:
    """One with one, one with each of several, each with its own: as vLLM has it."""
    request = ScoreRequest(model="m", text_1=left, text_2=right)
    assert len(request.left) in (1, len(request.right))


@pytest.mark.parametrize(("left", "right"), [(["a", "b"], "c"), (["a", "b"], ["c", "d", "e"]), ([], ["a"]), ("", "a")])
def test_other_texts_are_refused(left: str | list[str], right: str | list[str]) -> None:
    with pytest.raises(ValidationError):
        ScoreRequest(model="m", text_1=left, text_2=right)
