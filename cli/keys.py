"""`nexus keys`: API keys of people and programs."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from difflib import get_close_matches
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import options
from cli.errors import ConsoleError
from cli.gateway_client import ApiClient, find_target
from cli.resources import print_answer, record_path, resource_app
from cli.stack.data_dir import data_dir_from

if TYPE_CHECKING:
    from cli.tables import RenderableType

PATH = "/v1/keys"
ID_PREFIX = "key_"
UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}


class KeyScopeOption(StrEnum):
    """Values of `--scope`: a copy of schemas.keys.Scope without pydantic; a test compares the two."""

    INFERENCE = "inference"
    JOBS = "jobs"
    ADMIN = "admin"


def render_keys(answer: dict[str, Any]) -> RenderableType:
    """Return a table with a line for each key."""
    from cli.tables import Text, new_table, styled_state

    rows = answer["data"]
    if not rows:
        return Text("There are no keys but the bootstrap key. Create one: nexus keys create NAME")
    lines = new_table("id", "name", "owner", "key", "scopes", "queued", "running", "expires", "state", ids=True)
    for row in rows:
        lines.add_row(
            Text(row["id"]),
            Text(row["name"]),
            Text(row["owner"]),
            Text(f"…{row['hint']}"),
            Text(", ".join(row["scopes"])),
            _format_limit(row["max_queued"]),
            _format_limit(row["max_running"]),
            _format_expiry(row["expires_at"]),
            styled_state(row["status"]),
        )
    return lines


def _format_limit(value: int | None) -> str:
    return "-" if value is None else str(value)


def _format_expiry(at: int | None) -> str:
    return "never" if at is None else f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%MZ}"


app = resource_app(
    PATH,
    render_keys,
    help_text="API keys of people and programs.",
    list_help="List the keys that are not revoked. Only the last characters of each key are shown.",
)


@app.command("create")
@options.gateway_command
def create_key(
    api: ApiClient,
    name: Annotated[str, typer.Argument(help="Name of the key.")],
    *,
    owner: Annotated[
        str | None,
        typer.Option(
            "--owner",
            help="Owner of the jobs and files that the key can see. Default: a new owner with the key's name.",
        ),
    ] = None,
    scope: Annotated[
        list[KeyScopeOption] | None,
        typer.Option("--scope", help="What the key may do; may be repeated. Default: inference and jobs."),
    ] = None,
    max_queued: Annotated[
        int | None, typer.Option("--max-queued", min=0, help="Most jobs that may wait at once. Default: no limit.")
    ] = None,
    max_running: Annotated[
        int | None, typer.Option("--max-running", min=1, help="Most jobs that may run at once. Default: no limit.")
    ] = None,
    expires: Annotated[
        str | None, typer.Option("--expires", help="Lifetime: 90s, 45m, 12h, 30d or 2w. Default: forever.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Create a key and print it. It cannot be shown again."""
    fields = {
        "owner": owner,
        "scopes": [one.value for one in scope] if scope else None,
        "max_queued": max_queued,
        "max_running": max_running,
        "expires_in": parse_duration(expires) if expires is not None else None,
    }
    answer = api.post(PATH, {"name": name} | {field: value for field, value in fields.items() if value is not None})
    if as_json:
        print(json.dumps(answer))
        return
    print(f"{answer['name']} ({answer['id']}), for {', '.join(answer['scopes'])}, owner {answer['owner']}")
    print(f"key:            {answer['key']}")
    print(f"webhook secret: {answer['webhook_secret']}")
    print("Store both now: they cannot be shown again.")


def parse_duration(text: str) -> int:
    """Return the seconds in a text like `30d`, `12h`, `45m`, `90s` or `2w`. Raises BadParameter."""
    match = re.fullmatch(r"([1-9][0-9]{0,8})([smhdw])", text.strip().lower())
    if match is None:
        raise typer.BadParameter(f"'{text}' is not a duration like 90s, 45m, 12h, 30d or 2w")
    return int(match[1]) * UNIT_SECONDS[match[2]]


@app.command("revoke")
@options.gateway_command
def revoke_key(
    api: ApiClient,
    key_id: Annotated[
        str, typer.Argument(metavar="ID|NAME", help="The key's id, or its name if no other key has this name.")
    ],
    *,
    as_json: options.Json = False,
) -> None:
    """Revoke a key at every gateway. It cannot be restored."""
    found = _find_key(key_id, api.get(PATH)["data"])
    label = f"{found['id']} ({found['name']})" if found["name"] else found["id"]
    print_answer(api.delete(record_path(PATH, found["id"])), f"{label}: revoked", as_json=as_json)


def _find_key(wanted: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the key with this id, or the only one with this name. Raises ConsoleError."""
    found = [row for row in rows if row["id"] == wanted] or [row for row in rows if row["name"] == wanted]
    if not found and wanted.startswith(ID_PREFIX):
        return {"id": wanted, "name": ""}  # the list leaves out revoked keys, and the gateway's answer says so
    if not found:
        near = get_close_matches(wanted, [row["name"] for row in rows], n=1)
        suggestion = f" Did you mean '{near[0]}'?" if near else ""
        raise ConsoleError(f"No key has the id or the name '{wanted}'.{suggestion} `nexus keys list` shows all keys.")
    if len(found) > 1:
        choices = "".join(f"\n  {row['id']}  owner {row['owner']}, …{row['hint']}" for row in found)
        raise ConsoleError(f"{len(found)} keys have the name '{wanted}'. Revoke one by its id:{choices}")
    return found[0]


@app.command("webhook-secret")
def show_webhook_secret(
    url: options.Url = None,
    key: options.Key = None,
    key_file: options.KeyFile = None,
    data_dir: options.Data = None,
    as_json: options.Json = False,
) -> None:
    """Print the webhook secret of the bootstrap key.

    It signs the webhooks of that key's jobs. It is derived from the key on this machine; no gateway is called.
    """
    from gateway.auth.authenticator import bootstrap_webhook_secret, is_created

    token = find_target(url, options.chosen_key(key, key_file), data_dir_from(data_dir)).key
    if not token:
        raise ConsoleError(
            "No key is given. Name a file that holds the bootstrap key with --key-file, or set GATEWAY_BEARER_TOKEN."
        )
    if is_created(token.encode()):
        raise ConsoleError(
            "This key was made by `nexus keys create`, which printed its webhook secret. It cannot be shown again."
        )
    secret = bootstrap_webhook_secret(token)
    print(json.dumps({"webhook_secret": secret}) if as_json else secret)
