"""The reference adapter, without a server: it answers with the request's own text, with delays and failures on request.

Tests, benchmarks and `nexus up --no-local-models` use it. Chat answers with the text of the last user message, completions with the prompt, word
by word; media.py describes the answers of all other endpoints.

Behavior, as options of the worker (`NAME=value`) or, for one request, as an object in the body's field `echo`
(`{"echo": {"delay_ms": 20, "fail": "mid"}}`; the body's wins):

| name | default | meaning |
|---|---|---|
| `first_delay_ms` | `delay_ms` | wait before the first token |
| `delay_ms` | 0 | wait before each further token |
| `tokens` | as many as the text has words | length of the answer; the text is repeated or cut |
| `size` | | bytes of text in the answer, spread evenly over its tokens |
| `batch` | 1 | tokens that come in one Chunk |
| `fail` | | see below |
| `fail_times` | 0: always | only a job's first N attempts on this worker fail |
| `slots` | 4 | options only: requests that run at once |
| `down` | false | options only: `discover` and `health` report that the server does not answer |

| `fail` | what happens |
|---|---|
| `before` | a transient BackendError before any output |
| `mid` | a transient BackendError after half of the tokens |
| `refuse` | BackendRefused: the request is invalid |
| `unavailable` | BackendUnavailable |
| `error` | a permanent BackendError |
| `crash` | an exception that is not a NexusError, after half of the tokens |
| `drop` | the answer ends after half of the tokens, without Finish |
| `hang` | no output |
| `hang_mid` | no output after half of the tokens |

`max_tokens` and `max_completion_tokens` cut the answer (`finish_reason: length`); `n` is honored. A form's field `echo` holds
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

from schemas.descriptors import ModelDescriptor
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
from workers.backends.echo.descriptors import descriptor
from workers.backends.echo.media import EMBEDDING_LENGTH, MEDIA, answer

JSON = dict[str, Any]

CHAT = "/v1/chat/completions"
INPUT_TOKENS = "/v1/chat/completions/input_tokens"
TEXT = (Capability.CHAT, Capability.COMPLETIONS)
REMEMBERED_JOBS = 4096
TOKENS_PER_TURN = 64
"""Tokens without a delay after which other tasks get their turn."""

Fail = Literal["", "before", "mid", "refuse", "unavailable", "error", "crash", "drop", "hang", "hang_mid"]


class EchoOptions(BaseModel):
    """The behavior of one request. See the module's docstring."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    first_delay_ms: float | None = Field(None, ge=0, le=3_600_000)
    delay_ms: float = Field(0.0, ge=0, le=3_600_000)
    tokens: int | None = Field(None, ge=0, le=100_000)
    size: int | None = Field(None, ge=0, le=64 * 1024 * 1024)
    batch: int = Field(1, ge=1)
    fail: Fail = ""
    fail_times: int = Field(0, ge=0)


class EchoServerOptions(EchoOptions):
    """The behavior of the whole worker."""

    slots: int = Field(4, ge=1)
    down: bool = False


