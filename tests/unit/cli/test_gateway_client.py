"""The client for gateways: the choice of gateway and key, and the messages for failures."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from cli.errors import ConsoleError
from cli.gateway_client import DEFAULT_URL, ApiClient, GatewayTarget, find_target
from cli.options import chosen_key, warn_of_key
from cli.stack.data_dir import DataDir, StackState
from cli.stack.ports import free_port
from tests.unit.cli.gateway_double import serve

SECRET = "nexus-very-secret"


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch):
    for name in ("NEXUS_URL", "NEXUS_API_KEY", "GATEWAY_BEARER_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def data(tmp_path: Path) -> DataDir:
    data = DataDir(tmp_path)
    data.prepare()
    return data


@pytest.fixture
def stack(data: DataDir):
    """A stack that runs on the data directory."""
    with data.locked("http://127.0.0.1:9123"):
        data.save_state(StackState(pid=1, url="http://127.0.0.1:9123", key=SECRET))
        yield data


def client(answer: Callable[[httpx.Request], httpx.Response], key: str = SECRET) -> ApiClient:
    return ApiClient(GatewayTarget(serve(answer), key, "the environment variable X"))


class TestTarget:
    def test_defaults(self, data: DataDir):
        """The usual place, without a key."""
        assert find_target(None, None, data) == GatewayTarget(DEFAULT_URL)

    def test_running_stack(self, stack: DataDir):
        """Its URL and its key."""
        target = find_target(None, None, stack)
        assert (target.url, target.key) == ("http://127.0.0.1:9123", SECRET)

    def test_environment_beats_the_stack_and_flags_beat_both(self, stack: DataDir, monkeypatch: pytest.MonkeyPatch):
        """For the URL and for the key."""
        monkeypatch.setenv("NEXUS_URL", "https://nexus.example/")
        monkeypatch.setenv("GATEWAY_BEARER_TOKEN", "admin")
        assert find_target(None, None, stack).url == "https://nexus.example"
        assert find_target(None, None, stack).key == "admin"
        monkeypatch.setenv("NEXUS_API_KEY", "mine")
        assert find_target(None, None, stack).key == "mine"
        target = find_target("http://other:1", "flag", stack)
        assert (target.url, target.key, target.key_source) == ("http://other:1", "flag", "--key or --key-file")

    def test_keys_in_files(self, stack: DataDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        """A file named by an option or variable holds the key; an unreadable one is an error, and no other key is sent."""
        (tmp_path / "key").write_text("filed\n")
        assert chosen_key(None, str(tmp_path / "key")) == "filed"
        monkeypatch.setenv("GATEWAY_BEARER_TOKEN", "admin")
        monkeypatch.setenv("NEXUS_API_KEY_FILE", str(tmp_path / "key"))
        assert find_target(None, None, stack).key == "filed"
        monkeypatch.setattr("sys.stdin", io.StringIO("typed\n"))
        assert chosen_key(None, "-") == "typed"
        (tmp_path / "empty").write_text("\n")
        for wrong in ("missing", "empty"):
            with pytest.raises(ConsoleError, match=wrong):
                chosen_key(None, str(tmp_path / wrong))
        with pytest.raises(ConsoleError, match="Leave --key out"):
            chosen_key("a", str(tmp_path / "key"))
        monkeypatch.setenv("NEXUS_API_KEY_FILE", str(tmp_path / "missing"))
        with pytest.raises(ConsoleError, match="NEXUS_API_KEY_FILE"):
            find_target(None, None, stack)

    def test_a_key_on_the_command_line_is_a_warning(self, capsys: pytest.CaptureFixture[str]):
        """On standard error, so that JSON stays JSON."""
        assert warn_of_key("secret") == "secret"
        assert warn_of_key(None) is None
        captured = capsys.readouterr()
        assert "process" in captured.err
        assert "secret" not in captured.err
        assert captured.out == ""

    def test_key_of_the_stack_goes_to_no_other_gateway(self, stack: DataDir):
        """A key is not sent to whatever --url names."""
        assert find_target("http://elsewhere:8800", None, stack).key == ""

    @pytest.mark.parametrize("url", ["http://h:1/v1", "http://h:1/v1/", "http://h:1", "h:1"])
    def test_base_url_as_sdks_want_it(self, data: DataDir, url: str):
        """With or without /v1 and http://."""
        assert find_target(url, None, data).url == "http://h:1"

    def test_key_is_not_in_the_repr(self):
        """A target in a traceback keeps its secret."""
        assert SECRET not in repr(GatewayTarget("http://gw", SECRET))


