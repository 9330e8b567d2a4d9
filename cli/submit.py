"""`nexus submit`: send a request as a job, which runs to its end without its caller."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import IO, Annotated, Any

import typer

from cli import options
from cli.errors import ConsoleError
from cli.gateway_client import ApiClient
from cli.watch import Output, follow

SHORT_NAMES = {
    "chat": "chat/completions",
    "images": "images/generations",
    "edits": "images/edits",
    "speech": "audio/speech",
    "transcriptions": "audio/transcriptions",
    "translations": "audio/translations",
}
"""Names of `schemas.endpoints` that differ from their paths, without its import of pydantic; a test compares them."""
STREAMED_TEXT_PATHS = ("/v1/chat/completions", "/v1/completions")
"""Endpoints whose text `--wait` can print while the job runs; a test compares them as well."""


@options.gateway_command
def submit(
    api: ApiClient,
    endpoint: Annotated[
        str,
        typer.Argument(
            help="chat, completions, embeddings, images, edits, speech, …, or a path such as /v1/images/edits."
        ),
    ],
    file: Annotated[str | None, typer.Argument(help="File with the request as JSON; `-` for standard input.")] = None,
    *,
    files: Annotated[
        list[str] | None,
        typer.Option("--file", "-f", metavar="FIELD=PATH", help="File to send with the request; may be repeated."),
    ] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="The model, in place of FILE's.")] = None,
    metadata: options.Metadata = None,
    tier: Annotated[str | None, typer.Option("--tier", help="Lane of the queue: priority, default or flex.")] = None,
    webhook: Annotated[str | None, typer.Option("--webhook", help="URL to call when the job ends.")] = None,
    timeout: Annotated[float | None, typer.Option("--timeout", help="Seconds after which the job expires.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Watch the job to its end.")] = False,
    output: Output = None,
    as_json: options.Json = False,
) -> None:
    """Submit a job, and print its id.

    With --wait or --output the command follows the job to its end, as `nexus watch` does.
    """
    path = endpoint_path(endpoint)
    body = read_body(file, required=not files)
    if model is not None:
        body["model"] = model
    follows = wait or output is not None
    if follows and not as_json and output is None and sys.stdout.isatty() and path in STREAMED_TEXT_PATHS:
        body.setdefault("stream", True)  # so that tokens can be printed as they arrive
    settings: dict[str, Any] = {
        "metadata": dict(options.pairs(metadata, "--metadata")),
        "webhook": webhook and {"url": webhook},
        "service_tier": tier,
        "timeout": timeout,
    }
    settings = {name: value for name, value in settings.items() if value}
    job = _submit_form(api, path, body, files, settings) if files else _submit(api, path, body, settings)
    if follows:
        raise typer.Exit(follow(api, job["id"], output=output, as_json=as_json))
    if as_json:
        print(json.dumps(job))
    else:
        print(job["id"])
        print(f"{job['status']}. To watch it: nexus watch {job['id']}", file=sys.stderr)


def endpoint_path(endpoint: str) -> str:
    """Return the path for a short name, or for a path with or without `/v1/`."""
    name = endpoint.strip("/").removeprefix("v1/")
    return f"/v1/{SHORT_NAMES.get(name, name)}"


def read_body(file: str | None, *, required: bool) -> dict[str, Any]:
    """Return the JSON object in `file`; without a file, an empty one unless it is `required`. Raises ConsoleError."""
    if file is None:
        if required:
            raise ConsoleError("No request is given. Name a FILE that holds its JSON, or `-` for standard input.")
        return {}
    source = "Standard input" if file == "-" else file
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text()
        body = json.loads(text)
    except OSError as error:
        raise ConsoleError(f"Cannot read {file}: {error.strerror}") from error
    except ValueError as error:
        raise ConsoleError(f"{source} is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise ConsoleError(f"{source} does not hold a JSON object")
    return body


def _submit(api: ApiClient, path: str, body: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    job: dict[str, Any] = api.post("/v1/jobs", {"endpoint": path, "body": body, **settings})
    return job


def _submit_form(
    api: ApiClient, path: str, body: dict[str, Any], files: list[str], settings: dict[str, Any]
) -> dict[str, Any]:
    """Submit a request with files.

    The form goes to the endpoint itself with `Prefer: respond-async`. Metadata, a webhook or a timeout do not fit in a
    form: the files are stored first then, and a JSON request names them.
    """
    with contextlib.ExitStack() as stack:
        opened = [(field, _open(stack, name)) for field, name in options.pairs(files, "--file")]
        if set(settings) <= {"service_tier"}:
            job: dict[str, Any] = api.post_form(path, _form({**body, **settings}), opened, prefer="respond-async")
            return job
        ids: dict[str, list[str]] = {}
        for field, file in opened:
            stored = api.post_form("/v1/files", {"purpose": "user_data"}, [("file", file)])
            ids.setdefault(field.removesuffix("[]"), []).append(stored["id"])
    fields = {field: found if len(found) > 1 else found[0] for field, found in ids.items()}
    return _submit(api, path, {**body, **fields}, settings)


def _open(stack: contextlib.ExitStack, name: str) -> tuple[str, IO[bytes]]:
    try:
        return Path(name).name, stack.enter_context(Path(name).open("rb"))
    except OSError as error:
        raise ConsoleError(f"Cannot read {name}: {error.strerror}") from error


def _form(body: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a JSON object as fields of a form."""
    form: dict[str, Any] = {}
    for name, value in body.items():
        if isinstance(value, list):
            form[f"{name}[]"] = [_field(item) for item in value]
        elif value is not None:
            form[name] = _field(value)
    return form


def _field(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
