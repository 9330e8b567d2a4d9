"""Results of jobs: images and audio are saved to files, text is printed."""

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
from cli.job_follower import job_path

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
IMAGE_READ_TIMEOUT_S = 30.0


class SavedResult(NamedTuple):
    """A result: the files that hold it, or its value."""

    files: list[Path]
    """The files that were written."""
    value: Any = None
    """Without files: the parsed JSON of the result, or its text."""


def fetch_result(api: ApiClient, job: str, output: Path | None, *, show: bool = True) -> SavedResult:
    """Save or print the result of a completed job.

    With `output`, the result is saved there. Without, audio and images are saved to files named after the job, and
    other results are printed unless `show` is False.
    """
    with api.download(job_path(job, "/result")) as response:
        kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind not in (JSON, EVENTS) and not kind.startswith("text/"):
            return SavedResult([_save(response.parts(), output or Path(job + SUFFIXES.get(kind, ".bin")))])
        body = response.read()
    values = _frames(body) if kind == EVENTS else [json.loads(body)] if kind == JSON else []
    if images := [image for value in values for image in _images(api, value)]:
        return SavedResult(_save_images(images, output or Path(job)))
    if audio := b"".join(_audio(value) for value in values):
        return SavedResult([_save(iter([audio]), output or Path(job + ".bin"))])
    if output is not None:
        return SavedResult([_save(iter([body]), output)])
    if show:
        print(_text(kind, body), flush=True)
    return SavedResult([], json.loads(body) if kind == JSON else body.decode(errors="replace"))


def _save(parts: Iterator[bytes], path: Path) -> Path:
    """Write the file under another name, and rename it once it is complete."""
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            file.writelines(parts)
        part.replace(path)
    except OSError as error:
        raise ConsoleError(f"Cannot write {path}: {error.strerror}. Name another file with --output.") from error
    finally:
        part.unlink(missing_ok=True)
    return path


def _save_images(images: list[bytes], path: Path) -> list[Path]:
    saved = []
    for number, image in enumerate(images, 1):
        suffix = path.suffix or next((end for start, end in MAGIC.items() if image.startswith(start)), ".bin")
        name = path.stem if number == 1 else f"{path.stem}-{number}"
        saved.append(_save(iter([image]), path.with_name(name + suffix)))
    return saved


def _frames(body: bytes) -> list[Any]:
    """Return the parsed events of a streamed answer."""
    lines = (line[5:].strip() for line in body.split(b"\n") if line.startswith(b"data:"))
    return [json.loads(line) for line in lines if line != b"[DONE]"]


def _images(api: ApiClient, value: Any) -> Iterator[bytes]:
    """Yield the images in an answer of `/v1/images/…` or in an event of its stream."""
    if not isinstance(value, dict) or "partial_image" in str(value.get("type")):
        return
    items = value.get("data")
    for item in items if isinstance(items, list) else [value]:
        if not isinstance(item, dict):
            continue
        if isinstance(item.get("b64_json"), str):
            yield base64.b64decode(item["b64_json"])
        elif isinstance(item.get("url"), str):
            yield _download_image(api, item["url"])


def _audio(value: Any) -> bytes:
    """Return the audio in an event of `/v1/audio/speech`."""
    is_audio = isinstance(value, dict) and value.get("type") == "speech.audio.delta"
    return base64.b64decode(value["audio"]) if is_audio else b""


def _download_image(api: ApiClient, url: str) -> bytes:
    """Download an image by its signed URL. No key is sent: the URL needs none, and may name any host."""
    try:
        server, path = http_client.resolve_url(api.target.url, url)
        with closing(http_client.ConsoleHttpClient(server).send("GET", path, read_s=IMAGE_READ_TIMEOUT_S)) as response:
            body = response.read()
    except http_client.HttpError as error:
        raise ConsoleError(f"The image at {url} cannot be downloaded: {error}") from error
    if response.status != HTTPStatus.OK:
        raise ConsoleError(f"The image at {url} cannot be downloaded: status {response.status} {response.reason}")
    return body


def _text(kind: str, body: bytes) -> str:
    """Return the readable text of an answer, or its JSON if it has none."""
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
    """Return the text in an answer or in an event of its stream; empty if it has none."""
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
    """Print the names of the files that were written."""
    for file in files:
        print(f"saved {file}", file=sys.stderr)
