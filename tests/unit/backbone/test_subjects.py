"""Names in NATS: subjects, streams, consumers."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backbone.bus.subjects import (
    MAX_ENCODED_MODEL_LENGTH,
    consumer_name,
    decode_model,
    encode_model,
    job_subject,
    parse_job_subject,
)
from schemas.errors import InvalidRequest
from schemas.jobs import Capability, Lane


@given(st.text(min_size=1, max_size=40))
def test_any_model_name_becomes_one_token_and_back(model: str) -> None:
    """Dots, stars, spaces and every other character survive the way through a subject."""
    try:
        token = encode_model(model)
    except InvalidRequest:
        assert len(model.encode("utf-8", "surrogatepass")) * 3 > MAX_ENCODED_MODEL_LENGTH
        return
    assert re.fullmatch(r"[A-Za-z0-9_-]+", token)
    assert decode_model(token) == model


@given(st.text(min_size=1, max_size=20), st.text(min_size=1, max_size=20))
def test_two_models_never_share_a_token(one: str, two: str) -> None:
    """The encoding is reversible, so no two names meet in one queue."""
    assert (encode_model(one) == encode_model(two)) == (one == two)


@pytest.mark.parametrize("model", ["", "x" * (MAX_ENCODED_MODEL_LENGTH + 1), "…" * 70])
def test_names_that_do_not_fit_are_refused(model: str) -> None:
    """An empty or too long name is the caller's error."""
    with pytest.raises(InvalidRequest):
        encode_model(model)


def test_subjects_read_back() -> None:
    """A job's subject tells its queue; the consumer's name holds the same token."""
    queue = (Capability.CHAT, Lane.FLEX, "org/llama3.1:8b *>")
    subject = job_subject(*queue)
    assert subject.count(".") == 4
    assert parse_job_subject(subject) == queue
    assert consumer_name(*queue) == f"chat_flex_{subject.rsplit('.', 1)[1]}"
