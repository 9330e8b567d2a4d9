"""The command adapter, on real programs."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import signal
import sys
import wave
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from schemas.jobs import Capability
from tests.backends.adapter_contract import AdapterContract, AdapterRig, eventually, outputs_of
from tests.backends.contract import chat, check_stream, collect, completion, events
from tests.backends.kit.test_speech import speech
from workers.adapter_kit.audio.codecs import decode_audio, has_pyav
from workers.backends.base import (
    BackendConfig,
    BackendError,
    BackendRefused,
    BackendUnavailable,
    Chunk,
    Finish,
    ModelNotServed,
    Task,
)
from workers.backends.command import CommandBackend

SPEAKER = """#!{python}
import os, sys, time
open(os.path.join({pids!r}, str(os.getpid())), "w").close()
text = sys.stdin.read()
for number in range(1000 if text == "long" else len(text)):
    sys.stdout.buffer.write(bytes(3200))
    sys.stdout.flush()
    if text == "long":
        time.sleep(0.05)
"""


def command(line: str, *models: str, **options: str) -> CommandBackend:
    return CommandBackend(BackendConfig(models=models or ("program",), options={"command": line, **options}))


def say(text: str, *, stream: bool = False, **fields: Any) -> Task:
    task = speech(input=text, stream=stream, **({"response_format": "wav"} | fields))
    return Task("job_1", "req_1", task.capability, task.endpoint, "program", "program", stream, task.body)


def alive(pid: int) -> bool:
    """Whether it runs: one that has ended may still be listed, until someone has asked how it ended."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return not Path("/proc/self").exists()


class Program:
    """A script that leaves its process ids behind."""

    def __init__(self, folder: Path) -> None:
        self.pids = folder / "pids"
        self.pids.mkdir()
        self.path = folder / "speaker"
        self.path.write_text(SPEAKER.format(python=sys.executable, pids=str(self.pids)))
        self.path.chmod(0o755)

    def running(self) -> list[int]:
        return [int(file.name) for file in self.pids.iterdir() if alive(int(file.name))]

    async def idle(self) -> bool:
        return not self.running()

    async def kill(self) -> None:
        self.path.chmod(0o644)
        for pid in self.running():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    async def start(self) -> None:
        self.path.chmod(0o755)


@pytest.fixture
def program(tmp_path: Path) -> Program:
    return Program(tmp_path)


def lasts(seconds: float) -> Callable[[list[Chunk], Finish], None]:
    def check(chunks: list[Chunk], finish: Finish) -> None:
        assert finish.content_type == "audio/wav"
        with wave.open(io.BytesIO(b"".join(chunk.data for chunk in chunks))) as file:
            assert file.getnframes() / file.getframerate() == pytest.approx(seconds, rel=0.3)

    return check


class TestSpeechContract(AdapterContract):
    """What every adapter must do."""

    @pytest.fixture
    async def rig(self, program: Program) -> AsyncIterator[AdapterRig]:
        yield AdapterRig(
            backend=command(shlex.quote(str(program.path)), output="pcm:16000"),
            capability=Capability.SPEECH,
            short=say("Hello"),
            check=lasts(0.5),
            long=say("long"),
            bad=say("Hello", voice="no-such-voice"),
            idle=program.idle,
            kill=program.kill,
            start=program.start,
        )


def check_echo(chunks: list[Chunk], finish: Finish) -> None:
    (body,) = [json.loads(chunk.data) for chunk in chunks if chunk.data]
    assert body["choices"][0]["message"]["content"] == "Say hello to the world"
    assert finish.content_type == "application/json"


class TestChatContract(AdapterContract):
    """The same for text."""

    @pytest.fixture
    async def rig(self, tmp_path: Path) -> AsyncIterator[AdapterRig]:
        pid = tmp_path / "pid"
        script = f'echo $$ >> {pid}; text="$(cat)"; case "$text" in long) while echo x; do sleep 0.05; done;; *) printf %s "$text";; esac'

        async def idle() -> bool:
            return not pid.exists() or not any(alive(int(line)) for line in pid.read_text().split())

        yield AdapterRig(
            backend=command(shlex.join(["sh", "-c", script]), capability="chat"),
            capability=Capability.CHAT,
            short=chat("program"),
            check=check_echo,
            long=chat("program", messages=[{"role": "user", "content": "long"}]),
            bad=chat("program", n=2),
            idle=idle,
            kill=None,
            start=None,
        )


