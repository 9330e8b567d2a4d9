"""`nexus keys`: API keys for people and programs."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from difflib import get_close_matches
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer

from cli import options
from cli.errors import ConsoleError
from cli.gateway_client import find_target
from cli.operations import fetch_list, show
from cli.stack.data_dir import data_dir_from

if TYPE_CHECKING:
    from cli.tables import RenderableType

app = typer.Typer(help="API keys for people and programs.")

PATH = "/v1/keys"
ID_PREFIX = "key_"
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}


class KeyScopeOption(StrEnum):
    """What a key is for. The same as schemas.keys.Scope, which needs pydantic; a test compares them."""

    INFERENCE = "inference"
    JOBS = "jobs"
    ADMIN = "admin"


def seconds(text: str) -> int:
    """`30d`, `12h`, `45m`, `90s`, `2w` in seconds. Raises BadParameter."""
    match = re.fullmatch(r"([1-9][0-9]{0,8})([smhdw])", text.strip().lower())
    if match is None:
        raise typer.BadParameter(f"{text!r} is no time like 90s, 45m, 12h, 30d or 2w")
    return int(match[1]) * UNITS[match[2]]


@app.callback(invoke_without_command=True)
def keys(
    ctx: typer.Context,
    url: options.Url = None,
    key: options.Key = None,
    key_file: options.KeyFile = None,
    data_dir: options.Data = None,
    as_json: options.Json = False,
) -> None:
    """The keys that were created; `nexus keys list` is the same."""
    if options.listing(ctx):
        list_keys(url, key, key_file, data_dir, as_json)


@app.command("list")
def list_keys(
    url: options.Url = None,
    key: options.Key = None,
    key_file: options.KeyFile = None,
    data_dir: options.Data = None,
    as_json: options.Json = False,
) -> None:
    """The keys that are not revoked. None is shown whole: only its last characters are."""
    with options.client(url, key, data_dir, key_file) as api:
        show(api, fetch_list(PATH), render_keys, as_json=as_json, watch=False)


@app.command("create")
def create_key(
    name: Annotated[str, typer.Argument(help="What the key is called.")],
    owner: Annotated[
        str | None,
        typer.Option(
            "--owner", help="Whose jobs and files it sees. Default: an owner of its own, called like the key."
        ),
    ] = None,
    scope: Annotated[
        list[KeyScopeOption] | None,
        typer.Option("--scope", help="What it is for; repeat it. Default: inference and jobs."),
    ] = None,
    max_queued: Annotated[
        int | None, typer.Option("--max-queued", min=0, help="Jobs that may wait at once. Default: no limit.")
    ] = None,
    max_running: Annotated[
        int | None, typer.Option("--max-running", min=1, help="Jobs that may run at once. Default: no limit.")
    ] = None,
    expires: Annotated[
        str | None, typer.Option("--expires", help="After 90s, 45m, 12h, 30d, 2w. Default: never.")
    ] = None,
    url: options.Url = None,
    key: options.Key = None,
    key_file: options.KeyFile = None,
    data_dir: options.Data = None,
    as_json: options.Json = False,
) -> None:
    """Make a key, and print it: it is shown now and never again."""
    body: dict[str, Any] = {"name": name}
    wanted = {
        "owner": owner,
        "scopes": [one.value for one in scope] if scope else None,
        "max_queued": max_queued,
        "max_running": max_running,
        "expires_in": seconds(expires) if expires is not None else None,
    }
    body |= {field: value for field, value in wanted.items() if value is not None}
    with options.client(url, key, data_dir, key_file) as api:
        answer = api.post(PATH, body)
    if as_json:
        print(json.dumps(answer))
        return
    print(f"{answer['name']} ({answer['id']}), for {', '.join(answer['scopes'])}, owner {answer['owner']}")
    print(f"key:            {answer['key']}")
    print(f"webhook secret: {answer['webhook_secret']}")
    print("Keep both: they are shown this once and cannot be shown again.")


@app.command("revoke")
def revoke_key(
    key_id: Annotated[
        str, typer.Argument(metavar="ID|NAME", help="The key's id, or its name where no other key has it.")
    ],
    url: options.Url = None,
    key: options.Key = None,
    key_file: options.KeyFile = None,
    data_dir: options.Data = None,
    as_json: options.Json = False,
) -> None:
    """End a key for good, at every gateway."""
    with options.client(url, key, data_dir, key_file) as api:
        found = _meant(key_id, api.get(PATH)["data"])
        answer = api.delete(f"{PATH}/{quote(found['id'], safe='')}")
    print(json.dumps(answer) if as_json else _revoked(found))


def _revoked(key: dict[str, Any]) -> str:
    return f"{key['id']} ({key['name']}): revoked" if key["name"] else f"{key['id']}: revoked"


def _meant(wanted: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The key of that id, or the only one of that name. Raises ConsoleError."""
    found = [row for row in rows if row["id"] == wanted] or [row for row in rows if row["name"] == wanted]
    if not found and wanted.startswith(ID_PREFIX):
        return {"id": wanted, "name": ""}  # the gateway knows what became of it
    if not found:
        near = get_close_matches(wanted, [row["name"] for row in rows], n=1)
        meant = f" Did you mean '{near[0]}'?" if near else ""
        raise ConsoleError(
            f"no key has the id or name '{wanted}'.{meant} `nexus keys list` shows those that there are."
        )
    if len(found) > 1:
        which = "".join(f"\n  {row['id']}  owner {row['owner']}, …{row['hint']}" for row in found)
        raise ConsoleError(f"{len(found)} keys are called '{wanted}'; revoke one by its id:{which}")
    return found[0]


@app.command("webhook-secret")
def show_webhook_secret(
    url: options.Url = None,
    key: options.Key = None,
    key_file: options.KeyFile = None,
    data_dir: options.Data = None,
    as_json: options.Json = False,
) -> None:
    """What the webhooks of the bootstrap key's jobs are signed with: it follows from that key, and no gateway is asked."""
    from gateway.auth.authenticator import bootstrap_webhook_secret, is_created

    token = find_target(url, options.chosen_key(key, key_file), data_dir_from(data_dir)).key
    if not token:
        raise ConsoleError(
            "which key? Name a file that holds the bootstrap key with --key-file, or set GATEWAY_BEARER_TOKEN"
        )
    if is_created(token.encode()):
        raise ConsoleError("this key was created: its webhook secret was shown with it, and cannot be shown again")
    secret = bootstrap_webhook_secret(token)
    print(json.dumps({"webhook_secret": secret}) if as_json else secret)


def render_keys(answer: dict[str, Any]) -> RenderableType:
    """One line a key."""
    from cli.tables import Text, new_table, styled_state

    rows = answer["data"]
    if not rows:
        return Text("No key was created. Make one: nexus keys create NAME")
    lines = new_table("id", "name", "owner", "key", "scopes", "queued", "running", "expires", "state", ids=True)
    for row in rows:
        lines.add_row(
            Text(row["id"]),
            Text(row["name"]),
            Text(row["owner"]),
            Text(f"…{row['hint']}"),
            Text(", ".join(row["scopes"])),
            _limit(row["max_queued"]),
            _limit(row["max_running"]),
            "never"
            if row["expires_at"] is None
            else f"{datetime.fromtimestamp(row['expires_at'], UTC):%Y-%m-%d %H:%MZ}",
            styled_state(row["status"]),
        )
    return lines


def _limit(value: int | None) -> str:
    return "-" if value is None else str(value)
