"""The routes as a reference page, from the OpenAPI document."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

from backbone.settings import PUBLIC_ROUTES
from docs.generator.markdown import NOTICE, code, table
from gateway.app import make_app
from gateway.dependencies import Parts

JSON = dict[str, Any]
SUCCESSES = ("1", "2", "3")

OUTSIDE = """
## Start page

`GET /` answers browsers with a page that says what this is, whether it is ready, and how to call it, and other clients with the same as JSON.
It is not in the OpenAPI document.

## Console

[The console](../explanation/console.md) uses the routes of this page. Its files are public, hold no data, and are not in the OpenAPI document.

| route | does |
| --- | --- |
| `GET /ui` | Go to `/ui/` |
| `GET /ui/{path}` | Send a file of the console, or its page for the path of a screen |

## Pages of the sign-in

They are for browsers, and not in the OpenAPI document either. [Sign in](../how-to/sign-in.md) says how they are used.

| route | does |
| --- | --- |
| `GET /auth/login` | Show the ways to sign in, as a page or, for `Accept: application/json`, as JSON; `?with=openid` goes to the identity provider, and `next` is the path to which a sign-in leads |
| `POST /auth/login` | Sign in with an API key, from the page's form |
| `GET /auth/callback` | Sign in the person whom the identity provider sends back |
| `GET /auth/link` | Show the button of a sign-in link |
| `POST /auth/link` | Sign in with a link |
"""
INTRODUCTION = """
This page lists each route of the gateway. [HTTP](http.md) says what all of them have in common: keys, compression, headers,
errors. A running gateway serves the same as an interactive page at `/docs`, and as OpenAPI 3.1 with the schema of each body at
`/openapi.json`, both on its observability port.
"""


def document() -> JSON:
    """Return the OpenAPI document of a gateway that serves all of its routes."""
    app = make_app(cast("Parts", SimpleNamespace()), PUBLIC_ROUTES)
    return cast("JSON", json.loads(asyncio.run(app.state.document.of({}))))


def page() -> str:
    """Return docs/reference/routes.md."""
    api = document()
    parts = [
        "# Routes\n\n",
        NOTICE,
        INTRODUCTION,
    ]
    for tag in api["tags"]:
        operations = list(operations_of(api, tag["name"]))
        rows = [(f"`{method} {path}`", operation["summary"]) for method, path, operation in operations]
        parts += [f"\n## {tag['name'].capitalize()}\n\n{tag['description']}\n\n", table(["route", "does"], rows)]
        for method, path, operation in operations:
            parts += described(method, path, operation)
    return "".join(parts) + OUTSIDE


def operations_of(api: JSON, tag: str) -> Iterator[tuple[str, str, JSON]]:
    """Yield method, path and operation of each route with this tag, in the document's order."""
    for path, methods in api["paths"].items():
        for method, operation in methods.items():
            if tag in operation["tags"]:
                yield method.upper(), path, operation


def described(method: str, path: str, operation: JSON) -> list[str]:
    """Return the section of one route."""
    parts = [f"\n### {operation['summary']}\n\n`{method} {path}`\n\n{operation['description']}\n"]
    parameters = [one for one in operation.get("parameters", []) if "name" in one]
    if parameters:
        rows = [(code(one["name"]), one["in"], one.get("description", "")) for one in parameters]
        parts += ["\n", table(["parameter", "in", "meaning"], rows)]
    answers = operation["responses"]
    rows = [
        (status, answer["description"], ", ".join(map(code, answer.get("content", {}))))
        for status, answer in answers.items()
        if status.startswith(SUCCESSES)
    ]
    parts += ["\n", table(["status", "answer", "content"], rows)]
    errors = ", ".join(status for status in answers if not status.startswith(SUCCESSES))
    if errors:
        parts.append(f"\nErrors: {errors}.\n")
    return parts
