"""What a caller of a round asks for, and how it knows that the answer is whole and its own."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import random
import struct
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from tests.cluster import chat, data_lines, texts

MODEL = "chaos"
PARKED = "parked"
"""A model in the catalog that no live worker serves."""
CHAT = "/v1/chat/completions"
WORDS = ("amber", "birch", "cedar", "dune", "ember", "fjord", "grove", "heath", "inlet", "knoll", "larch", "moor")
LARGE = 700_000
"""Bytes of an answer that travels by reference."""

Whole = Callable[[str, bytes], bool]


class Way(StrEnum):
    """How a job is submitted."""

    JOBS = "POST /v1/jobs"
    PREFER = "Prefer: respond-async"
    PREFER_WAIT = "Prefer: respond-async, wait=1"
    KEY = "POST /v1/jobs, one Idempotency-Key three times"
    KEY_SYNC = "Idempotency-Key on the endpoint itself, twice"
    RESUME = "x-nexus-resume: true"


class Trouble(StrEnum):
    """What the backend is told to do."""

    NONE = ""
    TRANSIENT = "each worker's first attempt fails"
    PERMANENT = "every attempt fails for good"


class Cancel(StrEnum):
    """When the caller changes its mind."""

    NEVER = ""
    SOON = "as soon as it is accepted"
    PARKED = "while no worker serves its model"


@dataclass(frozen=True)
class Wanted:
    """One job of a round."""

    label: str
    endpoint: str
    body: dict[str, Any]
    whole: Whole
    """Whether these bytes are the answer, whole, of the job with this id."""
    way: Way = Way.JOBS
    trouble: Trouble = Trouble.NONE
    cancel: Cancel = Cancel.NEVER
    tier: str | None = None

    @property
    def streamed(self) -> bool:
        """Whether the answer is a stream of server-sent events."""
        return bool(self.body.get("stream"))


def draw(rng: random.Random, label: str, number: int) -> Wanted:
    """The `number`-th job of a round: every round has some of each kind, and luck has the rest."""
    make = (_streamed, _plain, _streamed, _embeddings, _streamed, _image, _plain, _speech)[number % 8]
    trouble, cancel = Trouble.NONE, Cancel.NEVER
    if number % 12 == 3:
        cancel = Cancel.PARKED
        make = _plain
    elif number % 12 == 7:
        cancel = Cancel.SOON
    elif number % 12 == 10:
        trouble = Trouble.TRANSIENT
    elif number % 24 == 14:
        trouble = Trouble.PERMANENT
    endpoint, body, whole = make(rng, label)
    if cancel is Cancel.PARKED:
        body["model"] = PARKED
    if trouble is not Trouble.NONE:
        fail = rng.choice(["before", "mid"]) if trouble is Trouble.TRANSIENT else "error"
        body.setdefault("echo", {}).update(
            {"fail": fail, "fail_times": 1} if trouble is Trouble.TRANSIENT else {"fail": fail}
        )
    tier = rng.choice([None, None, "priority", "flex"])
    return Wanted(label, endpoint, body, whole, _way(rng, body, cancel), trouble, cancel, tier)


def _way(rng: random.Random, body: dict[str, Any], cancel: Cancel) -> Way:
    if cancel is not Cancel.NEVER:
        return rng.choice([Way.JOBS, Way.PREFER])
    ways = [Way.JOBS, Way.JOBS, Way.PREFER, Way.PREFER_WAIT, Way.KEY]
    return rng.choice([*ways, Way.RESUME, Way.RESUME] if body.get("stream") else [*ways, Way.KEY_SYNC])


def _text(rng: random.Random, label: str, least: int, most: int) -> str:
    return " ".join([label, *rng.choices(WORDS, k=rng.randint(least, most))])


def _pace(rng: random.Random, tokens: int) -> dict[str, Any]:
    """Half a second to a second and a half for all of them, now and then at once."""
    if rng.random() < 0.2:
        return {}
    return {"delay_ms": round(rng.uniform(500, 1500) / tokens, 1)}


def _plain(rng: random.Random, label: str) -> tuple[str, dict[str, Any], Whole]:
    text = _text(rng, label, 5, 20)

    def whole(job: str, data: bytes) -> bool:
        answer = json.loads(data)
        return bool(answer["id"] == f"chatcmpl-{job}" and answer["choices"][0]["message"]["content"] == text)

    return CHAT, chat(text, model=MODEL, echo=_pace(rng, 20)), whole


def _streamed(rng: random.Random, label: str) -> tuple[str, dict[str, Any], Whole]:
    text = _text(rng, label, 8, 40)

    def whole(job: str, data: bytes) -> bool:
        lines = data_lines(data.decode())
        ids = {json.loads(line)["id"] for line in lines[:-1]}
        return lines[-1:] == ["[DONE]"] and ids == {f"chatcmpl-{job}"} and "".join(texts(lines)) == text

    return CHAT, chat(text, model=MODEL, stream=True, echo=_pace(rng, 40)), whole


def _embeddings(rng: random.Random, label: str) -> tuple[str, dict[str, Any], Whole]:
    asked = [_text(rng, f"{label}.{at}", 1, 5) for at in range(rng.randint(1, 4))]

    def whole(_job: str, data: bytes) -> bool:
        vectors = [item["embedding"] for item in json.loads(data)["data"]]
        return len(vectors) == len(asked) and all(_is_of(*pair) for pair in zip(vectors, asked, strict=True))

    body = {"model": MODEL, "input": asked, "echo": {"delay_ms": rng.choice([0, 200])}}
    return "/v1/embeddings", body, whole


def _is_of(vector: list[float], text: str) -> bool:
    """Whether this is echo's vector of that text."""
    numbers = array("h", hashlib.shake_128(text.encode()).digest(2 * len(vector)))
    length = math.hypot(*numbers)
    return all(abs(got - wanted / length) < 1e-5 for got, wanted in zip(vector, numbers, strict=True))


def _image(rng: random.Random, label: str) -> tuple[str, dict[str, Any], Whole]:
    prompt, seed = _text(rng, label, 2, 6), rng.randrange(1_000_000)
    size = rng.choice([None, LARGE])
    color = hashlib.sha256(f"{prompt}{seed}".encode()).digest()[:3]

    def whole(_job: str, data: bytes) -> bool:
        png = base64.b64decode(json.loads(data)["data"][0]["b64_json"])
        return b"PLTE" + color in png and png.endswith(b"IEND\xaeB`\x82") and (size is None or len(png) == size)

    script = {"delay_ms": rng.choice([0, 250]), **({"size": size} if size else {})}
    body = {"model": MODEL, "prompt": prompt, "seed": seed, "echo": script, "response_format": "b64_json"}
    return "/v1/images/generations", body, whole


def _speech(rng: random.Random, label: str) -> tuple[str, dict[str, Any], Whole]:
    text, size = _text(rng, label, 2, 6), rng.choice([None, LARGE])

    def whole(_job: str, data: bytes) -> bool:
        length = size or len(text) * 2400
        return len(data) == length and set(struct.unpack(f"<{length // 2}h", data)) <= TONE

    body: dict[str, Any] = {"model": MODEL, "input": text, "voice": "echo", "response_format": "pcm"}
    body["echo"] = {"delay_ms": rng.choice([0, 200]), **({"size": size} if size else {})}
    return "/v1/audio/speech", body, whole


TONE = {int(8000 * math.sin(2 * math.pi * at / 60)) for at in range(60)}
"""The samples that echo's sound is made of."""
