"""The names of all actions, by route. Names never change: operators search for them."""

from __future__ import annotations

from collections.abc import Mapping

from schemas.endpoints import ENDPOINTS
from schemas.keys import Scope

KEY_REFUSED = "key.refused"
"""A request without a valid key, on any route."""

ACCESS_DENIED = "access.denied"
"""A request whose key or role does not allow it, on a route that is not administrative: 403."""

SESSION_BEGIN, SESSION_END = "session.begin", "session.end"
"""A person, or the user of a key, signs in or out with a browser. A refused sign-in is a `session.begin` too."""

ROUTES: Mapping[str, str] = {
    "GET /v1/workers": "worker.list",
    "POST /v1/workers/{worker_id}/drain": "worker.drain",
    "GET /v1/workers/{worker_id}/logs": "worker.read_log",
    "GET /v1/hosts": "host.list",
    "GET /v1/queues": "queue.list",
    "POST /v1/admin/jobs/{job_id}/lane": "job.change_lane",
    "GET /v1/queues/{model:path}/jobs": "queue.read",
    "POST /v1/queues/{model:path}/hold": "queue.hold",
    "POST /v1/queues/{model:path}/release": "queue.release",
    "GET /v1/overview": "overview.read",
    "GET /v1/overview/events": "overview.follow",
    "GET /v1/aliases": "alias.list",
    "PUT /v1/aliases/{alias:path}": "alias.set",
    "DELETE /v1/aliases/{alias:path}": "alias.delete",
    "GET /v1/services": "service.list",
    "PUT /v1/services/{name:path}": "service.set",
    "DELETE /v1/services/{name:path}": "service.delete",
    "GET /v1/dlq": "dead_letter.list",
    "GET /v1/dlq/{job_id}": "dead_letter.read",
    "POST /v1/dlq/{job_id}/replay": "dead_letter.replay",
    "DELETE /v1/dlq/{job_id}": "dead_letter.delete",
    "POST /v1/keys": "key.create",
    "GET /v1/keys": "key.list",
    "GET /v1/keys/{key_id}": "key.read",
    "PATCH /v1/keys/{key_id}": "key.change",
    "POST /v1/keys/{key_id}/rotate": "key.rotate",
    "DELETE /v1/keys/{key_id}": "key.revoke",
    "POST /v1/teams": "team.create",
    "GET /v1/teams": "team.list",
    "GET /v1/teams/{team_id:path}": "team.read",
    "PATCH /v1/teams/{team_id:path}": "team.change",
    "DELETE /v1/teams/{team_id:path}": "team.delete",
    "GET /v1/people": "person.list",
    "GET /v1/people/{person_id}": "person.read",
    "PATCH /v1/people/{person_id}": "person.change",
    "DELETE /v1/people/{person_id}/sessions": "person.end_sessions",
    "POST /v1/login-links": "login_link.create",
    "GET /v1/admin/jobs": "job.list",
    "GET /v1/admin/jobs/export": "job.export",
    "POST /v1/admin/jobs/bulk/cancel": "job.cancel_many",
    "POST /v1/admin/jobs/bulk/retry": "job.retry_many",
    "GET /v1/dead-letter-groups": "dead_letter.group",
    "POST /v1/dlq/bulk/replay": "dead_letter.replay_many",
    "POST /v1/dlq/bulk/delete": "dead_letter.delete_many",
    "GET /v1/admin/jobs/{job_id}": "job.read",
    "POST /v1/admin/jobs/{job_id}/cancel": "job.cancel",
    "GET /v1/usage": "usage.read",
    "GET /v1/budgets": "usage.read",
    "GET /v1/organization/usage/*": "usage.read",
    "GET /v1/organization/costs": "usage.read",
    "GET /v1/inspector/teams": "inspection.list",
    "PUT /v1/inspector/teams/{team_id:path}": "inspection.start",
    "DELETE /v1/inspector/teams/{team_id:path}": "inspection.stop",
    "GET /v1/inspector/requests": "inspection.read",
    "GET /v1/inspector/requests/{request_id}": "inspection.read",
    "GET /v1/logs": "log.read",
    "GET /v1/audit": "audit.read",
    "GET /v1/audit/export": "audit.export",
}
"""The actions of routes that FastAPI serves. `*` at the end of a path stands for its last segment."""
ENDPOINT_ACTIONS: Mapping[str, str] = {
    spec.path: "model." + spec.path.rpartition("/")[2] for spec in ENDPOINTS if spec.scope is Scope.ADMIN_OPERATE
}
"""The actions of endpoints whose requests become jobs, by path."""


def action_of(method: str, path: str) -> str:
    """Return the action of a route. Raises LookupError for a route that has none."""
    found = ROUTES.get(f"{method} {path}") or ROUTES.get(f"{method} {path.rpartition('/')[0]}/*")
    if found is None:
        raise LookupError(f"{method} {path} has no name in gateway/audit/actions.py: give it one.")
    return found


def target_type_of(action: str) -> str:
    """Return the kind of things that an action is about."""
    return action.partition(".")[0]
