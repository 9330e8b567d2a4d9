"""The reference adapter: answers with what it was told, in the way it was told to.

It needs no server, so it is what tests, benchmarks and `nexus up --no-local-models` run on. Chat answers with the text
of the last user message, completions with the prompt, word by word; echo_media.py says what all else is answered with.

Behaviour, as options of the worker (`NAME=value`) or, for one request, as an object in the body's field `echo`
(`{"echo": {"delay_ms": 20, "fail": "mid"}}`; the body's wins):

| name | default | means |
|---|---|---|
| `first_delay_ms` | `delay_ms` | wait before the first token |
| `delay_ms` | 0 | wait before each further token |
| `tokens` | as many as the text has words | length of the answer; the text is repeated or cut |
| `size` | | bytes of text in the answer, spread evenly over its tokens |
| `batch` | 1 | tokens that come in one Chunk |
| `fail` | | see below |
| `fail_times` | 0: always | only a job's first N attempts on this worker fail |
| `slots` | 4 | options only: how many requests it runs at once |
| `down` | false | options only: `discover` and `health` say that the server does not answer |

| `fail` | what happens |
|---|---|
| `before` | a transient BackendError before any output |
| `mid` | a transient BackendError after half of the tokens |
| `refuse` | BackendRefused: the request is wrong |
| `unavailable` | BackendUnavailable |
| `error` | a permanent BackendError |
| `crash` | an exception that is none of ours, after half of the tokens |
| `drop` | the answer ends after half of the tokens, without Finish |
| `hang` | nothing ever comes |
| `hang_mid` | nothing comes any more after half of the tokens |

`max_tokens` and `max_completion_tokens` cut the answer (`finish_reason: length`); `n` is honoured. A form's field `echo` holds
the object as JSON.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, suppress
from itertools import cycle, islice
from typing import Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from schemas.jobs import Capability, Usage
from schemas.presence import ModelOffer
from workers.adapter_kit.request_fields import parse_json_object, requested_choices, wants_usage
from workers.adapter_kit.requirements import AUDIO_CODECS, OPTIONAL_PILLOW
from workers.backends.base import (
    Backend,
    BackendConfig,
    BackendError,
    BackendRefused,
    BackendUnavailable,
    Chunk,
    Discovery,
    Finish,
    ModelNotServed,
    Output,
    Requirement,
    Task,
)
from workers.backends.echo.media import EMBEDDING_LENGTH, MEDIA, answer

JSON = dict[str, Any]

CHAT = "/v1/chat/completions"
TEXT = (Capability.CHAT, Capability.COMPLETIONS)
REMEMBERED_JOBS = 4096
BREATH = 64
"""Tokens without a delay after which others get their turn."""

Fail = Literal["", "before", "mid", "refuse", "unavailable", "error", "crash", "drop", "hang", "hang_mid"]


class EchoOptions(BaseModel):
    """How to behave. See the module's docstring."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    first_delay_ms: float | None = Field(None, ge=0, le=3_600_000)
    delay_ms: float = Field(0.0, ge=0, le=3_600_000)
    tokens: int | None = Field(None, ge=0, le=100_000)
    size: int | None = Field(None, ge=0, le=64 * 1024 * 1024)
    batch: int = Field(1, ge=1)
    fail: Fail = ""
    fail_times: int = Field(0, ge=0)


class EchoServerOptions(EchoOptions):
    """What can be said only of the whole worker."""

    slots: int = Field(4, ge=1)
    down: bool = False


class EchoBackend(Backend):
    """See the module's docstring."""

    name = "echo"

    def __init__(self, config: BackendConfig) -> None:
        """Raises ValueError when an option is unknown or makes no sense."""
        super().__init__(config)
        self.script = EchoServerOptions.model_validate(config.options)
        self._plain = EchoOptions.model_validate(self.script.model_dump(exclude={"slots", "down"}))
        self._models = config.models or ("echo",)
        self._attempts: OrderedDict[str, int] = OrderedDict()

    def requirements(self) -> tuple[Requirement, ...]:
        """The libraries that convert its sounds and pictures."""
        return (AUDIO_CODECS, OPTIONAL_PILLOW)

    async def discover(self) -> Discovery:
        await self.health()
        offers = tuple(
            ModelOffer(
                name=name,
                capabilities=(*TEXT, *MEDIA),
                loaded=True,
                owned_by="nexus",
                voices=("echo",),
                embedding_length=EMBEDDING_LENGTH,
            )
            for name in self._models
        )
        return Discovery(offers, self.script.slots)

    async def health(self) -> None:
        if self.script.down:
            raise BackendUnavailable("the echo backend was told to be down")

    async def run(self, task: Task) -> AsyncIterator[Output]:
        """Whatever is asked for."""
        if task.model not in self._models:
            raise ModelNotServed(f"the backend does not have the model {task.model!r}", param="model")
        body = parse_json_object(task.body)
        script = self._script(body)
        fail = self._fail(task.job, script)
        if fail in ("before", "refuse", "unavailable", "error", "hang"):
            await _fail_now(fail)
        output = _said_again(task, body, script, fail) if task.capability in TEXT else _made(task, script, fail)
        async with aclosing(output):
            async for piece in output:
                yield piece

    def _script(self, body: JSON) -> EchoOptions:
        wanted = body.get("echo")
        if isinstance(wanted, str) and wanted.startswith("{"):
            wanted = parse_json_object(wanted.encode())
        if not isinstance(wanted, dict):
            return self._plain  # OpenAI's own `echo` is a boolean
        try:
            return EchoOptions.model_validate(self._plain.model_dump(exclude_unset=True) | wanted)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            place = ".".join(str(part) for part in ("echo", *first["loc"]))
            raise BackendRefused(f"{place}: {first['msg']}", param=place) from error

    def _fail(self, job: str, script: EchoOptions) -> Fail:
        """How this attempt fails, if it does."""
        if not script.fail or not script.fail_times:
            return script.fail
        attempt = self._attempts[job] = self._attempts.pop(job, 0) + 1
        if len(self._attempts) > REMEMBERED_JOBS:
            self._attempts.popitem(last=False)
        return script.fail if attempt <= script.fail_times else ""


