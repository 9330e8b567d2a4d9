r"""Any program as a backend: text in, audio or text out.

    nexus worker --backend command --option 'command=espeak-ng --stdin --stdout -v {voice} -s {rate}' \
        --option 'voices=en-us;en-gb;de'

The program is started for each request, without a shell, and reads the text from its standard input, unless its command holds `{text}`. Its work is
complete when it exits with status 0. A cancelled request kills the program and its whole process group.

| option | default | meaning |
|---|---|---|
| `command` | | program and arguments, quoted as in a shell |
| `capability` | `speech` | `speech`, `chat` or `completions` |
| `output` | `wav` | of speech: `wav`, `mp3`, `opus`, `aac`, `flac`, or `pcm:22050`, bare 16-bit samples at that rate (`pcm:44100:2`: two channels). Other formats are converted from it |
| `voices` | | of speech: the values of `{voice}`, the first by default; `alloy:en-us` adds a name for one |
| `rate` | 175 | of speech: words per minute at speed 1, for `{rate}` |
| `input` | `text` | what the program reads: `text` (of chat: the last message) or `json`, the request's body |

In the command, `{text}`, `{voice}`, `{speed}`, `{rate}`, `{instructions}` and `{model}` stand for the request's values. Each stays within its argument. The
model has the program's name, or the names of `--model`; with several names, `{model}` tells the program which one was requested.
"""

from __future__ import annotations

import codecs
import errno
import re
import shlex
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from pathlib import PurePath
from typing import Any

import orjson

from schemas.descriptors import EndpointDescriptor, ModelDescriptor
from schemas.jobs import Capability
from schemas.parameters.audio import speech
from schemas.parameters.text import TextFeatures, chat, completions
from schemas.presence import ModelOffer
from workers.adapter_kit.audio.codecs import AudioFormat
from workers.adapter_kit.audio.speech import SynthesisRequest, choose_voice, parse_voices_option, respond_with_speech
from workers.adapter_kit.child_process import run_program
from workers.adapter_kit.descriptors import DescriptorCache
from workers.adapter_kit.error_mapping import UNSUPPORTED_ENDPOINT
from workers.adapter_kit.options import parse_choice
from workers.adapter_kit.request_fields import JSON, parse_json_object, requested_choices
from workers.adapter_kit.requirements import AUDIO_CODECS, Program
from workers.adapter_kit.text.completion_stream import CompletionOptions, new_completion_reader
from workers.backends.base import (
    Backend,
    BackendConfig,
    BackendRefused,
    BackendUnavailable,
    Discovery,
    ModelNotServed,
    Output,
    Requirement,
    Task,
)

ENDPOINTS = {
    Capability.SPEECH: "/v1/audio/speech",
    Capability.CHAT: "/v1/chat/completions",
    Capability.COMPLETIONS: "/v1/completions",
}
PLACEHOLDER = re.compile(r"\{(text|voice|speed|rate|instructions|model)\}")
CODECS = ("wav", "mp3", "opus", "aac", "flac")
UNSUPPORTED_FIELDS = ("tools", "functions", "stop", "logprobs", "suffix")
"""Fields that change the answer, and that a program which reads only a text does not receive."""
IGNORED_FIELDS = frozenset(
    {
        *("max_completion_tokens", "max_tokens", "temperature", "top_p", "stop", "seed", "frequency_penalty"),
        *("presence_penalty", "n", "best_of", "logit_bias", "logprobs", "user"),
    }
)
"""Parameters that such a program does not receive."""


