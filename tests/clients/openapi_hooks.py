"""What schemathesis is told of Nexus: `SCHEMATHESIS_HOOKS` names this module."""

from __future__ import annotations

import json
import os
import re
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

import schemathesis
from schemathesis.core.failures import Failure
from schemathesis.specs.openapi.checks import positive_data_acceptance

from schemas.submission import PUBLIC_URL
from tests.clients.openapi_fuzz import WORKER

THERE: dict[str, str] = json.loads(os.environ.get("NEXUS_FUZZ_IDS", "{}"))
EXAMPLE = "0" * 31 + "1"
MAX_QUERY = 60_000
NO_SCHEMA_SAYS = {
    r"holds a URL or a path, which Nexus never passes to a backend": "fields that Nexus does not know reach servers, which must fetch nothing",
    r"^The request names no model, and there is no default\. Set 'model' to one of": "a default model exists where one model can do it",
    r"is an alias\. Use the names of its models": "depends on the aliases that there are",
    r"is a target of the alias|is the name of a model, and requests for it": "depends on aliases and models",
    r"owns jobs and files already|^The team has ": "depends on the keys that there are",
    r"^There is a team ": "depends on the teams that there are",
    r"^Keys are revoked only of a person who is disabled|^Make the link with an API key": "depends on another field, or on the caller",
    r"^must be an IP address or a range": "no format of JSON Schema is a network",
    r"^must be printable, with at most 8 '\*'": "no portable pattern names printable characters",
    r"^'start' must be before 'end'": "depends on another field, and on the clock",
    r"^'(created|finished)_from' must be before|^'min_duration' must not be above": "depends on another field",
    r"^Set either 'ids'|^Name the team of the jobs|^'team' goes with 'ids'|^Name the batch's team": "depends on another field",
    r"^The parameter '.*' does not exist|is no filter|' must be |' is too long|^The filter must have the form": "filters in a body are as those in a query",
    r"^Budgets need the usage ledger|^A budget of cost needs a price list": "depends on the gateway's settings",
    r"^must be a whole number of tokens|^may hold one budget for each": "depends on another field, or budget",
    r"^Set either 'expires_in' or 'expires_at'|^'expires_at' lies in the past": "depends on another field, and on the clock",
    r"^Only a failed job can be retried": "depends on the job",
    r"^Only a response created with 'background' can be cancelled": "depends on the response",
    r"^The name in the body differs from the name in the path": "depends on the path",
    r"^The batch has already ended as \w+": "depends on the batch",
    r"^The input file has the purpose": "depends on the file",
    r"is not an input item of this response": "depends on the response",
    r"^The job was cancelled|^The job expired": "depends on the job",
    r"^A background response must be stored": "depends on another field",
    r"^'text_1' has \d+ texts and 'text_2' has": "depends on another field",
    r"nested deeper than 100 levels": "no schema bounds depth",
    r"^'text\.format\.type' must be|^A format of type json_schema needs": "formats are objects of OpenAI's, which grow",
    r"^Tool choices of type|'tool_choice|^A function needs a name|^Tools of type": "tools are objects of OpenAI's, which grow",
    r"^The custom_id '[\w-]+' occurs twice": "depends on the other requests",
    r"'(?:messages|tools)\.\d+\.|'system\.\d+|^A system prompt holds|^'output_config|^A format needs": "blocks and tools are objects of Anthropic's, which grow",
    r"'input\.\d+|^Input items of type|^Only text parts are supported here|^Content of type|^An image needs": "input items are objects of OpenAI's, which grow",
}
"""Why a body that the schema allows may be 400, by the error's message."""


@schemathesis.check
def accepts_what_the_document_allows(ctx: Any, response: Any, case: Any) -> bool | None:
    """`positive_data_acceptance`, but for `NO_SCHEMA_SAYS`."""
    try:
        return bool(positive_data_acceptance(ctx, response, case))
    except Failure:
        of_server = "x-nexus-job-id" in response.headers or case.operation.path == "/v1/jobs/{job_id}/result"
        if response.status_code == 400 and of_server:
            return None  # the server's own refusal: servers and models differ in what they can do
        message = response.json()["error"]["message"] if response.status_code == 400 else ""
        if any(re.search(pattern, message) for pattern in NO_SCHEMA_SAYS):
            return None
        raise


def _use_what_is_there(case: Any) -> None:
    """Put ids that lead somewhere in the place of the document's examples, which lead nowhere."""
    path = case.operation.path
    base = next((base for base in THERE if path.startswith(base)), "")
    for name, value in case.path_parameters.items():
        if base and isinstance(value, str) and value.endswith(EXAMPLE):
            case.path_parameters[name] = THERE[base]
    if path == "/v1/batches" and isinstance(case.body, dict) and str(case.body.get("input_file_id")).endswith(EXAMPLE):
        case.body["input_file_id"] = THERE["/v1/files/"]
    if base == "/v1/results/" and case.meta is not None and case.meta.generation.mode.is_positive:
        url = urlsplit(THERE[base])
        case.path_parameters["name"] = url.path.removeprefix(base)
        case.query = dict(parse_qsl(url.query))


@schemathesis.hook
def filter_case(_context: Any, case: Any) -> bool:
    """Leave out requests whose line alone is larger than all headers may be: they are 431, whatever they hold."""
    return len(urlencode(case.query or {}, doseq=True)) < MAX_QUERY


@schemathesis.hook
def before_call(_context: Any, case: Any, _kwargs: Any) -> None:
    """Keep the run on this machine, and its only worker at work."""
    body = case.body
    if case.operation.path == "/v1/jobs" and isinstance(body, dict) and isinstance(body.get("webhook"), dict):
        url = body["webhook"].get("url")
        if isinstance(url, str) and re.fullmatch(PUBLIC_URL, url):
            body["webhook"]["url"] = "https://hooks.invalid/"  # a name that nobody can have
    _use_what_is_there(case)
    if case.operation.path.endswith("/drain") and case.path_parameters.get("worker_id") == WORKER:
        case.path_parameters["worker_id"] = "w0"