async def test_text_is_streamed_as_it_is_written() -> None:
    """The first piece is there although the program waits for what never comes."""
    backend = command("sh -c 'printf first; exec sleep 1000'", capability="chat")
    output = backend.run(chat("program", stream=True))
    piece = await anext(aiter(output))
    assert isinstance(piece, Chunk)
    assert b'"content":"first"' in piece.data
    await output.aclose()


async def test_a_stream_is_what_clients_rely_on() -> None:
    """Characters cut in two between pieces are whole."""
    backend = command(r"""sh -c 'printf "gr\303"; sleep 0.2; printf "\274n"'""", capability="chat")
    chunks, finish = await collect(backend, chat("program", stream=True, public_model="mine"))
    assert check_stream(events(chunks), "mine", is_chat=True) == "grün"
    assert finish.content_type == "text/event-stream"


async def test_completions_are_given_the_prompt() -> None:
    backend = command("tr a-z A-Z", capability="completions")
    chunks, _ = await collect(backend, completion("program"))
    assert json.loads(chunks[-1].data)["choices"][0]["text"] == "ONCE UPON A TIME"
    with pytest.raises(BackendRefused, match="/v1/chat/completions"):
        await collect(backend, chat("program"))


async def test_a_program_may_read_the_whole_request() -> None:
    backend = command("cat", capability="chat", input="json")
    task = chat("program", stop=["x"], tools=[{"type": "function"}])
    chunks, _ = await collect(backend, task)
    assert json.loads(json.loads(chunks[-1].data)["choices"][0]["message"]["content"]) == json.loads(task.body)


async def test_a_program_reads_no_repeated_keys() -> None:
    """Programs differ in which of two they take; the gateway has checked the last."""
    body = b'{"model":"m","messages":[{"role":"user","content":[{"type":"text","text":"hi","text":"ho"}]}],"seed":1,"seed":2}'
    task = Task("job_1", "req_1", Capability.CHAT, "/v1/chat/completions", "program", "program", False, body)
    chunks, _ = await collect(command("cat", capability="chat", input="json"), task)
    read = json.loads(chunks[-1].data)["choices"][0]["message"]["content"]
    assert (read.count('"seed"'), read.count('"text"')) == (1, 2)
    assert json.loads(read) == json.loads(body)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 2}, "n"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"stop": ["."]}, "stop"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": None}]}, "messages"),
    ],
)
async def test_what_a_program_would_ignore_is_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(BackendRefused) as caught:
        await collect(command("cat", capability="chat"), chat("program", **fields))
    assert caught.value.info.param == param


async def test_the_last_message_may_come_in_parts() -> None:
    parts = [{"type": "text", "text": "two "}, {"type": "text", "text": "parts"}]
    backend = command("cat", capability="chat")
    chunks, _ = await collect(backend, chat("program", messages=[{"role": "user", "content": parts}]))
    assert json.loads(chunks[-1].data)["choices"][0]["message"]["content"] == "two parts"


SHOW = "import sys; print(sys.argv[1:])"


async def shown(line: str, content: str, *models: str) -> list[str]:
    """The arguments that a program gets."""
    backend = command(f"{shlex.quote(sys.executable)} -c {shlex.quote(SHOW)} {line}", *models, capability="chat")
    task = chat(models[0] if models else "program", messages=[{"role": "user", "content": content}])
    chunks, _ = await collect(backend, task)
    text = json.loads(chunks[-1].data)["choices"][0]["message"]["content"]
    return list(json.loads(text.strip().replace("'", '"')))


async def test_what_a_request_says_stays_in_its_argument() -> None:
    """It is never split, read by a shell, taken for a placeholder, or for an option."""
    assert await shown("--text={text} x", "a b; $(id) `id` {model}") == ["--text=a b; $(id) `id` {model}", "x"]
    assert await shown("{text}", "--output=/etc/passwd") == [" --output=/etc/passwd"]
    assert await shown("-m {model} {other}", "x", "tiny") == ["-m", "tiny", "{other}"]