async def _fail_now(fail: Fail) -> None:
    if fail in ("before", "mid"):
        raise BackendError(f"echo was told to fail ({fail})", transient=True)
    if fail == "refuse":
        raise BackendRefused("echo was told to refuse")
    if fail == "unavailable":
        raise BackendUnavailable("echo was told to be unavailable")
    if fail == "crash":
        raise RuntimeError("echo was told to crash")
    if fail in ("hang", "hang_mid"):
        await asyncio.get_running_loop().create_future()
    raise BackendError("echo was told to fail (error)")


async def _said_again(task: Task, body: JSON, script: EchoOptions, fail: Fail) -> AsyncGenerator[Output]:
    """Chat and text completions."""
    told = _EchoAnswer(task, body, script)
    cut = max(1, told.total // 2) if fail else None
    async for chunk in _paced(told.stream() if task.stream else told.whole(), script, cut):
        yield chunk
    if fail == "drop":
        return
    if fail:
        await _fail_now(fail)
    tail = told.tail()
    if tail:
        yield Chunk(tail, 0 if task.stream else told.uncounted)
    yield Finish(told.usage, "text/event-stream" if task.stream else "application/json")


class _CutShort(Exception):
    """Half of the answer is enough."""


class _EchoPacer:
    """The script's pace, for what is no text."""

    def __init__(self, script: EchoOptions, fail: Fail) -> None:
        self.tokens = script.tokens
        self.size = script.size
        self._delay = script.delay_ms / 1000
        self._wait = self._delay if script.first_delay_ms is None else script.first_delay_ms / 1000
        self._fail = fail
        self._steps = 0

    async def step(self, total: int) -> None:
        """Wait before the next of `total` tokens. Raises _CutShort, or what the script says, after half of them."""
        if self._fail and self._steps >= max(1, total // 2):
            if self._fail == "drop":
                raise _CutShort
            await _fail_now(self._fail)
        self._steps += 1
        if self._wait:
            await asyncio.sleep(self._wait)
        self._wait = self._delay


async def _made(task: Task, script: EchoOptions, fail: Fail) -> AsyncGenerator[Output]:
    with suppress(_CutShort):
        async with aclosing(answer(task, _EchoPacer(script, fail))) as outputs:
            async for output in outputs:
                if fail and isinstance(output, Finish):  # there was but one token
                    if fail == "drop":
                        return
                    await _fail_now(fail)
                yield output


async def _paced(pieces: Iterator[Chunk], script: EchoOptions, cut: int | None) -> AsyncIterator[Chunk]:
    """`pieces` at the script's pace, no more than `cut` tokens of them."""
    delay = script.delay_ms / 1000
    wait = delay if script.first_delay_ms is None else script.first_delay_ms / 1000
    sent = 0
    for number, piece in enumerate(pieces, 1):
        if cut is not None and sent >= cut:
            return
        if wait:
            await asyncio.sleep(wait)
        elif number % BREATH == 0:
            await asyncio.sleep(0)
        wait = delay * piece.tokens
        sent += piece.tokens
        yield piece


class _EchoAnswer:
    """The answer to one request, as frames or as one body. What is constant is encoded once."""

    def __init__(self, task: Task, body: JSON, script: EchoOptions) -> None:
        self._chat = task.endpoint == CHAT
        self._stream = task.stream
        self._batch = script.batch
        self._quiet = not (script.delay_ms or script.first_delay_ms)
        texts, prompt_tokens = _said(body, self._chat)
        limit = _limit(body)
        choices = [_words(text, script, limit) for text in texts for _ in range(requested_choices(body))]
        self._choices = choices
        self.total = sum(len(words) for words, _ in choices)
        self.uncounted = self.total
        """Tokens that no Chunk has counted yet."""
        self.usage = Usage(
            prompt_tokens=prompt_tokens, completion_tokens=self.total, total_tokens=prompt_tokens + self.total
        )
        self._include_usage = wants_usage(body)
        self._constant: JSON = {
            "id": f"{'chatcmpl' if self._chat else 'cmpl'}-{task.job}",
            "object": _object(self._chat, self._stream),
            "created": int(time.time()),
            "model": task.public_model,
        }

    def stream(self) -> Iterator[Chunk]:
        """A frame for each token, `batch` of them in a Chunk; the first of each choice has its role."""
        constant = self._constant | ({"usage": None} if self._include_usage else {})
        start = b"data: " + orjson.dumps(constant)[:-1] + b',"choices":[{"index":'
        for index, (words, reason) in enumerate(self._choices):
            head = start + (b'%d,"delta":{' % index if self._chat else b"%d," % index)
            role = b'"role":"assistant",' if self._chat else b""
            text = b'"content":' if self._chat else b'"text":'
            tail = b'},"logprobs":null,' if self._chat else b',"logprobs":null,'
            tail += b'"finish_reason":'
            frames = [b"".join((head, text, orjson.dumps(word), tail, b"null}]}\n\n")) for word in words]
            if frames:
                frames[0] = frames[0].replace(head, head + role, 1)
                role = b""
            for at in range(0, len(frames), self._batch):
                some = frames[at : at + self._batch]
                yield Chunk(b"".join(some), len(some))
            empty = role[:-1] if self._chat else b'"text":""'
            yield Chunk(b"".join((head, empty, tail, orjson.dumps(reason), b"}]}\n\n")), 0)

    def whole(self) -> Iterator[Chunk]:
        """Nothing to see until the end; with delays, a sign of life for each token."""
        if self._quiet:
            return
        for at in range(0, self.total, self._batch):
            count = min(self._batch, self.total - at)
            self.uncounted -= count
            yield Chunk(b"", count)

    def tail(self) -> bytes:
        """What comes after the tokens."""
        if self._stream:
            if not self._include_usage:
                return b""
            last = self._constant | {"choices": [], "usage": self.usage.model_dump()}
            return b"data: " + orjson.dumps(last) + b"\n\n"
        choices = [self._complete(index, words, reason) for index, (words, reason) in enumerate(self._choices)]
        return orjson.dumps(self._constant | {"choices": choices, "usage": self.usage.model_dump()})

    def _complete(self, index: int, words: list[str], reason: str) -> JSON:
        text = "".join(words)
        content: JSON = (
            {"message": {"role": "assistant", "content": text, "refusal": None}} if self._chat else {"text": text}
        )
        return {"index": index, **content, "logprobs": None, "finish_reason": reason}


def _object(chat: bool, stream: bool) -> str:
    if not chat:
        return "text_completion"
    return "chat.completion.chunk" if stream else "chat.completion"


def _limit(body: JSON) -> int | None:
    for name in ("max_completion_tokens", "max_tokens"):
        if isinstance(body.get(name), int):
            return max(0, int(body[name]))
    return None


def _said(body: JSON, chat: bool) -> tuple[list[str], int]:
    """The texts to echo, one per prompt, and the number of words in all that was said."""
    if not chat:
        prompts = _prompts(body.get("prompt"))
        return prompts, sum(len(prompt.split()) for prompt in prompts)
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise BackendRefused("messages must be a list of at least one message", param="messages")
    texts = [_text(message.get("content")) for message in messages]
    users = [text for text, message in zip(texts, messages, strict=True) if message.get("role") == "user"]
    return [(users or texts)[-1]], sum(len(text.split()) for text in texts)


def _prompts(prompt: Any) -> list[str]:
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise BackendRefused("prompt must be a text or a list", param="prompt")
    if isinstance(prompt[0], int):
        return [" ".join(str(token) for token in prompt)]
    return [item if isinstance(item, str) else _prompts(item)[0] for item in prompt]


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return "".join(str(part.get("text") or "") for part in parts if isinstance(part, dict))


def _words(text: str, script: EchoOptions, limit: int | None) -> tuple[list[str], str]:
    """The tokens of the answer, and why it ends. Each but the last ends in the space that follows it."""
    words = text.split(" ")
    wanted = len(words) if script.tokens is None else script.tokens
    count = wanted if limit is None else min(wanted, limit)
    tokens = [f"{word} " for word in islice(cycle(words), count)]
    if tokens:
        tokens[-1] = tokens[-1][:-1]
        if script.size is not None:
            tokens = _sized(tokens, script.size)
    return tokens, "stop" if count == wanted else "length"


def _sized(tokens: list[str], size: int) -> list[str]:
    """As many tokens, `size` bytes of text altogether."""
    each, more = divmod(size, len(tokens))
    return ["x" * (each + (number < more)) for number in range(len(tokens))]
