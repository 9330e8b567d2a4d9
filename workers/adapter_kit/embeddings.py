"""Embeddings as OpenAI writes them: lists of numbers, or base64 of little-endian float32. Pure."""

from __future__ import annotations

import base64
import binascii
import sys
from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import orjson

from workers.backends.base import BackendError

JSON = dict[str, Any]
Vector = Sequence[float]

WRONG = "the backend's embeddings are not in OpenAI's form"


def embeddings_body(
    vectors: Iterable[Vector],
    *,
    model: str,
    encoding_format: str,
    prompt_tokens: int,
    total_tokens: int | None = None,
) -> bytes:
    """The answer that holds `vectors`, in their order; `encoding_format` is `float` or `base64`."""
    write = _base64 if encoding_format == "base64" else _numbers
    items = (
        b'{"object":"embedding","index":%d,"embedding":%b}' % (index, write(vector))
        for index, vector in enumerate(vectors)
    )
    usage = {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens if total_tokens is None else total_tokens}
    return embeddings_envelope(b"[%b]" % b",".join(items), {"model": model, "usage": usage})


def embeddings_envelope(data: bytes, rest: JSON) -> bytes:
    """The answer whose list of embeddings is `data`, as JSON."""
    return b'{"object":"list","data":%b,%b' % (data, orjson.dumps(rest)[1:])


def read_vectors(body: bytes | JSON) -> list[Vector]:
    """The vectors of an answer in either form, ordered by `index`. Raises BackendError when there are none."""
    try:
        items = (body if isinstance(body, dict) else orjson.loads(body))["data"]
        if [item.get("index", at) for at, item in enumerate(items)] != list(range(len(items))):
            items = sorted(items, key=lambda item: item["index"])
        vectors = [_vector(item["embedding"]) for item in items]
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise BackendError(WRONG) from error
    if not vectors:
        raise BackendError(WRONG)
    return vectors


def _vector(value: Any) -> Vector:
    if isinstance(value, str):
        return decode_floats(base64.b64decode(value, validate=True))
    if not isinstance(value, list) or not value or not isinstance(value[0], float | int):
        raise ValueError(WRONG)  # for one text, llama.cpp's own form holds a vector for each token
    return value


def decode_floats(data: bytes) -> array[float]:
    """Little-endian float32 as numbers. Raises ValueError when they are none."""
    numbers = array("f")
    numbers.frombytes(data)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


def _base64(vector: Vector) -> bytes:
    numbers = array("f", vector)
    if sys.byteorder == "big":
        numbers.byteswap()
    return b'"%b"' % binascii.b2a_base64(numbers.tobytes(), newline=False)


def _numbers(vector: Vector) -> bytes:
    return orjson.dumps(vector.tolist() if isinstance(vector, array) else list(vector))