@pytest.mark.parametrize("text", ["a\0b", "x" * 300_000])
async def test_text_that_no_argument_can_hold_is_refused(text: str) -> None:
    backend = command("printf %s {text}", capability="chat")
    with pytest.raises(BackendRefused):
        await collect(backend, chat("program", messages=[{"role": "user", "content": text}]))


async def test_a_large_text_that_nobody_reads_does_not_matter() -> None:
    """Nor does one that comes back before it has been read to its end."""
    for line, length in (("printf done", 4), ("cat", 1_000_000), ("head -c 5", 5)):
        backend = command(line, capability="chat")
        chunks, _ = await collect(backend, chat("program", messages=[{"role": "user", "content": "x" * 1_000_000}]))
        assert len(json.loads(chunks[-1].data)["choices"][0]["message"]["content"]) == length


@pytest.mark.parametrize(
    ("line", "message", "transient"),
    [
        ("sh -c 'echo noise >&2; echo no such voice >&2; exit 3'", "status 3: no such voice", False),
        ("sh -c 'printf half; exit 1'", "status 1", False),
        ("sh -c 'kill -KILL $$'", "signal 9", True),
        ("sh -c 'head -c 1000000 /dev/zero >&2; echo >&2; echo the end >&2; exit 1'", "the end", False),
    ],
)
async def test_a_program_that_fails_is_a_failure_with_its_last_words(line: str, message: str, transient: bool) -> None:
    """Whatever it had written before."""
    for capability, task in (("chat", chat("program")), ("speech", say("Hello"))):
        with pytest.raises(BackendError, match=message) as caught:
            await outputs_of(command(line, capability=capability, output="pcm:16000"), task)
        assert caught.value.transient == transient


async def test_giving_up_ends_the_programs_own_children_too(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    script = f"sleep 1000 & echo $! $$ > {pids}; printf made; wait"
    backend = command(shlex.join(["sh", "-c", script]), capability="chat")
    output = backend.run(chat("program", stream=True))
    assert isinstance(await anext(aiter(output)), Chunk)
    started = [int(pid) for pid in pids.read_text().split()]
    assert all(alive(pid) for pid in started)
    await output.aclose()

    async def gone() -> bool:
        return not any(alive(pid) for pid in started)

    await eventually(gone, 3)


async def test_a_child_left_behind_goes_with_its_program(tmp_path: Path) -> None:
    """It holds no slot."""
    pid = tmp_path / "pid"
    script = f"sleep 1000 >&2 & echo $! > {pid}; printf made"
    chunks, _ = await collect(command(shlex.join(["sh", "-c", script]), capability="chat"), chat("program"))
    assert b"made" in chunks[-1].data

    async def gone() -> bool:
        return not alive(int(pid.read_text()))

    await eventually(gone, 3)


async def test_a_program_that_writes_faster_than_it_is_read_waits(tmp_path: Path) -> None:
    """Its output is never gathered in memory; and it can still be ended."""
    backend = command("sh -c 'exec yes'", output="pcm:24000")
    output = backend.run(say("x", stream=True, response_format="pcm"))
    size = 0
    async for piece in output:
        assert isinstance(piece, Chunk)
        size += len(piece.data)
        assert len(piece.data) <= 128 * 1024
        if size > 1_000_000:
            break
    await output.aclose()


async def test_a_missing_program_is_unavailable() -> None:
    backend = command("no-such-program-here --stdout")
    for ask in (backend.health, backend.discover, lambda: outputs_of(backend, say("Hello"))):
        with pytest.raises(BackendUnavailable, match="no-such-program-here"):
            await ask()


async def test_models_are_called_as_configured_or_as_the_program() -> None:
    backend = CommandBackend(BackendConfig(options={"command": "/bin/cat -u"}))
    assert [offer.name for offer in (await backend.discover()).models] == ["cat"]
    backend = command("cat {voice}", "a", "b", voices="joe;alloy:joe")
    offers = (await backend.discover()).models
    assert [(offer.name, offer.voices) for offer in offers] == [("a", ("joe", "alloy")), ("b", ("joe", "alloy"))]
    with pytest.raises(ModelNotServed):
        await outputs_of(backend, say("Hello"))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"command": ""},
        {"command": "{text}"},
        {"command": "'unfinished"},
        {"command": "cat", "output": "ogg"},
        {"command": "cat", "output": "pcm"},
        {"command": "cat", "capability": "images"},
        {"command": "cat", "input": "yaml"},
        {"command": "cat", "rate": "fast"},
        {"command": "cat {voice}"},
        {"command": "cat", "voices": "alloy:"},
        {"command": "cat", "shell": "true"},
    ],
)
def test_options_that_make_no_sense_are_errors(options: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"option|quotation|convert"):
        CommandBackend(BackendConfig(options=options))


