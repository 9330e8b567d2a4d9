"""`nexus people` and `nexus login`: who signs in with a browser."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cli import options
from cli.errors import ConsoleError
from cli.gateway_client import ApiClient
from cli.resources import print_answer, record_path, resource_app

if TYPE_CHECKING:
    from cli.tables import RenderableType

PATH = "/v1/people"
GROUPS = "groups"
"""The value of an option that restores what a person's groups give."""
PersonArgument = Annotated[
    str, typer.Argument(metavar="PERSON", help="The person's id, address, name, or id at the provider.")
]


def render_people(answer: dict[str, Any]) -> RenderableType:
    """Return a table with a line for each person."""
    from cli.tables import Text, new_table

    lines = new_table("person", "name", "email", "role", "team", "status", "signed in", ids=True)
    for row in answer["data"]:
        signed_in = f"{datetime.fromtimestamp(row['signed_in_at'], UTC):%Y-%m-%d %H:%MZ}"
        cells = (row["id"], row["name"], row["email"], row["role"] or "none", row["team"], row["status"], signed_in)
        lines.add_row(*map(Text, cells))
    return lines


app = resource_app(
    PATH,
    render_people,
    help_text="People who sign in with the identity provider: roles, teams, sessions.",
    list_help="List everybody who has signed in, the last sign-in first.",
)


@app.command("set")
@options.gateway_command
def change_person(
    api: ApiClient,
    person: PersonArgument,
    *,
    role: Annotated[
        Literal["viewer", "member", "operator", "admin", "groups"] | None,
        typer.Option("--role", help="The role; `groups`: what the person's groups give."),
    ] = None,
    team: Annotated[
        str | None, typer.Option("--team", help="The team; `groups`: what the person's groups give.")
    ] = None,
    disabled: Annotated[
        bool | None, typer.Option("--disable/--enable", help="Keep the person out, or let the person in again.")
    ] = None,
    keys: Annotated[
        bool, typer.Option("--revoke-keys", help="With --disable: also revoke the keys that the person made.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Change a person's role, team or access, at once at every gateway."""
    body: dict[str, Any] = {
        name: None if value == GROUPS else value
        for name, value in (("role", role), ("team", team))
        if value is not None
    }
    body |= {} if disabled is None else {"disabled": disabled}
    body |= {"keys": "revoke"} if keys else {}
    if not body:
        raise ConsoleError("Nothing to change. Name at least one option; `nexus people set --help` lists them.")
    answer = api.patch(record_path(PATH, _find(api, person)), body)
    line = f"{answer['id']}: {answer['role'] or 'no role'}, team {answer['team']}, {answer['status']}"
    print_answer(answer, line, as_json=as_json)


@app.command("sign-out")
@options.gateway_command
def end_sessions(api: ApiClient, person: PersonArgument, *, as_json: options.Json = False) -> None:
    """End a person's sessions and the calls that are open in them. The person can sign in again."""
    answer = api.delete(f"{record_path(PATH, _find(api, person))}/sessions")
    print_answer(answer, f"{answer['id']}: signed out", as_json=as_json)


@options.gateway_command
def login(api: ApiClient, *, as_json: options.Json = False) -> None:
    """Print a link that signs in to this Nexus in a browser, once and within five minutes, with the rights of your key."""
    answer = api.post("/v1/login-links", {})
    print_answer(answer, answer["url"], as_json=as_json)


def _find(api: ApiClient, wanted: str) -> str:
    """Return the id of the only person with this id, address, name, or id at the provider. Raises ConsoleError."""
    rows = api.get(PATH)["data"]
    found = [row["id"] for row in rows if wanted in (row["id"], row["email"], row["name"], row["subject"])]
    if len(found) == 1:
        return str(found[0])
    if found:
        raise ConsoleError(f"'{wanted}' names {len(found)} people. Name one by its id: {', '.join(found)}")
    raise ConsoleError(f"Nobody is known as '{wanted}'. `nexus people list` shows everybody who has signed in.")
