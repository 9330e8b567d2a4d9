"""Options of `nexus keys` and `nexus teams` that set limits."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated, Any

import typer

from cli.errors import ConsoleError

UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}
UNITS = {"": 1, "k": 1024, "m": 1024**2, "g": 1024**3, "t": 1024**4}
LIMITS = (
    "models",
    "lanes",
    "requests_per_minute",
    "tokens_per_minute",
    "max_open",
    "max_queued",
    "max_running",
    "max_stored_bytes",
    "max_pending_bytes",
    "max_result_bytes",
    "max_batches",
    "max_webhooks",
    "networks",
    "retain",
)
"""A copy of schemas.keys.LIMITS without pydantic; a test compares the two."""
BYTE_LIMITS = {"max_stored_bytes", "max_pending_bytes", "max_result_bytes"}


class RetainOption(StrEnum):
    """What is kept of requests and answers."""

    NONE = "none"


Models = Annotated[
    list[str] | None,
    typer.Option("--model", help="Pattern of models that may be used, such as 'llama*'; may be repeated."),
]
Lanes = Annotated[
    list[str] | None,
    typer.Option("--lane", help="Lane that may be used: priority, default or flex; may be repeated."),
]
Requests = Annotated[int | None, typer.Option("--requests-per-minute", min=1, help="Most requests in a minute.")]
Tokens = Annotated[int | None, typer.Option("--tokens-per-minute", min=1, help="Most tokens in a minute.")]
Open = Annotated[int | None, typer.Option("--max-open", min=1, help="Most requests open at once, at each gateway.")]
Queued = Annotated[int | None, typer.Option("--max-queued", min=0, help="Most jobs that may wait at once.")]
Running = Annotated[int | None, typer.Option("--max-running", min=1, help="Most jobs that may run at once.")]
Stored = Annotated[
    str | None, typer.Option("--max-stored-bytes", help="Most bytes of stored files, such as 500000, 100M or 2G.")
]
Pending = Annotated[
    str | None,
    typer.Option(
        "--max-pending-bytes", help="Most bytes of bodies over 512 KiB of requests and jobs that have not ended."
    ),
]
Results = Annotated[
    str | None,
    typer.Option("--max-result-bytes", help="Most bytes of stored results; the oldest are deleted above it."),
]
Batches = Annotated[int | None, typer.Option("--max-batches", min=0, help="Most unfinished batches at once.")]
Webhooks = Annotated[
    int | None, typer.Option("--max-webhooks", min=1, help="Most webhooks sent at once, by each gateway.")
]
Networks = Annotated[
    list[str] | None,
    typer.Option("--network", help="Address or CIDR range that requests may come from; may be repeated."),
]
Retain = Annotated[
    RetainOption | None, typer.Option("--retain", help="'none': keep nothing of requests and answers once delivered.")
]
Expires = Annotated[str | None, typer.Option("--expires", help="Lifetime: 90s, 45m, 12h, 30d or 2w. Default: forever.")]
Unset = Annotated[
    list[str] | None,
    typer.Option(
        "--unset", metavar="LIMIT", help="Limit to remove, by its option's name, or 'expires'; may be repeated."
    ),
]


def fields(*values: Any) -> dict[str, Any]:
    """Return the fields of a request's body. `values`: in the order of `LIMITS`, then the lifetime."""
    *limits, expires = values
    body = {name: value for name, value in zip(LIMITS, limits, strict=True) if value is not None}
    for name in BYTE_LIMITS & body.keys():
        body[name] = parse_bytes(body[name])
    return body if expires is None else body | {"expires_in": parse_duration(expires)}


OPTION_FIELDS = {"model": "models", "lane": "lanes", "network": "networks", "expires": "expires_at"}


def unset_fields(names: list[str] | None) -> dict[str, None]:
    """Return the fields that remove limits. Raises ConsoleError for an unknown limit."""
    removed: dict[str, None] = {}
    for given in names or ():
        name = given.strip().lstrip("-").replace("-", "_")
        name = OPTION_FIELDS.get(name, name)
        if name not in (*LIMITS, "expires_at"):
            known = [*(field.replace("_", "-") for field in LIMITS), "expires"]
            raise ConsoleError(f"'{given}' is not a limit. Use one of: {', '.join(known)}.")
        removed[name] = None
    return removed


def parse_duration(text: str) -> int:
    """Return the seconds in a text like `30d`, `12h`, `45m`, `90s` or `2w`. Raises BadParameter."""
    match = re.fullmatch(r"([1-9][0-9]{0,8})([smhdw])", text.strip().lower())
    if match is None:
        raise typer.BadParameter(f"'{text}' is not a duration like 90s, 45m, 12h, 30d or 2w")
    return int(match[1]) * UNIT_SECONDS[match[2]]


def parse_bytes(text: str) -> int:
    """Return the bytes in a text like `500000`, `100M` or `2G`. Raises BadParameter."""
    match = re.fullmatch(r"([0-9]{1,15})([kmgt]?)b?", text.strip().lower())
    if match is None:
        raise typer.BadParameter(f"'{text}' is not a size like 500000, 100M or 2G")
    return int(match[1]) * UNITS[match[2]]


def describe(row: dict[str, Any]) -> str:
    """Return the limits of a key or a team in one line."""
    found = []
    for name in LIMITS:
        value = row.get(name)
        if value is not None:
            text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
            found.append(f"{name.removeprefix('max_').replace('_', ' ')}: {text}")
    return ", ".join(found) or "-"