TONE = "import sys; sys.stdout.buffer.write(bytes(int({seconds} * 32000)))"


@pytest.mark.skipif(not has_pyav(), reason="the audio extra is not installed")
async def test_sound_comes_in_every_format_and_speed_although_the_program_has_one() -> None:
    backend = command(shlex.join([sys.executable, "-c", TONE.format(seconds=2)]), output="pcm:16000")
    chunks, finish = await collect(backend, say("x", response_format="mp3", speed=2))
    assert finish.content_type == "audio/mpeg"
    assert (await decode_audio(b"".join(chunk.data for chunk in chunks))).seconds == pytest.approx(1, abs=0.15)


async def test_a_program_that_knows_speed_is_told_it() -> None:
    """And does it alone."""
    program = "import sys; sys.stdout.buffer.write(bytes(int(32000 * 2 / float(sys.argv[1])))); sys.exit(sys.argv[2] != '350')"
    line = shlex.join([sys.executable, "-c", program, "{speed}", "{rate}"])
    chunks, finish = await collect(command(line, output="pcm:16000"), say("x", speed=2))
    lasts(1)(chunks, finish)


async def test_instructions_reach_a_program_that_takes_them_and_are_refused_else() -> None:
    task = say("x", instructions="Whisper.")
    with pytest.raises(BackendRefused) as caught:
        await collect(command("cat", output="pcm:16000"), task)
    assert caught.value.info.param == "instructions"
    chunks, _ = await collect(command("printf %s {instructions}", output="pcm:16000"), task)
    assert b"".join(chunk.data for chunk in chunks).endswith(b"Whisper.")


async def test_a_program_that_reads_the_request_may_know_voices_of_its_own() -> None:
    task = say("x", voice="anyone who")
    chunks, _ = await collect(command("cat", output="pcm:16000", input="json"), task)
    assert b'"voice":"anyone who"' in b"".join(chunk.data for chunk in chunks)
    with pytest.raises(BackendRefused, match="only one voice"):
        await collect(command("cat", output="pcm:16000"), task)


class TestEspeak:
    """A real voice, where Debian's espeak-ng is installed."""

    LINE = "espeak-ng --stdin --stdout -v {voice} -s {rate}"

    @pytest.fixture
    def espeak(self) -> CommandBackend:
        if shutil.which("espeak-ng") is None:
            pytest.skip("espeak-ng is not installed (apt-get install espeak-ng)")
        return command(self.LINE, voices="en-us;de;alloy:en-gb")

    @pytest.mark.parametrize("voice", ["en-us", "de", "alloy", "nova", None])
    async def test_it_speaks(self, espeak: CommandBackend, voice: str | None) -> None:
        slow, finish = await collect(espeak, say("One two three four five.", voice=voice))
        lasts(2)(slow, finish)
        fast, _ = await collect(espeak, say("One two three four five.", voice=voice, speed=2))
        assert sum(len(chunk.data) for chunk in fast) < 0.7 * sum(len(chunk.data) for chunk in slow)

    @pytest.mark.skipif(not has_pyav(), reason="the audio extra is not installed")
    @pytest.mark.parametrize("stream", [True, False])
    async def test_it_speaks_mp3(self, espeak: CommandBackend, stream: bool) -> None:
        chunks, finish = await collect(espeak, say("One two three.", stream=stream, response_format="mp3"))
        assert finish.content_type == "audio/mpeg"
        assert (await decode_audio(b"".join(chunk.data for chunk in chunks))).seconds > 0.5