class TestErrors:
    def test_no_server_at_the_address(self):
        """Names the URL, and what to do."""
        url = f"http://127.0.0.1:{free_port()}"
        with ApiClient(GatewayTarget(url)) as api, pytest.raises(ConsoleError) as caught:
            api.get("/readyz")
        assert url in str(caught.value)
        assert "nexus up" in str(caught.value)

    def test_rejected_key_is_named_by_its_source_only(self):
        """401."""
        answer = httpx.Response(401, json={"error": {"message": "Incorrect API key"}})
        with client(lambda _: answer) as api, pytest.raises(ConsoleError) as caught:
            api.get("/v1/workers")
        assert "the environment variable X" in str(caught.value)
        assert SECRET not in str(caught.value)

    def test_missing_key_says_how_to_give_one(self):
        """401 without a key."""
        with client(lambda _: httpx.Response(401, json={}), key="") as api, pytest.raises(ConsoleError, match="--key"):
            api.get("/v1/workers")

    def test_error_object_is_shown_with_its_request(self):
        """OpenAI's error object."""
        answer = httpx.Response(404, json={"error": {"message": "no such worker"}}, headers={"x-request-id": "req_1"})
        with client(lambda _: answer) as api, pytest.raises(ConsoleError, match=r"no such worker.*404.*req_1"):
            api.post("/v1/workers/x/drain")

    def test_something_else_at_that_url(self):
        """A page instead of JSON."""
        with client(lambda _: httpx.Response(200, text="<html>")) as api, pytest.raises(ConsoleError, match="JSON"):
            api.get("/v1/workers")

    def test_accepted_status(self):
        """`nexus status` reads a 503 of /readyz."""
        with client(lambda _: httpx.Response(503, json={"status": "unavailable"})) as api:
            assert api.get("/readyz", accept=(503,)) == {"status": "unavailable"}

    def test_not_a_url(self):
        """A typo."""
        with ApiClient(GatewayTarget("ftp://x")) as api, pytest.raises(ConsoleError, match="not a URL"):
            api.get("/readyz")


class TestStream:
    @staticmethod
    def frames(*lines: str, status: int = 200) -> list[dict[str, Any]]:
        body = "".join(f"{line}\n\n" for line in lines)
        with client(lambda _: httpx.Response(status, text=body)) as api:
            return list(api.stream("/v1/chat/completions", {}))

    def test_whole(self):
        """Comments are skipped, [DONE] ends."""
        assert self.frames(": queued position=1", 'data: {"a": 1}', "data: [DONE]", 'data: {"b": 2}') == [{"a": 1}]

    def test_line_separators_within_text(self):
        """Characters that end lines elsewhere end none here."""
        text = "one\u2028two\x85three\x0cfour"
        line = json.dumps({"a": text}, ensure_ascii=False)
        assert self.frames(f"data: {line}", "data: [DONE]") == [{"a": text}]

    def test_truncated_stream_is_an_error(self):
        """An end without [DONE] is no end."""
        with pytest.raises(ConsoleError, match="broke off"):
            self.frames('data: {"a": 1}')

    def test_error_frame(self):
        """Said in the middle of the stream."""
        with pytest.raises(ConsoleError, match="worker lost"):
            self.frames('data: {"a": 1}', 'data: {"error": {"message": "worker lost"}}')

    def test_refused(self):
        """Said before the stream."""
        with pytest.raises(ConsoleError, match="no such model"):
            self.frames(json.dumps({"error": {"message": "no such model"}}), status=404)

    def test_key_and_body_are_sent(self):
        """As an SDK would."""
        seen: list[httpx.Request] = []

        def answer(request: httpx.Request) -> httpx.Response:
            seen.append(request)
            return httpx.Response(200, text="data: [DONE]\n\n")

        with client(answer) as api:
            list(api.stream("/v1/chat/completions", {"model": "m"}))
        assert seen[0].headers["authorization"] == f"Bearer {SECRET}"
        assert json.loads(seen[0].content) == {"model": "m"}
