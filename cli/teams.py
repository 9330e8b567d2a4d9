"""`nexus teams`: limits that the keys of one team share."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import limits, options
from cli.errors import ConsoleError
from cli.gateway_client import ApiClient
from cli.resources import add_remove_command, print_answer, record_path, resource_app

if TYPE_CHECKING:
    from cli.tables import RenderableType

PATH = "/v1/teams"
TeamArgument = Annotated[str, typer.Argument(metavar="TEAM", help="The team's id: the owner of its keys.")]


def render_teams(answer: dict[str, Any]) -> RenderableType:
    """Return a table with a line for each team."""
    from cli.tables import Text, new_table

    lines = new_table("team", "weight", "limits of its own", "expires", ids=True)
    for row in answer["data"]:
        end = row["expires_at"]
        expires = "never" if end is None else f"{datetime.fromtimestamp(end, UTC):%Y-%m-%d %H:%MZ}"
        lines.add_row(Text(row["id"]), Text(str(row["weight"])), Text(limits.describe(row)), Text(expires))
    return lines


app = resource_app(
    PATH,
    render_teams,
    help_text="Teams: limits that the keys of one team share.",
    list_help="List the teams with the limits that were set for them. The gateway's settings hold the others.",
)


@app.command("create")
@options.gateway_command
@limits.limit_command
def create_team(
    api: ApiClient,
    team: TeamArgument,
    *,
    weight: limits.Weight = None,
    limit_fields: dict[str, Any],
    as_json: options.Json = False,
) -> None:
    """Create a team. Limits that are left out are those of the gateway's settings."""
    _print(api.post(PATH, {"id": team} | limit_fields | _weight(weight)), as_json=as_json)


@app.command("set")
@options.gateway_command
@limits.limit_command
def change_team(
    api: ApiClient,
    team: TeamArgument,
    *,
    weight: limits.Weight = None,
    limit_fields: dict[str, Any],
    unset: limits.Unset = None,
    as_json: options.Json = False,
) -> None:
    """Change a team's lifetime, weight or limits, for all its keys at once. Options that are left out stay as they are."""
    body = limits.unset_fields(unset) | limit_fields | _weight(weight)
    if not body:
        raise ConsoleError("Nothing to change. Name at least one option; `nexus teams set --help` lists them.")
    _print(api.patch(record_path(PATH, team), body), as_json=as_json)


def _weight(weight: int | None) -> dict[str, int]:
    return {} if weight is None else {"weight": weight}


def _print(answer: dict[str, Any], *, as_json: bool) -> None:
    print_answer(answer, f"{answer['id']}: {limits.describe(answer)}", as_json=as_json)
    if not as_json and answer.get("webhook_secret"):
        print(f"webhook secret: {answer['webhook_secret']}")
        print("Store it now: it cannot be shown again.")


add_remove_command(app, PATH, help_text="Remove a team that has no key.")
