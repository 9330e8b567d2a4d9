"""Embeddings in OpenAI's form: lists of numbers, or base64 of little-endian float32. Pure."""

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

WRONG_FORM_MESSAGE = "the backend's embeddings are not in OpenAI's form"


def embeddings_body(
    vectors: Iterable[Vector],
    *,
    model: str,
    encoding_format: str,
    prompt_tokens: int,
    total_tokens: int | None = None,
) -> bytes:
    """Return the answer that holds `vectors`, in their order; `encoding_format` is `float` or `base64`."""
    write = _base64_json if encoding_format == "base64" else _numbers_json
    items = (
        b'{"object":"embedding","index":%d,"embedding":%b}' % (index, write(vector))
        for index, vector in enumerate(vectors)
    )
    usage = {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens if total_tokens is None else total_tokens}
    return embeddings_envelope(b"[%b]" % b",".join(items), {"model": model, "usage": usage})


def embeddings_envelope(data: bytes, rest: JSON) -> bytes:
    """Return the answer whose list of embeddings is `data`, as JSON."""
    return b'{"object":"list","data":%b,%b' % (data, orjson.dumps(rest)[1:])


def read_vectors(body: bytes | JSON) -> list[Vector]:
    """Return the vectors of an answer in either form, ordered by `index`. Raises BackendError when it holds none."""
    try:
        items = (body if isinstance(body, dict) else orjson.loads(body))["data"]
        if [item.get("index", at) for at, item in enumerate(items)] != list(range(len(items))):
            items = sorted(items, key=lambda item: item["index"])
        vectors = [_parse_vector(item["embedding"]) for item in items]
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise BackendError(WRONG_FORM_MESSAGE) from error
    if not vectors:
        raise BackendError(WRONG_FORM_MESSAGE)
    return vectors


def _parse_vector(value: Any) -> Vector:
    if isinstance(value, str):
        return decode_floats(base64.b64decode(value, validate=True))
    if not isinstance(value, list) or not value or not isinstance(value[0], float | int):
        raise ValueError(WRONG_FORM_MESSAGE)  # for one text, llama.cpp's own form holds a vector for each token
    return value


def decode_floats(data: bytes) -> array[float]:
    """Return little-endian float32 as numbers. Raises ValueError for a length that is no multiple of 4."""
    numbers = array("f")
    numbers.frombytes(data)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


def _base64_json(vector: Vector) -> bytes:
    numbers = array("f", vector)
    if sys.byteorder == "big":
        numbers.byteswap()
    return b'"%b"' % binascii.b2a_base64(numbers.tobytes(), newline=False)


def _numbers_json(vector: Vector) -> bytes:
    return orjson.dumps(vector.tolist() if isinstance(vector, array) else list(vector))
