"""Read the queries of `GET /v1/audit` and of its export. Every wrong parameter is InvalidRequest with its name."""

from __future__ import annotations

import re
from dataclasses import dataclass

from backbone.ledger.audit_query import AuditQuery
from gateway.usage.query import (
    MAX_TIME,
    Parameters,
    read_names,
    read_number,
    read_one,
    read_time,
    read_values,
    require_known,
    require_order,
)
from schemas.audit import AuditResult
from schemas.errors import InvalidRequest

FILTERS = ("actor", "team", "key", "person", "target_type", "target", "target_team", "address", "request_id", "error")
"""The fields by which events can be filtered, each by equality."""
DEFAULT_LIMIT, MAX_LIMIT = 20, 1000
MAX_SEQUENCE = 2**53
_ACTION = re.compile(r"[a-z_]+\.([a-z_]+|\*)", re.ASCII)
_ID = re.compile(r"aud_[0-9a-f]{32}", re.ASCII)
_REQUEST_ID = re.compile(r"req_[0-9a-f]{24}", re.ASCII)
_COMMON = ("start", "end", "action", "result", *FILTERS)


@dataclass(frozen=True, slots=True)
class AuditPageRequest:
    """A checked query for a page."""

    query: AuditQuery
    after: str
    limit: int


def parse_page_request(parameters: Parameters) -> AuditPageRequest:
    """Return the query of `GET /v1/audit`. Raises InvalidRequest."""
    require_known(parameters, (*_COMMON, "after", "limit"))
    after = read_one(parameters, "after") or ""
    if after and not _ID.fullmatch(after):
        raise InvalidRequest(
            "'after' must be the id of an audit event: the 'last_id' of the page before.", param="after"
        )
    limit = read_number(parameters, "limit", DEFAULT_LIMIT, 1, MAX_LIMIT)
    return AuditPageRequest(_query(parameters), after, limit)


def parse_export_request(parameters: Parameters) -> tuple[AuditQuery, int]:
    """Return the query of `GET /v1/audit/export`, and the sequence behind which it begins. Raises InvalidRequest."""
    require_known(parameters, (*_COMMON, "after"))
    return _query(parameters), read_number(parameters, "after", 0, 0, MAX_SEQUENCE)


def _query(parameters: Parameters) -> AuditQuery:
    start = read_time(parameters, "start", 0)
    end = read_time(parameters, "end", MAX_TIME)
    require_order(start, end, "start", "end")
    actions = read_values(parameters, "action")
    for action in actions:
        if not _ACTION.fullmatch(action):
            raise InvalidRequest(
                "'action' must be a name such as key.create, or key.* for all about keys.", param="action"
            )
    request_id = read_one(parameters, "request_id")
    if request_id is not None and not _REQUEST_ID.fullmatch(request_id):
        raise InvalidRequest("'request_id' must be an 'x-request-id' of an answer.", param="request_id")
    return AuditQuery(
        start_ms=start * 1000,
        end_ms=end * 1000,
        filters={name: read_values(parameters, name) for name in FILTERS if name in parameters},
        actions=actions,
        results=tuple(AuditResult(name) for name in read_names(parameters, "result", tuple(AuditResult))),
    )