class EchoBackend(Backend):
    """Answer requests without a server. See the module's docstring."""

    name = "echo"

    def __init__(self, config: BackendConfig) -> None:
        """Raise ValueError when an option is unknown or invalid."""
        super().__init__(config)
        self.server_options = EchoServerOptions.model_validate(config.options)
        self._default_options = EchoOptions.model_validate(self.server_options.model_dump(exclude={"slots", "down"}))
        self._models = config.models or ("echo",)
        self._attempts: OrderedDict[str, int] = OrderedDict()

    def requirements(self) -> tuple[Requirement, ...]:
        """Return the libraries that convert its audio and images."""
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
        return Discovery(offers, self.server_options.slots)

    def describe(self, _offer: ModelOffer) -> ModelDescriptor:
        """Return the parameters of every endpoint."""
        return descriptor()

    async def health(self) -> None:
        if self.server_options.down:
            raise BackendUnavailable("the echo backend is down, as its option says")

    async def run(self, task: Task) -> AsyncIterator[Output]:
        """Answer a request to any endpoint."""
        if task.model not in self._models:
            raise ModelNotServed(f"the backend does not have the model {task.model!r}", param="model")
        body = parse_json_object(task.body)
        options = self._request_options(body)
        fail = self._failure_of(task.job, options)
        if fail in ("before", "refuse", "unavailable", "error", "hang"):
            await _raise_failure(fail)
        if task.endpoint == INPUT_TOKENS:
            yield Chunk(_token_count(task, body), 0)
            yield Finish(Usage())
            return
        output = (
            _answer_text(task, body, options, fail) if task.capability in TEXT else _answer_media(task, options, fail)
        )
        async with aclosing(output):
            async for piece in output:
                yield piece

    def _request_options(self, body: JSON) -> EchoOptions:
        wanted = body.get("echo")
        if isinstance(wanted, str) and wanted.startswith("{"):
            wanted = parse_json_object(wanted.encode())
        if not isinstance(wanted, dict):
            return self._default_options  # OpenAI's own `echo` is a boolean
        try:
            return EchoOptions.model_validate(self._default_options.model_dump(exclude_unset=True) | wanted)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            place = ".".join(str(part) for part in ("echo", *first["loc"]))
            raise BackendRefused(f"{place}: {first['msg']}", param=place) from error

    def _failure_of(self, job: str, options: EchoOptions) -> Fail:
        """Return how this attempt fails; "" where it does not."""
        if not options.fail or not options.fail_times:
            return options.fail
        attempt = self._attempts[job] = self._attempts.pop(job, 0) + 1
        if len(self._attempts) > REMEMBERED_JOBS:
            self._attempts.popitem(last=False)
        return options.fail if attempt <= options.fail_times else ""


async def _raise_failure(fail: Fail) -> None:
    if fail in ("before", "mid"):
        raise BackendError(f"echo fails as requested ({fail})", transient=True)
    if fail == "refuse":
        raise BackendRefused("echo refuses as requested")
    if fail == "unavailable":
        raise BackendUnavailable("echo is unavailable as requested")
    if fail == "crash":
        raise RuntimeError("echo crashes as requested")
    if fail in ("hang", "hang_mid"):
        await asyncio.get_running_loop().create_future()
    raise BackendError("echo fails as requested (error)")


