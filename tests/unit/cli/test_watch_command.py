"""`nexus watch`: the output of a job, and the files of its result."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner, Result

from cli import job_follower, options
from cli.app import app
from cli.errors import ConsoleError
from cli.gateway_client import ApiClient, GatewayTarget
from cli.job_follower import FollowedJobEvent, JobFollower
from cli.watch import JobViewer
from tests.unit.cli.gateway_double import serve

PNG = b"\x89PNG\r\n\x1a\n..."
CHAT = {"choices": [{"message": {"role": "assistant", "content": "Hello"}}]}
PATH = "/v1/jobs/job_1"


def job(status: str = "in_progress", **fields: Any) -> dict[str, Any]:
    return {"id": "job_1", "status": status, "error": None, **fields}


def event(kind: str, data: Any = None, seq: int = 0) -> str:
    return f"event: job.{kind}\nid: 1-1-{seq}\ndata: {json.dumps(data)}\n\n"


def token(text: str, seq: int) -> str:
    return event("chunk", {"choices": [{"delta": {"content": text}}]}, seq)


def ended(status: str = "completed", **fields: Any) -> str:
    return event(status, job(status, **fields), 99)


class Gateway:
    """One job. `looks`: what is seen of it, the last one again and again. `streams`: what comes of its events, one
    stream each; an exception in one breaks it off, a response in the place of one is answered as it is."""

    def __init__(self) -> None:
        self.looks: list[Any] = [job()]
        self.streams: list[list[str | Exception] | httpx.Response | Exception] = []
        self.result = httpx.Response(200, json=CHAT)
        self.requests: list[str] = []
        self.after: list[str] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path
        self.requests.append(request.url.raw_path.decode())
        if path == f"{PATH}/events":
            self.after.append(request.headers.get("last-event-id", ""))
            return self.stream()
        if path == f"{PATH}/result":
            return self.result
        if path == PATH:
            look = self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]
            if isinstance(look, Exception):
                raise look
            return look if isinstance(look, httpx.Response) else httpx.Response(200, json=look)
        return httpx.Response(404, json={"error": {"message": "there is no such job", "code": "job_not_found"}})

    def stream(self) -> httpx.Response:
        stream = self.streams.pop(0)
        if isinstance(stream, Exception):
            raise stream
        if isinstance(stream, httpx.Response):
            return stream

        def parts() -> Iterator[bytes]:
            for part in stream:
                if isinstance(part, BaseException):
                    raise part
                yield part.encode()

        return httpx.Response(200, content=parts())


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Gateway:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(job_follower, "RETRY_DELAYS_S", (0.0,))
    gateway = Gateway()
    monkeypatch.setattr(options, "client", lambda *_: api(gateway))
    return gateway


def api(gateway: Callable[[httpx.Request], httpx.Response]) -> ApiClient:
    return ApiClient(GatewayTarget(serve(gateway), "sk"))


def watch(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["watch", "job_1", *arguments])


class TestText:
    def test_into_a_pipe_goes_the_whole_text(self, gateway: Gateway):
        """Once, at the end, and nothing else; what happens meanwhile is on standard error."""
        gateway.streams = [[event("started", {"worker": "gpu1"}), token("Hel", 1), token("lo", 2), ended()]]
        result = watch()
        assert result.stdout == "Hello\n"
        assert result.stderr == "running on gpu1\nanswering\n"
        assert result.exit_code == 0

    def test_of_a_streamed_answer(self, gateway: Gateway):
        """Its frames become its text."""
        frames = "".join(
            f"data: {json.dumps({'choices': [{'delta': {'content': text}}]})}\n\n" for text in ("Hel", "lo")
        )
        gateway.streams = [[ended()]]
        gateway.result = httpx.Response(200, content=frames, headers={"content-type": "text/event-stream"})
        assert watch().stdout == "Hello\n"

    @pytest.mark.parametrize(
        ("answer", "text"),
        [
            ({"choices": [{"text": "Once"}, {"text": " more"}]}, "Once more\n"),
            ({"text": "a transcript"}, "a transcript\n"),
            ({"data": [{"embedding": [0.5]}]}, '{"data":[{"embedding":[0.5]}]}\n'),
        ],
    )
    def test_of_other_answers(self, gateway: Gateway, answer: Any, text: str):
        """What a person wants to read; or the JSON."""
        gateway.streams = [[ended()]]
        gateway.result = httpx.Response(200, json=answer)
        assert watch().stdout == text

    def test_subtitles(self, gateway: Gateway):
        """As they are."""
        gateway.streams = [[ended()]]
        gateway.result = httpx.Response(200, text="1\n00:00 --> 00:01\nHi\n", headers={"content-type": "text/plain"})
        assert watch().stdout == "1\n00:00 --> 00:01\nHi\n"

    def test_tokens_as_they_come(self, capsys: pytest.CaptureFixture[str]):
        """On a terminal; a line separator within them is no end of a line."""
        out = io.StringIO()
        viewer = JobViewer(live_text=True, out=out)
        viewer.show_event(FollowedJobEvent("1-1-1", "chunk", {"choices": [{"delta": {"content": "Hel\u2028"}}]}))
        assert out.getvalue() == "Hel\u2028"
        viewer.show_event(FollowedJobEvent("1-1-2", "chunk", {"choices": [{"delta": {"content": "lo"}}]}))
        viewer.show_event(FollowedJobEvent("1-1-3", "completed", job("completed")))
        assert out.getvalue() == "Hel\u2028lo\n"
        assert viewer.is_complete
        assert capsys.readouterr().err == ""

    def test_text_of_a_failed_attempt_is_marked_void(self, capsys: pytest.CaptureFixture[str]):
        """What stands there is void, the new one begins on a new line."""
        out = io.StringIO()
        viewer = JobViewer(live_text=True, out=out)
        for kind, text in (("chunk", "Hel"), ("restarted", ""), ("chunk", "Hello"), ("completed", "")):
            viewer.show_event(FollowedJobEvent("1-1-1", kind, {"choices": [{"delta": {"content": text}}]}))
        assert out.getvalue() == "Hel\nHello\n"
        assert "void" in capsys.readouterr().err

    def test_text_that_is_not_whole(self):
        """If later events have expired, the whole answer is printed after it."""
        viewer = JobViewer(live_text=True, out=io.StringIO())
        viewer.show_event(FollowedJobEvent("1-1-1", "chunk", {"choices": [{"delta": {"content": "Hel"}}]}))
        viewer.show_event(FollowedJobEvent("", "completed", job("completed")))
        assert not viewer.is_complete


class TestTerminal:
    @pytest.fixture(autouse=True)
    def terminal(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("TTY_COMPATIBLE", "1")
        monkeypatch.setenv("TTY_INTERACTIVE", "1")
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "120")

    def test_progress_is_a_bar(self, capsys: pytest.CaptureFixture[str]):
        """One line that changes, and is removed at the end."""
        viewer = JobViewer(live_text=True, out=io.StringIO())
        viewer.show_queued(job("queued", queue_position=1))
        viewer.show_event(FollowedJobEvent("", "started", {"worker": "gpu1"}))
        viewer.show_event(FollowedJobEvent("", "progress", {"fraction": 0.25, "step": 5, "steps": 20}))
        viewer.show_event(FollowedJobEvent("", "completed", job("completed")))
        shown = capsys.readouterr().err
        assert "queued, 1 before it" in shown
        assert "running 5/20" in shown
        assert "25%" in shown
        assert shown.endswith("\x1b[2K")
        assert viewer.end == "completed"

    def test_tokens_end_the_bar(self, capsys: pytest.CaptureFixture[str]):
        """And a note has a line of its own, before and among them."""
        out = io.StringIO()
        viewer = JobViewer(live_text=True, out=out)
        viewer.show_event(FollowedJobEvent("", "started", {}))
        viewer.note("the gateway is away")
        viewer.show_event(FollowedJobEvent("", "chunk", {"choices": [{"delta": {"content": "Hel"}}]}))
        capsys.readouterr()
        viewer.show_event(FollowedJobEvent("", "progress", {"fraction": 0.5}))
        assert capsys.readouterr().err == ""
        viewer.show_event(FollowedJobEvent("", "chunk", {"choices": [{"delta": {"content": "lo"}}]}))
        viewer.note("it is away again")
        viewer.show_event(FollowedJobEvent("1-1-9", "completed", job("completed")))
        assert out.getvalue() == "Hello\n"
        assert viewer.is_complete
        assert capsys.readouterr().err == "it is away again\n"


class TestFiles:
    def test_pictures(self, gateway: Gateway, tmp_path: Path):
        """Named after the job and by what they are."""
        gateway.streams = [[event("progress", {"fraction": 0.5, "step": 2, "steps": 4}), ended()]]
        pictures = [PNG, b"\xff\xd8\xff..."]
        items = [{"b64_json": base64.b64encode(picture).decode()} for picture in pictures]
        gateway.result = httpx.Response(200, json={"created": 1, "data": items})
        result = watch()
        assert result.stdout == ""
        assert result.stderr == "running 50 %\nsaved job_1.png\nsaved job_1-2.jpg\n"
        assert [(tmp_path / name).read_bytes() for name in ("job_1.png", "job_1-2.jpg")] == pictures
        assert len(list(tmp_path.iterdir())) == 2

    def test_a_picture_by_url(self, gateway: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        """Is fetched without the key, wherever it lies."""
        requests: list[httpx.Request] = []

        def elsewhere(request: httpx.Request) -> httpx.Response:
            requests.append(request)
            return httpx.Response(200, content=PNG)

        url = f"{serve(elsewhere)}/v1/results/x?signature=y"
        gateway.streams = [[ended()]]
        gateway.result = httpx.Response(200, json={"data": [{"url": url}]})
        assert watch("-o", "a.png").exit_code == 0
        assert (tmp_path / "a.png").read_bytes() == PNG
        assert [str(request.url) for request in requests] == [url]
        assert "authorization" not in requests[0].headers

    def test_sound(self, gateway: Gateway, tmp_path: Path):
        """By its type; or where it is wanted."""
        for arguments, name in (((), "job_1.mp3"), (("-o", "x.snd"), "x.snd")):
            gateway.streams = [[event("chunk", {"b64": "AAAA"}), ended()]]
            gateway.result = httpx.Response(200, content=b"ID3", headers={"content-type": "audio/mpeg"})
            assert watch(*arguments).exit_code == 0
            assert (tmp_path / name).read_bytes() == b"ID3"

    def test_output_to_a_named_file(self, gateway: Gateway, tmp_path: Path):
        """The body as it is."""
        gateway.streams = [[ended()]]
        assert watch("-o", "answer.json").stdout == ""
        assert json.loads((tmp_path / "answer.json").read_text()) == CHAT

    def test_of_streamed_answers(self, gateway: Gateway, tmp_path: Path):
        """The finished picture, not the previews; all the sound; all the text."""
        picture, sound = base64.b64encode(PNG).decode(), [base64.b64encode(part).decode() for part in (b"ID", b"3")]
        streams = {
            "a.png": [
                {"type": "image_generation.partial_image", "b64_json": "AAAA"},
                {"type": "image_generation.completed", "b64_json": picture},
            ],
            "a.mp3": [{"type": "speech.audio.delta", "audio": part} for part in sound]
            + [{"type": "speech.audio.done"}],
            "": [
                {"type": "transcript.text.delta", "delta": "Hel"},
                {"type": "transcript.text.delta", "delta": "lo"},
                {"type": "transcript.text.done", "text": "Hello"},
            ],
        }
        for name, frames in streams.items():
            body = "".join(f"data: {json.dumps(frame)}\n\n" for frame in frames)
            gateway.streams = [[ended()]]
            gateway.result = httpx.Response(
                200, content=body, headers={"content-type": "text/event-stream; charset=utf-8"}
            )
            result = watch(*(("-o", name) if name else ()))
            assert result.stdout == ("" if name else "Hello\n")
        assert (tmp_path / "a.png").read_bytes() == PNG
        assert (tmp_path / "a.mp3").read_bytes() == b"ID3"

    def test_no_room(self, gateway: Gateway):
        """Says so."""
        gateway.streams = [[ended()]]
        assert "Cannot write" in str(watch("-o", "missing/x.json").exception)

    def test_half_a_file_is_none(self, gateway: Gateway, tmp_path: Path):
        """What breaks off leaves nothing, and what was there before stays."""

        def parts() -> Iterator[bytes]:
            yield b"ID3"
            raise httpx.ReadError("gone")

        (tmp_path / "job_1.mp3").write_bytes(b"old")
        gateway.streams = [[ended()]]
        gateway.result = httpx.Response(200, content=parts(), headers={"content-type": "audio/mpeg"})
        assert isinstance(watch().exception, ConsoleError)
        assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("job_1.mp3", b"old")]


class TestWaiting:
    def test_queue_position(self, gateway: Gateway):
        """As long as it waits."""
        gateway.looks = [job("queued", queue_position=n, eta_seconds=n * 10.0) for n in (2, 2, 1)] + [job()]
        gateway.streams = [[ended()]]
        assert watch().stderr == "queued, 2 before it, about 20 s to go\nqueued, 1 before it, about 10 s to go\n"

    def test_unknown_queue_position(self, gateway: Gateway):
        """Then nothing is pretended."""
        gateway.looks = [job("queued", queue_position=None, eta_seconds=None), job()]
        gateway.streams = [[ended()]]
        assert watch().stderr == "queued\n"


class TestEnds:
    @pytest.mark.parametrize("status", ["failed", "cancelled", "expired"])
    def test_without_a_result(self, gateway: Gateway, status: str):
        """The reason, and 1."""
        gateway.streams = [[ended(status, error={"message": "because"})]]
        result = watch()
        assert (result.stdout, result.stderr, result.exit_code) == ("", f"{status}: because\n", 1)
        assert f"{PATH}/result" not in gateway.requests

    def test_no_such_job(self, gateway: Gateway):
        """Said at once."""
        result = CliRunner().invoke(app, ["watch", "job_2"])
        assert "no such job" in str(result.exception)

    def test_ctrl_c_stops_watching_and_not_the_job(self, gateway: Gateway):
        """And says so."""
        gateway.streams = [[token("Hel", 1), KeyboardInterrupt()]]  # type: ignore[list-item]
        result = watch()
        assert result.exit_code == 130
        assert "the job continues" in result.stderr
        assert "nexus watch job_1" in result.stderr
        assert gateway.requests == [PATH, f"{PATH}/events"]


class TestOutages:
    def test_a_gateway_that_restarts(self, gateway: Gateway):
        """The rest comes from where it broke off, nothing twice, and one line tells of it."""
        gateway.streams = [
            [token("Hel", 1), httpx.ReadError("reset")],
            httpx.ConnectError("refused"),
            httpx.Response(503, json={"error": {"message": "not yet", "code": "unavailable"}}),
            [token("lo", 2), ended()],
        ]
        follower_texts: list[str] = []
        events = list(JobFollower(api(gateway), "job_1", follower_texts.append).events())
        assert [found.id for found in events] == ["1-1-1", "1-1-2", "1-1-99"]
        assert gateway.after == ["", "1-1-1", "1-1-1", "1-1-1"]
        assert len(follower_texts) == 1

    def test_streams_that_end_too_early(self, gateway: Gateway):
        """A proxy's time-out, an event cut in two, an error of the gateway's in the stream."""
        away = 'event: error\ndata: {"error": {"message": "NATS is away", "code": "unavailable"}}\n\n'
        gateway.streams = [[token("Hel", 1)], [token("lo", 2)[:-5]], [away], [token("lo", 2), ended()]]
        events = list(JobFollower(api(gateway), "job_1", lambda _: None).events())
        assert [found.id for found in events] == ["1-1-1", "1-1-2", "1-1-99"]
        assert gateway.after == ["", "1-1-1", "1-1-1", "1-1-1"]

    def test_while_it_is_queued(self, gateway: Gateway):
        """The same."""
        gateway.looks = [job("queued"), httpx.ConnectError("refused"), job()]
        gateway.streams = [[ended()]]
        result = watch()
        assert result.stdout == "Hello\n"
        assert "Trying again" in result.stderr

    def test_an_outage_that_lasts(self, gateway: Gateway, monkeypatch: pytest.MonkeyPatch):
        """Ends the watching."""
        monkeypatch.setattr(job_follower, "MAX_OUTAGE_S", -1.0)
        gateway.looks = [httpx.ConnectError("refused")]
        assert "The connection to" in str(watch().exception)

    def test_expired_events(self, gateway: Gateway):
        """The end is waited for, and the result is there all the same."""
        error = {"error": {"message": "not kept", "code": "events_expired"}}
        in_stream = f"event: error\ndata: {json.dumps(error)}\n\n"
        streams: list[httpx.Response | list[str | Exception]] = [
            httpx.Response(410, json=error),
            [token("lo", 7), in_stream],
        ]
        for stream in streams:
            gateway.looks = [job(), job(), job("completed")]
            gateway.streams = [stream]
            assert watch().stdout == "Hello\n"
        assert gateway.requests.count(f"{PATH}?wait=30") == 4

    def test_unknown_events(self, gateway: Gateway):
        """Is an error, not an end."""
        for text in ("data: {\n\n", 'data: {"a": 1}\n\n'):
            gateway.streams = [[text]]
            assert isinstance(watch().exception, ConsoleError)


class TestJson:
    def test_events_and_result(self, gateway: Gateway):
        """A line each, to be read by programs."""
        gateway.streams = [[event("started", {"worker": "gpu1"}), token("Hi", 1), ended()]]
        lines = [json.loads(line) for line in watch("--json").stdout.splitlines()]
        assert [line["event"] for line in lines] == ["job.started", "job.chunk", "job.completed", "result"]
        assert lines[1]["id"] == "1-1-1"
        assert lines[3]["data"] == CHAT

    def test_files(self, gateway: Gateway):
        """Their names."""
        gateway.streams = [[ended()]]
        assert json.loads(watch("--json", "-o", "x.json").stdout.splitlines()[-1])["files"] == ["x.json"]

    def test_failure(self, gateway: Gateway):
        """No result, and 1."""
        gateway.streams = [[ended("failed", error={"message": "because"})]]
        result = watch("--json")
        assert result.exit_code == 1
        assert [json.loads(line)["event"] for line in result.stdout.splitlines()] == ["job.failed"]


class TestSubmitAndWait:
    def test_stays_to_the_end(self, gateway: Gateway, monkeypatch: pytest.MonkeyPatch):
        """`nexus submit --wait` is both in one; -o alone says the same."""

        def answer(request: httpx.Request) -> httpx.Response:
            return httpx.Response(202, json=job("queued")) if request.method == "POST" else gateway(request)

        monkeypatch.setattr(options, "client", lambda *_: api(answer))
        for arguments in (["--wait"], ["-o", "x.json"]):
            gateway.streams = [[ended()]]
            result = CliRunner().invoke(app, ["submit", "chat", "-", *arguments], input="{}")
            assert (result.stdout, result.exit_code) == ("Hello\n" if "--wait" in arguments else "", 0)
        gateway.streams = [[ended("failed")]]
        assert CliRunner().invoke(app, ["submit", "chat", "-", "--wait"], input="{}").exit_code == 1
