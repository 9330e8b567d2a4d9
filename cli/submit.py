"""`nexus submit`: any request as a job that goes on without its caller."""

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


def submit(
    endpoint: Annotated[
        str,
        typer.Argument(help="chat, completions, embeddings, images, edits, speech, …, or a path: /v1/images/edits."),
    ],
    file: Annotated[str | None, typer.Argument(help="The request as JSON; - for standard input.")] = None,
    *,
    files: Annotated[
        list[str] | None,
        typer.Option("--file", "-f", metavar="FIELD=PATH", help="A file to send with the request; may be repeated."),
    ] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="The model, whatever FILE says.")] = None,
    metadata: options.Metadata = None,
    tier: Annotated[str | None, typer.Option("--tier", help="The lane: priority, default or flex.")] = None,
    webhook: Annotated[str | None, typer.Option("--webhook", help="The URL to notify of the job's end.")] = None,
    timeout: Annotated[
        float | None, typer.Option("--timeout", help="Seconds after which the job expires, whatever it does.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Watch the job to its end.")] = False,
    output: Output = None,
    url: options.Url = None,
    key: options.Key = None,
    key_file: options.KeyFile = None,
    data_dir: options.Data = None,
    as_json: options.Json = False,
) -> None:
    """Submit a job, and print its id. -o and --wait stay with it to its end, as `nexus watch` does."""
    path = endpoint_path(endpoint)
    body = read_body(file, needed=not files)
    if model is not None:
        body["model"] = model
    stays = wait or output is not None
    if stays and not as_json and output is None and sys.stdout.isatty() and writes_text(path):
        body.setdefault("stream", True)  # so that there is something to see
    about: dict[str, Any] = {
        "metadata": dict(options.pairs(metadata, "--metadata")),
        "webhook": webhook and {"url": webhook},
    }
    about |= {"service_tier": tier, "timeout": timeout}
    about = {name: value for name, value in about.items() if value}
    with options.client(url, key, data_dir, key_file) as api:
        job = _submit_form(api, path, body, files, about) if files else _submit(api, path, body, about)
        if stays:
            raise typer.Exit(follow(api, job["id"], output=output, as_json=as_json))
    if as_json:
        print(json.dumps(job))
    else:
        print(job["id"])
        print(f"{job['status']}. To watch it: nexus watch {job['id']}", file=sys.stderr)


def endpoint_path(endpoint: str) -> str:
    """Return the path that a short name, or a path with or without its beginning, means."""
    from schemas.endpoints import ENDPOINTS

    name = endpoint.strip("/").removeprefix("v1/")
    return next((spec.path for spec in ENDPOINTS if spec.name == name), f"/v1/{name}")


def writes_text(path: str) -> bool:
    """Return whether the endpoint's answer can be shown while it is written."""
    from schemas.endpoints import BY_PATH

    return path in BY_PATH and BY_PATH[path].writes_text


def read_body(file: str | None, *, needed: bool) -> dict[str, Any]:
    """The JSON object in `file`; without a file an empty one, unless it is `needed`."""
    if file is None:
        if needed:
            raise ConsoleError("there is no request: name a FILE with its JSON, or - for standard input")
        return {}
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text()
        body = json.loads(text)
    except OSError as error:
        raise ConsoleError(f"cannot read {file}: {error.strerror}") from error
    except ValueError as error:
        raise ConsoleError(f"{file} is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise ConsoleError(f"{file} holds no JSON object")
    return body


def _submit(api: ApiClient, path: str, body: dict[str, Any], about: dict[str, Any]) -> dict[str, Any]:
    job: dict[str, Any] = api.post("/v1/jobs", {"endpoint": path, "body": body, **about})
    return job


def _submit_form(
    api: ApiClient, path: str, body: dict[str, Any], files: list[str], about: dict[str, Any]
) -> dict[str, Any]:
    """As a form, to the endpoint itself, which is asked to answer later. What a form cannot say takes stored files."""
    with contextlib.ExitStack() as stack:
        opened = [(field, _open(stack, name)) for field, name in options.pairs(files, "--file")]
        if set(about) <= {"service_tier"}:
            job: dict[str, Any] = api.post_form(path, _form({**body, **about}), opened, prefer="respond-async")
            return job
        ids: dict[str, list[str]] = {}
        for field, file in opened:
            stored = api.post_form("/v1/files", {"purpose": "user_data"}, [("file", file)])
            ids.setdefault(field.removesuffix("[]"), []).append(stored["id"])
    fields = {field: found if len(found) > 1 else found[0] for field, found in ids.items()}
    return _submit(api, path, {**body, **fields}, about)


def _open(stack: contextlib.ExitStack, name: str) -> tuple[str, IO[bytes]]:
    try:
        return Path(name).name, stack.enter_context(Path(name).open("rb"))
    except OSError as error:
        raise ConsoleError(f"cannot read {name}: {error.strerror}") from error


def _form(body: dict[str, Any]) -> dict[str, Any]:
    """A JSON object's fields as those of a form."""
    form: dict[str, Any] = {}
    for name, value in body.items():
        if isinstance(value, list):
            form[f"{name}[]"] = [_field(item) for item in value]
        elif value is not None:
            form[name] = _field(value)
    return form


def _field(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
