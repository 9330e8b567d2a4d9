"""What comes of a job: pictures and sound become files, text is printed."""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Iterator
from contextlib import closing
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple

from cli import http_client
from cli.errors import ConsoleError
from cli.gateway_client import ApiClient
from cli.job_follower import path_of

SUFFIXES = {
    "audio/mpeg": ".mp3",
    "audio/wav": ".wav",
    "audio/x-wav": ".wav",
    "audio/ogg": ".ogg",
    "audio/opus": ".opus",
    "audio/aac": ".aac",
    "audio/flac": ".flac",
    "audio/pcm": ".pcm",
    "audio/l16": ".pcm",
}
MAGIC = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"RIFF": ".webp", b"GIF8": ".gif"}
JSON = "application/json"
EVENTS = "text/event-stream"
PICTURE_READ_S = 30.0


class SavedResult(NamedTuple):
    """Where a result is now."""

    files: list[Path]
    """What was written."""
    value: Any = None
    """Where nothing was: the result, as JSON has it, or text."""


def fetch_result(api: ApiClient, job: str, output: Path | None, *, show: bool = True) -> SavedResult:
    """Save or print the result of a completed job.

    With `output` everything goes there; else sound and pictures go into files named after the job, and the rest is
    printed, unless `show` is False.
    """
    with api.download(path_of(job, "/result")) as response:
        kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind not in (JSON, EVENTS) and not kind.startswith("text/"):
            return SavedResult([_save(response.parts(), output or Path(job + SUFFIXES.get(kind, ".bin")))])
        body = response.read()
    values = _frames(body) if kind == EVENTS else [json.loads(body)] if kind == JSON else []
    if pictures := [picture for value in values for picture in _pictures(api, value)]:
        return SavedResult(_save_pictures(pictures, output or Path(job)))
    if sound := b"".join(_sound(value) for value in values):
        return SavedResult([_save(iter([sound]), output or Path(job + ".bin"))])
    if output is not None:
        return SavedResult([_save(iter([body]), output)])
    if show:
        print(_text(kind, body), flush=True)
    return SavedResult([], json.loads(body) if kind == JSON else body.decode(errors="replace"))


def _save(parts: Iterator[bytes], path: Path) -> Path:
    """Whole or not at all: under another name until it is."""
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            file.writelines(parts)
        part.replace(path)
    except OSError as error:
        raise ConsoleError(f"cannot write {path}: {error.strerror}") from error
    finally:
        part.unlink(missing_ok=True)
    return path


def _save_pictures(pictures: list[bytes], path: Path) -> list[Path]:
    saved = []
    for number, picture in enumerate(pictures, 1):
        suffix = path.suffix or next((end for start, end in MAGIC.items() if picture.startswith(start)), ".bin")
        name = path.stem if number == 1 else f"{path.stem}-{number}"
        saved.append(_save(iter([picture]), path.with_name(name + suffix)))
    return saved


def _frames(body: bytes) -> list[Any]:
    """What the events of a streamed answer hold."""
    lines = (line[5:].strip() for line in body.split(b"\n") if line.startswith(b"data:"))
    return [json.loads(line) for line in lines if line != b"[DONE]"]


def _pictures(api: ApiClient, value: Any) -> Iterator[bytes]:
    """The pictures in an answer of `/v1/images/…`, or in an event of one; in anything else, none."""
    if not isinstance(value, dict) or "partial_image" in str(value.get("type")):
        return
    items = value.get("data")
    for item in items if isinstance(items, list) else [value]:
        if not isinstance(item, dict):
            continue
        if isinstance(item.get("b64_json"), str):
            yield base64.b64decode(item["b64_json"])
        elif isinstance(item.get("url"), str):
            yield _picture_at(api, item["url"])


def _sound(value: Any) -> bytes:
    """The sound in an event of `/v1/audio/speech`."""
    is_sound = isinstance(value, dict) and value.get("type") == "speech.audio.delta"
    return base64.b64decode(value["audio"]) if is_sound else b""


def _picture_at(api: ApiClient, url: str) -> bytes:
    """By its signed URL, which wants no key: none is sent, whatever host it names."""
    try:
        server, path = http_client.join(api.target.url, url)
        with closing(http_client.ConsoleHttpClient(server).send("GET", path, read_s=PICTURE_READ_S)) as response:
            body = response.read()
    except http_client.HttpError as error:
        raise ConsoleError(f"the picture at {url} cannot be had: {error}") from error
    if response.status != HTTPStatus.OK:
        raise ConsoleError(f"the picture at {url} cannot be had: status {response.status} {response.reason}")
    return body


def _text(kind: str, body: bytes) -> str:
    """What a person wants to read of an answer: what was said; of anything else, the JSON as it is."""
    text = body.decode(errors="replace")
    if kind == EVENTS:
        return "".join(map(text_of, _frames(body)))
    if kind == JSON:
        value = json.loads(text)
        return text_of(value) or (str(value["text"]) if _is_transcript(value) else text)
    return text.removesuffix("\n")


def _is_transcript(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("text"), str)


def text_of(value: Any) -> str:
    """The text in an answer, or in one event of one, of those endpoints that say something; empty: it has none."""
    if not isinstance(value, dict):
        return ""
    if str(value.get("type")).endswith("text.delta"):  # of transcriptions and responses
        return str(value.get("delta") or "")
    texts = []
    for choice in value.get("choices") or ():
        message = choice.get("delta") or choice.get("message") or {}
        texts.append(message.get("content") or choice.get("text") or "")
    return "".join(text for text in texts if isinstance(text, str))


def report(files: list[Path]) -> None:
    """Say what was written."""
    for file in files:
        print(f"saved {file}", file=sys.stderr)
