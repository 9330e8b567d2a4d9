"""Embeddings in OpenAI's form."""

from __future__ import annotations

import base64
import json
import struct
from array import array
from typing import Any

import pytest

from workers.adapter_kit.embeddings import embeddings_body, read_vectors
from workers.backends.base import BackendError

VECTORS = [[0.5, -0.25, 1.0], [0.0, 3.0, -2.0]]


def packed(vector: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


@pytest.mark.parametrize("kind", [list, lambda vector: array("f", vector)], ids=["list", "array"])
@pytest.mark.parametrize("encoding_format", ["float", "base64"])
def test_both_forms(kind: Any, encoding_format: str) -> None:
    """As the official clients read them."""
    body = embeddings_body(map(kind, VECTORS), model="m", encoding_format=encoding_format, prompt_tokens=5)
    found = json.loads(body)
    assert found == {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": packed(vector) if "6" in encoding_format else vector}
            for index, vector in enumerate(VECTORS)
        ],
        "model": "m",
        "usage": {"prompt_tokens": 5, "total_tokens": 5},
    }
    assert [list(vector) for vector in read_vectors(body)] == VECTORS


def test_order_is_that_of_index() -> None:
    data = [{"index": 1, "embedding": [2.0]}, {"index": 0, "embedding": packed([1.0])}]
    assert [list(vector) for vector in read_vectors({"data": data})] == [[1.0], [2.0]]


@pytest.mark.parametrize(
    "body",
    [
        b"no json",
        b"[]",
        b'{"data": []}',
        b'{"data": {}}',
        b'{"data": [{"index": 0}]}',
        b'{"data": [{"index": 0, "embedding": [[1.0]]}]}',
        b'{"data": [{"index": 0, "embedding": "AAA"}]}',
        b'{"data": [{"index": 0, "embedding": "AAAA"}]}',
        b'{"data": [{"index": 0, "embedding": []}]}',
        b'{"data": [{"index": "x", "embedding": [1]}, {"index": 0, "embedding": [1]}]}',
    ],
)
def test_what_is_not_in_that_form_is_an_error(body: bytes) -> None:
    with pytest.raises(BackendError, match="not in OpenAI's form"):
        read_vectors(body)