async def _answer_text(task: Task, body: JSON, options: EchoOptions, fail: Fail) -> AsyncGenerator[Output]:
    """Answer chat and text completions."""
    answer_text = _EchoAnswer(task, body, options)
    cut = max(1, answer_text.total // 2) if fail else None
    async for chunk in _pace_chunks(answer_text.stream() if task.stream else answer_text.whole(), options, cut):
        yield chunk
    if fail == "drop":
        return
    if fail:
        await _raise_failure(fail)
    tail = answer_text.tail()
    if tail:
        yield Chunk(tail, 0 if task.stream else answer_text.uncounted)
    yield Finish(answer_text.usage, "text/event-stream" if task.stream else "application/json")


class _CutShort(Exception):
    """The answer ends after half of its tokens."""


class _EchoPacer:
    """The pace that the options set, for answers that are not text."""

    def __init__(self, options: EchoOptions, fail: Fail) -> None:
        self.tokens = options.tokens
        self.size = options.size
        self._delay = options.delay_ms / 1000
        self._wait = self._delay if options.first_delay_ms is None else options.first_delay_ms / 1000
        self._failure_of = fail
        self._steps = 0

    async def step(self, total: int) -> None:
        """Wait before the next of `total` tokens. Raises _CutShort, or the requested failure, after half of them."""
        if self._failure_of and self._steps >= max(1, total // 2):
            if self._failure_of == "drop":
                raise _CutShort
            await _raise_failure(self._failure_of)
        self._steps += 1
        if self._wait:
            await asyncio.sleep(self._wait)
        self._wait = self._delay


async def _answer_media(task: Task, options: EchoOptions, fail: Fail) -> AsyncGenerator[Output]:
    with suppress(_CutShort):
        async with aclosing(answer(task, _EchoPacer(options, fail))) as outputs:
            async for output in outputs:
                if fail and isinstance(output, Finish):  # the answer had a single token
                    if fail == "drop":
                        return
                    await _raise_failure(fail)
                yield output


async def _pace_chunks(pieces: Iterator[Chunk], options: EchoOptions, cut: int | None) -> AsyncIterator[Chunk]:
    """Yield `pieces` at the requested pace, at most `cut` tokens of them."""
    delay = options.delay_ms / 1000
    wait = delay if options.first_delay_ms is None else options.first_delay_ms / 1000
    sent = 0
    for number, piece in enumerate(pieces, 1):
        if cut is not None and sent >= cut:
            return
        if wait:
            await asyncio.sleep(wait)
        elif number % TOKENS_PER_TURN == 0:
            await asyncio.sleep(0)
        wait = delay * piece.tokens
        sent += piece.tokens
        yield piece


class _EchoAnswer:
    """The answer to one request, as frames or as one body. Constant fields are encoded once."""

    def __init__(self, task: Task, body: JSON, options: EchoOptions) -> None:
        self._chat = task.endpoint == CHAT
        self._stream = task.stream
        self._batch = options.batch
        self._quiet = not (options.delay_ms or options.first_delay_ms)
        texts, prompt_tokens = _texts_to_echo(body, self._chat)
        limit = _limit(body)
        choices = [_words(text, options, limit) for text in texts for _ in range(requested_choices(body))]
        self._choices = choices
        self.total = sum(len(words) for words, _ in choices)
        self.uncounted = self.total
        """Tokens that no Chunk has counted."""
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
        """Yield a frame for each token, `batch` of them in a Chunk; the first of each choice has its role."""
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
        """Yield no data; with delays, an empty Chunk for each token."""
        if self._quiet:
            return
        for at in range(0, self.total, self._batch):
            count = min(self._batch, self.total - at)
            self.uncounted -= count
            yield Chunk(b"", count)

    def tail(self) -> bytes:
        """Return the bytes after the tokens."""
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


def _token_count(task: Task, body: JSON) -> bytes:
    _, tokens = _texts_to_echo(body, chat=True)
    answer = {"object": "chat.completion.input_tokens", "model": task.public_model, "input_tokens": tokens}
    return orjson.dumps(answer)


def _object(chat: bool, stream: bool) -> str:
    if not chat:
        return "text_completion"
    return "chat.completion.chunk" if stream else "chat.completion"


def _limit(body: JSON) -> int | None:
    for name in ("max_completion_tokens", "max_tokens"):
        if isinstance(body.get(name), int):
            return max(0, int(body[name]))
    return None


def _texts_to_echo(body: JSON, chat: bool) -> tuple[list[str], int]:
    """Return the texts to echo, one for each prompt, and the number of words in the request."""
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


def _words(text: str, options: EchoOptions, limit: int | None) -> tuple[list[str], str]:
    """Return the tokens of the answer, and its finish reason. Each token except the last ends in a space."""
    words = text.split(" ")
    wanted = len(words) if options.tokens is None else options.tokens
    count = wanted if limit is None else min(wanted, limit)
    tokens = [f"{word} " for word in islice(cycle(words), count)]
    if tokens:
        tokens[-1] = tokens[-1][:-1]
        if options.size is not None:
            tokens = _words_of_size(tokens, options.size)
    return tokens, "stop" if count == wanted else "length"


def _words_of_size(tokens: list[str], size: int) -> list[str]:
    """Return as many tokens with `size` bytes of text in total."""
    each, more = divmod(size, len(tokens))
    return ["x" * (each + (number < more)) for number in range(len(tokens))]
