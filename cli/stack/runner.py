"""A stack in its terminal: come up in sight of the user, say how to use it, stay until a signal, go."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shlex
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from cli.environment import format_exports
from cli.stack.data_dir import DataDir, data_dir_from
from cli.stack.detached import is_detached, tell_ready
from cli.stack.display import StackDisplay
from cli.stack.stack import Stack, StackOptions, StackStartError

QUESTION = "What is gravity?"
SENTENCE = "The quick brown fox jumps over the lazy dog."
SOUND = "hello.wav"


async def run_stack(chosen: StackOptions, data: DataDir, screen: StackDisplay, children_lock: int) -> int:
    """Bring the stack up, keep it until a signal, take it down. Returns the exit code."""
    asked = asyncio.Event()
    force = on_signals(asked)
    stack = Stack(chosen, data, screen, children_lock)
    force.append(stack.kill)
    screen.open()
    starting = asyncio.create_task(stack.start())
    waiting = asyncio.create_task(asked.wait())
    code = 0
    try:
        await asyncio.wait((starting, waiting), return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            screen.close()
            _greet(screen, chosen, welcome(chosen, data, await served(stack), stack.titles, detached=is_detached()))
            await waiting
        screen.close()
        screen.say("Stopping…")
    except StackStartError as error:
        screen.close()
        screen.say(f"{error}\nNexus did not come up. All logs: {data.logs}")
        code = 1
    finally:
        for task in (starting, waiting):
            task.cancel()
        await asyncio.gather(starting, waiting, return_exceptions=True)
        await stack.stop()
    if code == 0:
        screen.say("Stopped.")
    return code


def _greet(screen: StackDisplay, chosen: StackOptions, text: str) -> None:
    """Say how to use it. A log holds no key: the detached stack's goes to the command that has started it."""
    if is_detached():
        tell_ready(text)
        screen.note(f"Nexus is up at {chosen.url}")
    else:
        screen.say(text)


def on_signals(asked: asyncio.Event) -> list[Callable[[], None]]:
    """The first Ctrl-C, SIGTERM or lost terminal asks for the end; a second one forces it, by what the returned list holds then."""
    loop = asyncio.get_running_loop()
    force: list[Callable[[], None]] = []

    def ask() -> None:
        if asked.is_set():
            for kill in force:
                kill()
        asked.set()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number is signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
            continue  # nohup: the terminal may go
        loop.add_signal_handler(number, ask)
    return force


async def served(stack: Stack) -> list[dict[str, Any]]:
    """The workers as the gateway sees them; none when it does not answer just now."""
    with contextlib.suppress(httpx.HTTPError, ValueError, KeyError):
        return await stack.workers()
    return []


def command(*, anywhere: bool = False) -> str:
    """How the user calls this program: `nexus` where that finds it, else its path; from `anywhere`, or from this folder."""
    path = Path(sys.executable).parent / "nexus"
    if shutil.which("nexus") or not path.exists():
        return "nexus"
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) and not anywhere else path)


def welcome(
    chosen: StackOptions, data: DataDir, workers: list[dict[str, Any]], titles: dict[str, str], *, detached: bool
) -> str:
    """What a user needs to begin, with a line to paste. `titles` says in words what each worker is."""
    nexus, where = command(), _where(data)
    ends = "Ctrl-C stops everything."
    if detached:
        ends = f"Read its logs with `{nexus} logs -f{where}`.\n`{nexus} down{where}` stops everything."
    models = [(model, titles.get(worker["id"], worker["id"])) for worker in workers for model in worker["models"]]
    names = list(dict.fromkeys(f"{model['name']} ({title})" for model, title in models))
    lines = [
        "",
        "Nexus is up.",
        "",
        f"  URL     {chosen.url}/v1",
        f"  Key     {chosen.key}",
        f"  Models  {', '.join(names) or 'none yet'}",
        f"  Logs    {data.logs}",
        f"  Docs    {chosen.observability_url}/docs",
        f"  Metrics {chosen.observability_url}/metrics{_more_metrics(chosen)}",
        "",
        "For OpenAI's SDKs, and most programs that use them:",
        "",
        format_exports(chosen.url, chosen.key),
        "",
        *_try_it(chosen, [model for model, _ in models]),
        "",
        "Join another worker, from any terminal of yours:",
        (
            f"  . {shlex.quote(str(data.environment_file('worker')))} && "
            f"{shlex.quote(command(anywhere=True))} worker --backend KIND --url URL"
        ),
        "",
        f"Talk to it with `{nexus} chat{where}`, watch it with `{nexus} status{where}`. {ends}",
        "",
    ]
    return "\n".join(lines)


def _where(data: DataDir) -> str:
    """The flag that other commands need here to find the data directory, if any."""
    return "" if data_dir_from(None).root == data.root else f" --data-dir {shlex.quote(str(data.root))}"


def _more_metrics(chosen: StackOptions) -> str:
    """Each gateway process counts for itself, on a port of its own."""
    last = chosen.observability_port + chosen.gateways - 1
    return f" (and on the ports up to {last}, one for each gateway)" if chosen.gateways > 1 else ""


def _try_it(chosen: StackOptions, models: list[dict[str, Any]]) -> list[str]:
    """A request for each thing that can be done here; without any, the list of models."""
    first = {what: model["name"] for model in reversed(models) for what in model["capabilities"]}
    bearer = shlex.quote(f"Authorization: Bearer {chosen.key}")
    lines = []
    if "chat" in first:
        body = {"model": first["chat"], "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 50}
        lines.append(f"{_curl(chosen, 'chat/completions', bearer)} {_json(body)}")
    if "speech" in first:
        body = {"model": first["speech"], "voice": "alloy", "input": SENTENCE, "response_format": "wav"}
        lines.append(f"{_curl(chosen, 'audio/speech', bearer)} {_json(body)} -o {SOUND}")
    if "transcriptions" in first:
        form = f"-F {shlex.quote('model=' + first['transcriptions'])} -F file=@{SOUND}"
        lines.append(f"{_curl(chosen, 'audio/transcriptions', bearer)} {form}")
    if "embeddings" in first:
        body = {"model": first["embeddings"], "input": SENTENCE}
        lines.append(f"{_curl(chosen, 'embeddings', bearer)} {_json(body)}")
    lines = lines or [_curl(chosen, "models", bearer)]
    return ["Try it:", *(line for one in lines for line in ("", one))]


def _curl(chosen: StackOptions, path: str, bearer: str) -> str:
    return f"curl {chosen.url}/v1/{path} -H {bearer}"


def _json(body: dict[str, Any]) -> str:
    said = shlex.quote(json.dumps(body, ensure_ascii=False))
    return f"-H 'Content-Type: application/json' -d {said}"
