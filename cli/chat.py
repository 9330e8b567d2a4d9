"""`nexus chat`: talk to a model through a gateway."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import closing
from typing import Annotated, Any

import typer

from cli import options
from cli.errors import INTERRUPTED_EXIT_CODE, ConsoleError
from cli.gateway_client import ApiClient

PATH = "/v1/chat/completions"
USAGE = "Ctrl-C stops an answer, Ctrl-D ends the chat, /clear forgets the conversation."
ChatMessage = dict[str, str]


@options.gateway_command
def chat(
    api: ApiClient,
    model: Annotated[str | None, typer.Argument(help="The model. Default: the first one that can chat.")] = None,
    *,
    message: Annotated[
        str | None, typer.Option("--message", "-m", help="Send this message, print the answer and exit.")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="System message: instructions for the model.")] = None,
    stream: Annotated[bool, typer.Option("--stream/--no-stream", help="Print tokens as they arrive.")] = True,
) -> None:
    """Chat with a model: turn by turn, or a single message from --message or a pipe."""
    name = model or first_chat_model(api)
    history: list[ChatMessage] = [{"role": "system", "content": system}] if system else []
    if message is None and not sys.stdin.isatty():
        message = sys.stdin.read().strip()
        if not message:
            raise ConsoleError("Standard input holds no message. Pass --message TEXT.")
    if message is None:
        converse(api, name, history, stream=stream)
    else:
        ask_once(api, name, [*history, {"role": "user", "content": message}], stream=stream)


def first_chat_model(api: ApiClient) -> str:
    """Return the first model that can chat. A key that may not list workers gets the first model of all."""
    try:
        workers = api.get("/v1/workers")["data"]
    except ConsoleError:
        workers = []
    for worker in workers:
        for model in worker.get("models", []):
            if "chat" in model.get("capabilities", []):
                return str(model["name"])
    models = api.get("/v1/models")["data"]
    if not models:
        raise ConsoleError(
            "The gateway has no model: no worker is ready. `nexus workers` shows the workers; "
            "`nexus worker --backend KIND --url URL` starts one."
        )
    return str(models[0]["id"])


def stream_answer(api: ApiClient, model: str, messages: list[ChatMessage], *, stream: bool) -> Generator[str]:
    """Yield the text of the answer as it arrives. Closing the generator stops the answer."""
    body: dict[str, Any] = {"model": model, "messages": messages}
    if not stream:
        yield api.post(PATH, body)["choices"][0]["message"].get("content") or ""
        return
    with closing(api.stream(PATH, {**body, "stream": True})) as frames:
        for frame in frames:
            for choice in frame.get("choices") or []:
                yield (choice.get("delta") or {}).get("content") or ""


def ask_once(api: ApiClient, model: str, messages: list[ChatMessage], *, stream: bool) -> None:
    """Print one answer. Ctrl-C stops it."""
    text = ""
    try:
        with closing(stream_answer(api, model, messages, stream=stream)) as pieces:
            for piece in pieces:
                text += piece
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print()
        raise typer.Exit(INTERRUPTED_EXIT_CODE) from None
    finally:
        if text and not text.endswith("\n"):
            print(flush=True)


def converse(api: ApiClient, model: str, history: list[ChatMessage], *, stream: bool) -> None:
    """Chat turn by turn until Ctrl-D. A failed turn is not part of the history; a stopped answer is."""
    _enable_line_editing()
    print(f"{model} at {api.target.url}. {USAGE}")
    beginning = list(history)
    while True:
        try:
            text = input("\n> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("  (Ctrl-D ends the chat)", end="")
            continue
        if text == "/clear":
            history[:] = beginning
        elif text:
            _take_turn(api, model, history, text, stream=stream)


def _take_turn(api: ApiClient, model: str, history: list[ChatMessage], text: str, *, stream: bool) -> None:
    messages = [*history, {"role": "user", "content": text}]
    answer = ""
    try:
        with closing(stream_answer(api, model, messages, stream=stream)) as pieces:
            for piece in pieces:
                answer += piece
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(" (stopped)", end="")
    except ConsoleError as error:
        print(f"\n{error}" if answer else str(error), file=sys.stderr)
        return
    print()
    if answer:
        history[:] = [*messages, {"role": "assistant", "content": answer}]


def _enable_line_editing() -> None:
    """Let `input` edit its line and recall earlier ones, where Python was built with readline."""
    try:
        import readline  # noqa: F401
    except ImportError:
        return
