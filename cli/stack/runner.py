"""Run a stack in a terminal: start it, print how to use it, wait for a signal, and stop it."""

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

from cli.stack.data_dir import DataDir, data_dir_from
from cli.stack.detached import is_detached, report_ready
from cli.stack.display import StackDisplay
from cli.stack.environment import format_exports
from cli.stack.stack import LocalStack, StackOptions, StackStartError

EXAMPLE_QUESTION = "What is gravity?"
EXAMPLE_SENTENCE = "The quick brown fox jumps over the lazy dog."
EXAMPLE_AUDIO_FILE = "hello.wav"


async def run_stack(chosen: StackOptions, data: DataDir, display: StackDisplay, children_lock: int) -> int:
    """Start the stack, run it until a signal, and stop it. Returns the exit code."""
    stop_requested = asyncio.Event()
    force_stop = handle_signals(stop_requested)
    stack = LocalStack(chosen, data, display, children_lock)
    force_stop.append(stack.kill)
    display.open()
    starting = asyncio.create_task(stack.start())
    waiting = asyncio.create_task(stop_requested.wait())
    code = 0
    try:
        await asyncio.wait((starting, waiting), return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            display.close()
            _print_welcome(
                display, chosen, welcome(chosen, data, await fetch_workers(stack), stack.titles, detached=is_detached())
            )
            await waiting
        display.close()
        display.print("Stopping…")
    except StackStartError as error:
        display.close()
        display.print(f"{error}\nNexus could not start. All logs: {data.logs}")
        code = 1
    finally:
        for task in (starting, waiting):
            task.cancel()
        await asyncio.gather(starting, waiting, return_exceptions=True)
        await stack.stop()
    if code == 0:
        display.print("Stopped.")
    return code


def _print_welcome(display: StackDisplay, chosen: StackOptions, text: str) -> None:
    """Print how to use the stack. A detached stack sends it to its starting command: a log must not hold the key."""
    if is_detached():
        report_ready(text)
        display.note(f"Nexus is up at {chosen.url}")
    else:
        display.print(text)


def handle_signals(stop_requested: asyncio.Event) -> list[Callable[[], None]]:
    """Set the event at the first Ctrl-C, SIGTERM or SIGHUP. Later signals call the functions in the returned list."""
    loop = asyncio.get_running_loop()
    force_stop: list[Callable[[], None]] = []

    def request_stop() -> None:
        if stop_requested.is_set():
            for kill in force_stop:
                kill()
        stop_requested.set()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number is signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
            continue  # by nohup or --detach: the stack outlives its terminal
        loop.add_signal_handler(number, request_stop)
    return force_stop


async def fetch_workers(stack: LocalStack) -> list[dict[str, Any]]:
    """Return the gateway's list of workers; empty if the gateway does not answer."""
    with contextlib.suppress(httpx.HTTPError, ValueError, KeyError):
        return await stack.workers()
    return []


def own_command(*, anywhere: bool = False) -> str:
    """Return how the user calls this program: `nexus` if PATH has it, else its path, absolute with `anywhere`."""
    path = Path(sys.executable).parent / "nexus"
    if shutil.which("nexus") or not path.exists():
        return "nexus"
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) and not anywhere else path)


def welcome(
    chosen: StackOptions, data: DataDir, workers: list[dict[str, Any]], titles: dict[str, str], *, detached: bool
) -> str:
    """Return the welcome text: URL, key, models and commands to paste. `titles` describes each worker."""
    nexus, flag = own_command(), _data_dir_flag(data)
    how_to_stop = "Ctrl-C stops everything."
    if detached:
        how_to_stop = f"Read its logs with `{nexus} logs -f{flag}`.\n`{nexus} down{flag}` stops everything."
    models = [(model, titles.get(worker["id"], worker["id"])) for worker in workers for model in worker["models"]]
    names = list(dict.fromkeys(f"{model['name']} ({title})" for model, title in models))
    lines = [
        "",
        "Nexus is up.",
        "",
        f"  URL     {chosen.url}/v1",
        f"  Key     {chosen.key}",
        f"  Console {chosen.url}/ui (sign in with the key)",
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
            f"{shlex.quote(own_command(anywhere=True))} worker --backend KIND --url URL"
        ),
        "",
        f"Talk to it with `{nexus} chat{flag}`, watch it with `{nexus} status{flag}`. {how_to_stop}",
        "",
    ]
    return "\n".join(lines)


def _data_dir_flag(data: DataDir) -> str:
    """Return the flag with which other commands find the data directory; empty if they need none."""
    return "" if data_dir_from(None).root == data.root else f" --data-dir {shlex.quote(str(data.root))}"


def _more_metrics(chosen: StackOptions) -> str:
    """Return a note on further ports: each gateway process has its own metrics and port."""
    last = chosen.observability_port + chosen.gateways - 1
    return f" (and on the ports up to {last}, one for each gateway)" if chosen.gateways > 1 else ""


def _try_it(chosen: StackOptions, models: list[dict[str, Any]]) -> list[str]:
    """Return a curl command for each capability of the models; without any, one that lists the models."""
    first = {capability: model["name"] for model in reversed(models) for capability in model["capabilities"]}
    bearer = shlex.quote(f"Authorization: Bearer {chosen.key}")
    lines = []
    if "chat" in first:
        body = {"model": first["chat"], "messages": [{"role": "user", "content": EXAMPLE_QUESTION}], "max_tokens": 50}
        lines.append(f"{_curl(chosen, 'chat/completions', bearer)} {_json_arguments(body)}")
    if "speech" in first:
        body = {"model": first["speech"], "voice": "alloy", "input": EXAMPLE_SENTENCE, "response_format": "wav"}
        lines.append(f"{_curl(chosen, 'audio/speech', bearer)} {_json_arguments(body)} -o {EXAMPLE_AUDIO_FILE}")
    if "transcriptions" in first:
        form = f"-F {shlex.quote('model=' + first['transcriptions'])} -F file=@{EXAMPLE_AUDIO_FILE}"
        lines.append(f"{_curl(chosen, 'audio/transcriptions', bearer)} {form}")
    if "embeddings" in first:
        body = {"model": first["embeddings"], "input": EXAMPLE_SENTENCE}
        lines.append(f"{_curl(chosen, 'embeddings', bearer)} {_json_arguments(body)}")
    lines = lines or [_curl(chosen, "models", bearer)]
    return ["Try it:", *(line for one in lines for line in ("", one))]


def _curl(chosen: StackOptions, path: str, bearer: str) -> str:
    return f"curl {chosen.url}/v1/{path} -H {bearer}"


def _json_arguments(body: dict[str, Any]) -> str:
    text = shlex.quote(json.dumps(body, ensure_ascii=False))
    return f"-H 'Content-Type: application/json' -d {text}"
