"""`nexus chat`: talk to a model through a gateway."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import closing
from typing import Annotated, Any

import typer

from cli import options
from cli.errors import ConsoleError
from cli.gateway_client import ApiClient

PATH = "/v1/chat/completions"
HELP = "Ctrl-C stops an answer, Ctrl-D ends the chat, /clear forgets what was said."
Message = dict[str, str]


def chat(
    model: Annotated[str | None, typer.Argument(help="The model. Default: the first that is served.")] = None,
    *,
    message: Annotated[str | None, typer.Option("--message", "-m", help="Say this, print the answer, end.")] = None,
    system: Annotated[str | None, typer.Option("--system", help="Instructions before the chat.")] = None,
    stream: Annotated[bool, typer.Option("--stream/--no-stream", help="Show tokens as they come.")] = True,
    url: options.Url = None,
    key: options.Key = None,
    key_file: options.KeyFile = None,
    data_dir: options.Data = None,
) -> None:
    """Chat with a model: by turns, or once with --message or from a pipe."""
    with options.client(url, key, data_dir, key_file) as api:
        name = model or first_chat_model(api)
        history: list[Message] = [{"role": "system", "content": system}] if system else []
        if message is None and not sys.stdin.isatty():
            message = sys.stdin.read().strip()
            if not message:
                raise ConsoleError("there is nothing on standard input to ask; pass --message TEXT")
        if message is None:
            converse(api, name, history, stream=stream)
        else:
            ask_once(api, name, [*history, {"role": "user", "content": message}], stream=stream)


def first_chat_model(api: ApiClient) -> str:
    """The first model that can chat: by the workers where the key may see them, else simply the first."""
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
        raise ConsoleError("no model is served yet; `nexus workers` shows the workers")
    return str(models[0]["id"])


def answer_pieces(api: ApiClient, model: str, messages: list[Message], *, stream: bool) -> Generator[str]:
    """The answer's text, piece by piece. Closing the iterator stops the answer."""
    body: dict[str, Any] = {"model": model, "messages": messages}
    if not stream:
        yield api.post(PATH, body)["choices"][0]["message"].get("content") or ""
        return
    with closing(api.stream(PATH, {**body, "stream": True})) as frames:
        for frame in frames:
            for choice in frame.get("choices") or []:
                yield (choice.get("delta") or {}).get("content") or ""


def ask_once(api: ApiClient, model: str, messages: list[Message], *, stream: bool) -> None:
    """Print one answer. Ctrl-C stops it."""
    text = ""
    try:
        with closing(answer_pieces(api, model, messages, stream=stream)) as pieces:
            for piece in pieces:
                text += piece
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print()
        raise typer.Exit(130) from None
    finally:
        if text and not text.endswith("\n"):
            print(flush=True)


def converse(api: ApiClient, model: str, history: list[Message], *, stream: bool) -> None:
    """Turn by turn, until Ctrl-D. A failed or stopped turn is forgotten, the chat goes on."""
    _prepare_editing()
    print(f"{model} at {api.target.url}. {HELP}")
    opening = list(history)
    while True:
        try:
            said = input("\n> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("  (Ctrl-D ends the chat)", end="")
            continue
        if said == "/clear":
            history[:] = opening
        elif said:
            _turn(api, model, history, said, stream=stream)


def _turn(api: ApiClient, model: str, history: list[Message], said: str, *, stream: bool) -> None:
    asked = [*history, {"role": "user", "content": said}]
    text = ""
    try:
        with closing(answer_pieces(api, model, asked, stream=stream)) as pieces:
            for piece in pieces:
                text += piece
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(" (stopped)", end="")
    except ConsoleError as error:
        print(f"\n{error}" if text else str(error), file=sys.stderr)
        return
    print()
    if text:
        history[:] = [*asked, {"role": "assistant", "content": text}]


def _prepare_editing() -> None:
    """Line editing and history with the arrow keys, where Python has them."""
    try:
        import readline  # noqa: F401
    except ImportError:
        return