class CommandBackend(Backend):
    """Run one program for each request. See the module's docstring."""

    name = "command"
    option_names = frozenset({"command", "capability", "output", "voices", "rate", "input"})
    default_slots = 2

    def __init__(self, config: BackendConfig) -> None:
        """Raise ValueError when an option is missing or invalid."""
        super().__init__(config)
        options = config.options
        self._command = shlex.split(options.get("command", ""))
        if not self._command or PLACEHOLDER.search(self._command[0]):
            raise ValueError("the command adapter needs the option command: a program and its arguments")
        self._placeholders = frozenset(name for argument in self._command for name in PLACEHOLDER.findall(argument))
        self._capability = Capability(parse_choice(options, "capability", tuple(ENDPOINTS)))
        self._output = _parse_output(options.get("output", "wav"))
        self._voices = parse_voices_option(options.get("voices", ""))
        if "voice" in self._placeholders and not self._voices:
            raise ValueError(
                "{voice} in the command needs the option voices, which lists the names that may replace it"
            )
        self._rate = float(options.get("rate", "175"))
        self._reads_json = parse_choice(options, "input", ("text", "json")) == "json"
        self._program = Program(self._command[0], "correct the option command")
        self._descriptors = DescriptorCache()
        self._models = config.models or (PurePath(self._command[0]).name,)

    def requirements(self) -> tuple[Requirement, ...]:
        """Return the program, and for speech the codecs."""
        return (self._program, AUDIO_CODECS)

    async def discover(self) -> Discovery:
        await self.health()
        voices = tuple(self._voices)
        return Discovery(
            tuple(ModelOffer(name=name, capabilities=(self._capability,), voices=voices) for name in self._models)
        )

    def describe(self, _offer: ModelOffer) -> ModelDescriptor:
        """Return what the program can be told."""
        return self._descriptors.get("", None, self._describe)

    def _describe(self) -> dict[str, EndpointDescriptor]:
        path, reads_all = ENDPOINTS[self._capability], self._reads_json
        if self._capability is Capability.SPEECH:
            instructions = reads_all or "instructions" in self._placeholders
            return {path: speech(tuple(self._voices), instructions=instructions)}
        features = TextFeatures(
            tools=reads_all, structured=reads_all, lacks=frozenset({"n"}) if reads_all else IGNORED_FIELDS
        )
        return {path: (chat if self._capability is Capability.CHAT else completions)(features)}

    async def health(self) -> None:
        """Check that the program exists."""
        if (problem := self._program.problem()) is not None:
            raise BackendUnavailable(problem)

    async def run(self, task: Task) -> AsyncGenerator[Output]:
        """Run the program once."""
        if task.model not in self._models:
            raise ModelNotServed(f"the backend does not have the model {task.model!r}", param="model")
        if task.endpoint != ENDPOINTS[self._capability]:
            raise BackendRefused(f"this backend does not serve {task.endpoint}", code=UNSUPPORTED_ENDPOINT)
        made = self._speak(task) if self._capability is Capability.SPEECH else self._generate_text(task)
        async with aclosing(made) as outputs:
            async for output in outputs:
                yield output

    # Speech

    def _speak(self, task: Task) -> AsyncGenerator[Output]:
        request = SynthesisRequest.from_task(task)
        if request.instructions and not self._reads_json and "instructions" not in self._placeholders:
            raise BackendRefused(
                "This voice takes no instructions. Send the request without them.", param="instructions"
            )
        able = self._reads_json or bool(self._placeholders & {"speed", "rate"})
        voice = request.voice
        if self._voices or not self._reads_json:
            voice = choose_voice(voice, self._voices, next(iter(self._voices.values()), ""))
        values = {
            "text": request.input,
            "voice": voice,
            "speed": f"{request.speed:g}",
            "rate": f"{self._rate * request.speed:.0f}",
            "instructions": request.instructions,
            "model": task.model,
        }
        sound = self._run(request.input, task, values)
        return respond_with_speech(task, request, sound, self._output, speed=1.0 if able else request.speed)

    # Text

    async def _generate_text(self, task: Task) -> AsyncGenerator[Output]:
        """Yield the program's output as a model's answer, piece by piece as it is written."""
        body = parse_json_object(task.body)
        chat = self._capability is Capability.CHAT
        text = _last_message(body) if chat else _prompt(body)
        self._refuse_unsupported(body)
        wanted = CompletionOptions(chat=chat, model=task.public_model, fallback_id=task.job, stream=task.stream)
        answer = new_completion_reader(wanted)
        async with aclosing(self._run(text, task, {"text": text, "model": task.model})) as written:
            async for event in _events(written, chat):
                chunk = answer.feed(event)
                if chunk is not None:
                    yield chunk
        for output in answer.finish():
            yield output

    def _refuse_unsupported(self, body: JSON) -> None:
        """Raise BackendRefused for a field that the program would ignore."""
        if requested_choices(body) != 1:
            raise BackendRefused("This backend gives one answer. Send n=1.", param="n")
        if self._reads_json:
            return
        form = body.get("response_format")
        ignored = next((name for name in UNSUPPORTED_FIELDS if body.get(name)), None)
        if isinstance(form, dict) and form.get("type", "text") != "text":
            ignored = "response_format"
        if ignored is not None:
            raise BackendRefused(
                f"This backend reads only the text. Send the request without {ignored}.", param=ignored
            )

    # The program

    async def _run(self, text: str, task: Task, values: dict[str, str]) -> AsyncGenerator[bytes]:
        command = [_fill_placeholders(argument, values) for argument in self._command]
        given = self._stdin(text, task)
        if any("\0" in argument for argument in command):
            raise BackendRefused("The text holds a zero character, which this backend cannot read.")
        try:
            async with run_program(command, given) as output:
                async for data in output:
                    yield data
        except OSError as error:
            if error.errno == errno.E2BIG:
                raise BackendRefused("The text is too long for this backend.", param="input") from error
            raise BackendUnavailable(f"the program {command[0]!r} cannot be started: {error.strerror}") from error

    def _stdin(self, text: str, task: Task) -> bytes:
        """Return the program's standard input. JSON is encoded again: of repeated keys, a program may take another one than was checked."""
        if self._reads_json:
            return orjson.dumps(parse_json_object(task.body))
        return b"" if "text" in self._placeholders else text.encode()


