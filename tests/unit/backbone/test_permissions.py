"""Accounts and rights follow from one list: what is imported is exported, and nothing that a worker may not do."""

from __future__ import annotations

import pytest

from backbone.bus.nats.permissions import (
    PULL,
    REPLY_ROUTE_S,
    NatsPermissions,
    account_exports,
    gateway_permissions,
    monitor_permissions,
    queues_for,
    worker_account,
    worker_permissions,
)
from schemas.jobs import Capability
from workers.demand import LINGER_S

ONE = worker_permissions("_INBOX.gpu1", workers=("gpu1",), queues=queues_for(["org/model:8b"], [Capability.CHAT]))
ALL = worker_permissions("_INBOX.worker", workers=("*",), queues=None)
MONITOR = monitor_permissions("_INBOX.monitor")


def covers(pattern: str, subject: str) -> bool:
    """Whether every subject that `subject` stands for matches the pattern."""
    wanted, given = pattern.split("."), subject.split(".")
    for at, token in enumerate(wanted):
        if token == ">":
            return len(given) > at
        if at >= len(given) or (token not in {"*", given[at]}) or given[at] == ">":
            return False
    return len(wanted) == len(given)


@pytest.mark.parametrize("rights", [ONE, ALL, MONITOR], ids=["one worker", "a worker for all queues", "a monitor"])
def test_what_an_account_imports_is_exported(rights: NatsPermissions) -> None:
    """nats-server refuses a configuration in which it is not."""
    out = account_exports()
    assert rights.services
    for subject in rights.services:
        assert any(covers(one, subject) for one in out.services), subject
    for subject in rights.streams:
        assert any(covers(one, subject) for one in out.streams), subject


def test_inboxes_do_not_cross() -> None:
    """An inbox is heard within its own account: nothing of it is imported or exported."""
    everything = (
        *account_exports().services,
        *account_exports().streams,
        *ONE.services,
        *ONE.streams,
        *ALL.streams,
        *MONITOR.streams,
    )
    assert not [subject for subject in everything if "_INBOX" in subject or subject == ">"]


@pytest.mark.parametrize(
    "subject",
    [
        "nexus.jobs.chat.default.m", "nexus.control.gpu1", "nexus.hooks.x", "nexus.batches.x", "nexus.notice.keys", "nexus.told.j",
        "nexus.ended.j", "$KV.nexus-idempotency.x", "$JS.API.STREAM.PURGE.NEXUS_EVENTS", "$JS.API.STREAM.MSG.GET.NEXUS_DONE",
        "$JS.API.CONSUMER.DURABLE.CREATE.NEXUS_JOBS.x", "_R_.a.b", "$SYS.REQ.SERVER.PING",
    ],
)  # fmt: skip
def test_what_does_harm_is_not_exported_as_a_service(subject: str) -> None:
    """Whatever the configuration of a worker's account says, it cannot import that."""
    assert not [one for one in account_exports().services if covers(one, subject)]


def test_a_gateway_answers_into_other_accounts() -> None:
    """Its user may publish where nats-server hides an address."""
    assert any(covers(one, "_R_.abcdef.ghijkl") for one in gateway_permissions("_INBOX.gateway").publish)


def test_ways_back_outlive_a_pull() -> None:
    """A job that comes at the end of a worker's longest pull still finds its way."""
    assert LINGER_S + 2 < REPLY_ROUTE_S
    assert [one for one in account_exports().services if one.startswith(PULL)] == [f"{PULL}*"]


def test_each_worker_has_an_account_of_its_own() -> None:
    """By the name of its user."""
    assert worker_account("gpu1") != worker_account("gpu2")
