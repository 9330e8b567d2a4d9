"""Options of `nexus keys` and `nexus teams` that set limits."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
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
    "budgets",
    "budget_webhook",
)
"""A copy of schemas.keys.LIMITS without pydantic; a test compares the two."""


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
Budgets = Annotated[
    list[str] | None,
    typer.Option(
        "--budget",
        metavar="UNIT=AMOUNT/PERIOD[@SHARE]",
        help="Most that may be used in a day, week or month: tokens=5000000/month, slot_seconds=3600/day or cost=25.5/week, "
        "with a warning at a share: cost=100/month@0.8; may be repeated.",
    ),
]
BudgetWebhook = Annotated[
    str | None, typer.Option("--budget-webhook", metavar="URL", help="URL that receives warnings of the budgets.")
]
Weight = Annotated[
    int | None,
    typer.Option(
        "--weight", min=1, max=100, help="Share of a queue, beside the weights of other teams that wait. Default: 1."
    ),
]
Expires = Annotated[str | None, typer.Option("--expires", help="Lifetime: 90s, 45m, 12h, 30d or 2w. Default: forever.")]
Unset = Annotated[
    list[str] | None,
    typer.Option(
        "--unset", metavar="LIMIT", help="Limit to remove, by its option's name, or 'expires'; may be repeated."
    ),
]


def _fields(
    *,
    models: Models = None,
    lanes: Lanes = None,
    requests: Requests = None,
    tokens: Tokens = None,
    max_open: Open = None,
    max_queued: Queued = None,
    max_running: Running = None,
    stored: Stored = None,
    pending: Pending = None,
    results: Results = None,
    batches: Batches = None,
    webhooks: Webhooks = None,
    networks: Networks = None,
    retain: Retain = None,
    budgets: Budgets = None,
    budget_webhook: BudgetWebhook = None,
    expires: Expires = None,
) -> dict[str, Any]:
    """Return the fields of a request's body that the options set."""
    found = {
        "models": models,
        "lanes": lanes,
        "requests_per_minute": requests,
        "tokens_per_minute": tokens,
        "max_open": max_open,
        "max_queued": max_queued,
        "max_running": max_running,
        "max_stored_bytes": None if stored is None else parse_bytes(stored),
        "max_pending_bytes": None if pending is None else parse_bytes(pending),
        "max_result_bytes": None if results is None else parse_bytes(results),
        "max_batches": batches,
        "max_webhooks": webhooks,
        "networks": networks,
        "retain": retain,
        "budgets": None if budgets is None else [parse_budget(text) for text in budgets],
        "budget_webhook": budget_webhook,
        "expires_in": None if expires is None else parse_duration(expires),
    }
    return {name: value for name, value in found.items() if value is not None}


def limit_command(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options that set limits in place of its parameter `limit_fields`, and pass it the fields of a body there."""
    options = inspect.signature(_fields, eval_str=True).parameters

    @functools.wraps(command)
    def run(*args: Any, **values: Any) -> Any:
        given = {name: values.pop(name) for name in options.keys() & values.keys()}
        return command(*args, limit_fields=_fields(**given), **values)

    signature = inspect.signature(command, eval_str=True)
    parameters: list[inspect.Parameter] = []
    for one in signature.parameters.values():
        parameters += options.values() if one.name == "limit_fields" else (one,)
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return run


OPTION_FIELDS = {
    "model": "models",
    "lane": "lanes",
    "network": "networks",
    "budget": "budgets",
    "expires": "expires_at",
}


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


def parse_budget(text: str) -> dict[str, Any]:
    """Return the budget in a text like `tokens=5000000/month` or `cost=100/month@0.8`. Raises BadParameter."""
    match = re.fullmatch(
        r"(tokens|slot_seconds|cost)=([0-9]{1,13}(?:\.[0-9]{1,9})?)/(day|week|month)(?:@([0-9.]{1,12}))?", text.strip()
    )
    try:
        if match is None:
            raise ValueError
        amount = float(match[2]) if "." in match[2] else int(match[2])
        budget: dict[str, Any] = {"unit": match[1], "amount": amount, "period": match[3]}
        return budget | ({"warn_at": float(match[4])} if match[4] else {})
    except ValueError:
        raise typer.BadParameter(
            f"'{text}' is not a budget like tokens=5000000/month, slot_seconds=3600/day or cost=100/month@0.8"
        ) from None


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
            text = " ".join(map(_text, value)) if isinstance(value, list) else str(value)
            found.append(f"{name.removeprefix('max_').replace('_', ' ')}: {text}")
    return ", ".join(found) or "-"


def _text(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    share = "" if value["warn_at"] is None else f"@{value['warn_at']}"
    return f"{value['unit']}={value['amount']}/{value['period']}{share}"