def _fill_placeholders(argument: str, values: dict[str, str]) -> str:
    """Return an argument with its placeholders filled. A value never becomes an option of the program: a leading minus gets a space before it."""
    filled = PLACEHOLDER.sub(lambda place: values.get(place[1], ""), argument)
    return f" {filled}" if filled.startswith("-") and not argument.startswith("-") else filled


async def _events(written: AsyncGenerator[bytes], chat: bool) -> AsyncIterator[bytes]:
    """Yield the written text as the events of an OpenAI stream."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    async for data in written:
        text = decoder.decode(data)
        if text:
            yield _event({"delta": {"content": text}} if chat else {"text": text}, None)
    rest = decoder.decode(b"", final=True)
    yield _event({"delta": {"content": rest}} if chat else {"text": rest}, "stop") + b"data: [DONE]\n\n"


def _event(choice: JSON, reason: str | None) -> bytes:
    return b"data: %b\n\n" % orjson.dumps({"choices": [{"index": 0, **choice, "finish_reason": reason}]})


def _last_message(body: JSON) -> str:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages or not isinstance(messages[-1], dict):
        raise BackendRefused("The list of messages is empty.", param="messages")
    content = messages[-1].get("content")
    if isinstance(content, list):
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise BackendRefused(
                "The messages hold parts that are not text. This backend reads only text.", param="messages"
            )
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise BackendRefused("The last message has no text.", param="messages")
    return content


def _prompt(body: JSON) -> str:
    prompt: Any = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str):
        raise BackendRefused("This backend takes one prompt, as text.", param="prompt")
    return prompt


def _parse_output(value: str) -> AudioFormat:
    codec, _, rest = value.partition(":")
    if codec == "pcm":
        rate, _, channels = rest.partition(":")
        if not rate.isdecimal() or channels not in ("", "1", "2"):
            raise ValueError("the option output=pcm needs the rate of its samples: pcm:22050, or pcm:44100:2")
        return AudioFormat("pcm", int(rate), int(channels or 1))
    return AudioFormat(parse_choice({"output": value}, "output", CODECS))
