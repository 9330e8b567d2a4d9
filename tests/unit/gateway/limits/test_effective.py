"""The limits of a key and its team, as requests meet them."""

from __future__ import annotations

import pytest

from gateway.limits.effective import EffectiveLimits, resolve_limits
from gateway.limits.followers import FollowerLimiter
from gateway.limits.open_requests import OpenRequestLimiter
from schemas.errors import PermissionDenied, RateLimited
from schemas.jobs import Lane
from schemas.keys import AccessLimits


def resolved(key: AccessLimits, team: AccessLimits | None = None, key_id: str = "k") -> EffectiveLimits:
    return resolve_limits(key, key_id, team or AccessLimits(), "t")


def test_a_model_must_match_the_key_and_the_team() -> None:
    """By the name in the request. Only `*` and `?` are special."""
    limits = resolved(AccessLimits(models=("llama*", "q[1]")), AccessLimits(models=("*:8b", "q?1?")))
    assert limits.allows_model("llama3:8b")
    assert limits.allows_model("q[1]")
    for name in ("llama3", "qwen:8b", "q1", "xllama3:8b", "llama3:8bx", "llama3:8b\n"):
        with pytest.raises(PermissionDenied) as caught:
            limits.require_model(name)
        assert (caught.value.info.code, caught.value.info.param) == ("model_not_allowed", "model")
    assert resolved(AccessLimits(models=("*a" * 8,))).allows_model("b" * 256) is False


def test_a_lane_must_be_in_both() -> None:
    limits = resolved(AccessLimits(lanes=("priority", "flex")), AccessLimits(lanes=("default", "flex")))
    limits.require_lane(Lane.FLEX)
    for lane in (Lane.PRIORITY, Lane.DEFAULT):
        with pytest.raises(PermissionDenied) as caught:
            limits.require_lane(lane)
        assert (caught.value.info.code, caught.value.info.param) == ("lane_not_allowed", "service_tier")


def test_an_address_must_be_in_both() -> None:
    limits = resolved(
        AccessLimits(networks=("10.0.0.0/8", "2001:db8::/32")), AccessLimits(networks=("10.1.0.0/16", "::/0"))
    )
    for allowed in ("10.1.2.3", "2001:db8:0:1::/64"):
        limits.require_network(allowed)
    for refused in ("10.2.0.1", "192.168.0.1", "2001:db9::/64", "", "nonsense"):
        with pytest.raises(PermissionDenied):
            limits.require_network(refused)


def test_open_requests_are_limited_for_the_key_and_the_team() -> None:
    """One that ended makes room; another key of the team counts for the team alone."""
    limiter = OpenRequestLimiter()
    team = AccessLimits(max_open=3)
    mine, others = resolved(AccessLimits(max_open=2), team), resolved(AccessLimits(), team, "other")
    held = [limiter.acquire(mine) for _ in range(2)]
    with pytest.raises(RateLimited, match="API key has 2 open") as caught:
        limiter.acquire(mine)
    assert (caught.value.info.code, caught.value.info.headers()["retry-after"]) == ("rate_limit_exceeded", "1")
    limiter.acquire(others)
    with pytest.raises(RateLimited, match="team has 3 open"):
        limiter.acquire(others)
    limiter.release(held[0])
    limiter.release(limiter.acquire(others))
    limiter.acquire(mine)


def test_limits_on_jobs_imply_one_on_open_requests() -> None:
    """As many as may wait and run together, unless the key says otherwise."""
    assert [bound.most for bound in resolved(AccessLimits(max_queued=1, max_running=2)).open] == [3]
    assert [bound.most for bound in resolved(AccessLimits(max_queued=1, max_running=2, max_open=9)).open] == [9]
    assert resolved(AccessLimits(max_queued=1)).open == ()


def test_followers_count_apart_from_requests() -> None:
    """One that is refused changes nothing; one that has ended makes room."""
    followers, limits = FollowerLimiter(), resolved(AccessLimits(max_open=1))
    with followers.hold(limits):
        with pytest.raises(RateLimited, match="streams of events"), followers.hold(limits):
            pass
        with followers.hold(resolved(AccessLimits(max_open=1), key_id="other")):
            pass
    with followers.hold(limits):
        pass
