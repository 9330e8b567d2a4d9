"""Created API keys in several gateways, while the store works, is unavailable, loses its data, or lags."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest

from backbone.testing.broadcast import MemoryBroadcast
from backbone.testing.documents import MemoryDocumentStore
from gateway.auth.authenticator import Authenticator, Principal
from gateway.auth.key_store import KIND, IssuedKey, KeyNotFound, KeyStore
from gateway.auth.replica import RETENTION_S, TRUSTED_S
from gateway.auth.team_store import TeamStore
from gateway.limits.effective import NO_LIMITS
from schemas.errors import AuthenticationFailed, InvalidRequest, NexusError, PermissionDenied, Unavailable
from schemas.keys import AccessLimits, Scope
from tests.conftest import Eventually

TOKEN = "nexus-bootstrap"


class Fleet:
    """Gateways that share a store, notices and a clock."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self.now = 1_800_000_000.0
        self.documents = MemoryDocumentStore(lambda: self.now)
        self.broadcast = MemoryBroadcast()
        self._stack = stack

    async def gateway(self, *, refresh_interval_s: float = 0.02, token: str | None = TOKEN) -> Gateway:
        ring = KeyStore(self.documents, self.broadcast, clock=lambda: self.now, refresh_interval_s=refresh_interval_s)
        await ring.start()
        self._stack.push_async_callback(ring.close)
        return Gateway(ring, Authenticator(token, ring))

    def flush(self) -> None:
        self.documents._documents.clear()

    def stored_ids(self) -> list[str]:
        return sorted(name.id for name in self.documents._documents if name.kind == KIND)


class Gateway:
    def __init__(self, ring: KeyStore, auth: Authenticator) -> None:
        self.ring = ring
        self.auth = auth

    def check(self, key: str) -> Principal:
        return self.auth.authenticate({"headers": [(b"authorization", f"Bearer {key}".encode())]})

    def knows(self, key: str) -> bool:
        try:
            self.check(key)
        except NexusError:
            return False
        return True

    async def create(self, name: str = "alice", **options: Any) -> IssuedKey:
        return await self.ring.create(name, **({"scopes": [Scope.INFERENCE]} | options))


@pytest.fixture
async def fleet() -> AsyncIterator[Fleet]:
    async with AsyncExitStack() as stack:
        yield Fleet(stack)


async def fails(call: Callable[[], Awaitable[Any]], error: type[NexusError]) -> str:
    with pytest.raises(error) as caught:
        await call()
    return caught.value.info.message


class TestOneGateway:
    async def test_a_created_key_is_accepted(self, fleet: Fleet) -> None:
        """With the owner, the scopes and the limits it was made with, and nothing more."""
        gateway = await fleet.gateway()
        new = await gateway.create(
            "alice", owner="team", scopes=[Scope.JOBS, Scope.INFERENCE], max_queued=5, max_running=2
        )
        principal = gateway.check(new.key)
        assert (principal.owner, principal.name, principal.key_id) == ("team", "alice", new.record.id)
        assert (principal.limits.queued, principal.limits.running) == ((5, None), (2, None))
        principal.require(Scope.JOBS)
        with pytest.raises(PermissionDenied, match=r"'admin'.*inference, jobs"):
            principal.require(Scope.ADMIN)

    async def test_keys_are_unique_and_not_stored(self, fleet: Fleet) -> None:
        """256 random bits each; the store has a hash, the last four characters and the webhooks' secret."""
        gateway = await fleet.gateway()
        made = [await gateway.create(f"k{n}") for n in range(20)]
        assert len({new.key for new in made}) == len({new.record.webhook_secret for new in made}) == 20
        everything = b"".join(held.value for held in fleet.documents._documents.values()).decode()
        for new in made:
            assert new.key.startswith("nexus-")
            assert len(new.key) == 49
            assert new.key not in everything
            assert new.key[6:] not in everything
            assert new.record.hint == new.key[-4:]
            assert new.record.webhook_secret.startswith("whsec_")
            assert gateway.auth.webhook_secret(new.record.id) == new.record.webhook_secret

    async def test_the_bootstrap_key_needs_no_store(self, fleet: Fleet) -> None:
        """It may do everything, belongs to `default`, and has a webhook secret that all gateways agree on."""
        fleet.documents.available = False
        one, other = await fleet.gateway(), await fleet.gateway()
        principal = one.check(TOKEN)
        assert (principal.owner, principal.key_id, principal.scopes) == ("default", "", frozenset(Scope))
        assert principal.limits is NO_LIMITS
        secret = one.auth.webhook_secret("")
        assert secret == other.auth.webhook_secret("") == principal.webhook_secret
        assert secret != Authenticator("another").webhook_secret("")
        assert TOKEN not in str(secret)

    async def test_created_keys_need_no_bootstrap_key(self, fleet: Fleet) -> None:
        """And nothing else does."""
        new = await (await fleet.gateway()).create()
        gateway = await fleet.gateway(token=None)
        assert gateway.check(new.key).owner == "alice"
        for wrong in (TOKEN, "", "None"):
            assert not gateway.knows(wrong)
        assert gateway.auth.webhook_secret("") is None

    async def test_the_error_says_that_a_key_has_expired(self, fleet: Fleet) -> None:
        """From that second on, and while the store is away; it is listed for a while, then forgotten everywhere."""
        gateway = await fleet.gateway()
        new = await gateway.create(expires_at=int(fleet.now) + 60)
        fleet.now += 59
        assert gateway.knows(new.key)
        fleet.documents.available = False
        fleet.now += 1
        with pytest.raises(AuthenticationFailed, match="expired"):
            gateway.check(new.key)
        fleet.documents.available = True
        assert [key.id for key in await gateway.ring.list_active()] == [new.record.id]
        fleet.now += RETENTION_S + 1
        assert await gateway.ring.list_active() == []
        assert fleet.stored_ids() == []
        with pytest.raises(AuthenticationFailed, match="not valid"):
            gateway.check(new.key)

    async def test_the_error_says_that_a_key_was_revoked(self, fleet: Fleet) -> None:
        """It is gone from the list, and cannot be revoked again; its jobs' webhooks are still signed."""
        gateway = await fleet.gateway()
        new, other = await gateway.create(), await gateway.create("bob")
        await gateway.ring.revoke(new.record.id)
        with pytest.raises(AuthenticationFailed, match="revoked") as caught:
            gateway.check(new.key)
        assert caught.value.info.code == "invalid_api_key"
        assert gateway.knows(other.key)
        assert [key.name for key in await gateway.ring.list_active()] == ["bob"]
        await fails(lambda: gateway.ring.get_active(new.record.id), KeyNotFound)
        await fails(lambda: gateway.ring.revoke(new.record.id), KeyNotFound)
        await fails(lambda: gateway.ring.revoke("key_nobody"), KeyNotFound)
        assert gateway.auth.webhook_secret(new.record.id) == new.record.webhook_secret
        assert gateway.auth.webhook_secret("key_nobody") is None

    async def test_two_tenants_never_share_an_owner_by_accident(self, fleet: Fleet) -> None:
        """A name that owns something already wants to be said as the owner, then it is shared; not even a race mixes them."""
        gateway = await fleet.gateway()
        assert "owner" in await fails(lambda: gateway.create("default"), InvalidRequest)
        first = await gateway.create("alice")
        await fails(lambda: gateway.create("alice"), InvalidRequest)
        shared = await gateway.create("alice", owner="alice")
        assert gateway.check(first.key).owner == gateway.check(shared.key).owner == "alice"
        await gateway.ring.revoke(first.record.id)
        await gateway.ring.revoke(shared.record.id)
        await fails(lambda: gateway.create("alice"), InvalidRequest)

    async def test_errors_never_repeat_a_wrong_key(self, fleet: Fleet) -> None:
        """Nor any part of them."""
        gateway = await fleet.gateway()
        new = await gateway.create()
        for wrong in (new.key[:-1], new.key + "x", new.record.hash, new.record.id):
            with pytest.raises(AuthenticationFailed) as caught:
                gateway.check(wrong)
            assert wrong[:12] not in caught.value.info.message


class TestStoreUnavailable:
    async def test_known_keys_stay_valid_and_cannot_be_changed(self, fleet: Fleet) -> None:
        """Keys work from memory; making, listing and revoking says that it cannot be done now."""
        gateway = await fleet.gateway()
        new = await gateway.create()
        fleet.documents.available = False
        for _ in range(3):
            await fails(gateway.ring.refresh, Unavailable)
        assert gateway.knows(new.key)
        await fails(lambda: gateway.create("bob"), Unavailable)
        await fails(gateway.ring.list_active, Unavailable)
        await fails(lambda: gateway.ring.revoke(new.record.id), Unavailable)
        assert gateway.knows(new.key)

    async def test_a_gateway_that_starts_answers_503(self, fleet: Fleet, eventually: Eventually) -> None:
        """503 for what may be one of our keys, which clients try again; 401 for what cannot be; and it recovers by itself."""
        new = await (await fleet.gateway()).create()
        fleet.documents.available = False
        late = await fleet.gateway()
        with pytest.raises(Unavailable) as caught:
            late.check(new.key)
        assert caught.value.info.retry_after_s
        with pytest.raises(AuthenticationFailed):
            late.check("sk-something-else")
        assert late.knows(TOKEN)
        fleet.documents.available = True
        await eventually(lambda: late.knows(new.key))
        with pytest.raises(AuthenticationFailed):
            late.check("nexus-" + "x" * 43)

    async def test_an_outage_during_a_refresh(self, fleet: Fleet, eventually: Eventually) -> None:
        """What was half given back is finished later."""
        gateway = await fleet.gateway()
        made = [await gateway.create(f"k{n}") for n in range(5)]
        plain, left = fleet.documents.add, [2]

        async def add(*arguments: Any, **options: Any) -> bool:
            left[0] -= 1
            if left[0] < 0:
                raise Unavailable
            return await plain(*arguments, **options)

        fleet.documents.add = add  # type: ignore[method-assign]
        fleet.flush()
        await eventually(lambda: left[0] < 0)
        assert all(gateway.knows(new.key) for new in made)
        fleet.documents.add = plain  # type: ignore[method-assign]
        await eventually(lambda: len(fleet.stored_ids()) == 5)


class TestStoreDataLoss:
    async def test_keys_are_restored_except_revoked_ones(self, fleet: Fleet, eventually: Eventually) -> None:
        """From a gateway that knew them, to one that starts later: a revoked key stays revoked, also the last one."""
        gateway = await fleet.gateway()
        kept, gone = await gateway.create(), await gateway.create("bob", expires_at=int(fleet.now) + 600)
        await gateway.ring.revoke(gone.record.id)
        fleet.flush()
        await eventually(lambda: len(fleet.stored_ids()) == 2)
        late = await fleet.gateway()
        assert late.knows(kept.key)
        with pytest.raises(AuthenticationFailed, match="revoked"):
            late.check(gone.key)
        await gateway.ring.revoke(kept.record.id)
        fleet.flush()
        await eventually(lambda: len(fleet.stored_ids()) == 2)
        assert not (await fleet.gateway()).knows(kept.key)

    async def test_a_gateway_that_missed_a_revocation_restores_nothing(
        self, fleet: Fleet, eventually: Eventually
    ) -> None:
        """It was told nothing and read nothing; it even wrote the key back: anyone who knows better has the last word."""
        knowing, dull = await fleet.gateway(), await fleet.gateway(refresh_interval_s=3600)
        new = await knowing.create()
        await dull.ring.refresh()
        fleet.broadcast.available = False
        await knowing.ring.revoke(new.record.id)
        assert dull.knows(new.key)
        fleet.flush()
        await dull.ring.refresh()
        await eventually(lambda: b'"revoked_at":1800' in next(iter(fleet.documents._documents.values())).value)
        await dull.ring.refresh()
        assert not dull.knows(new.key)
        assert not knowing.knows(new.key)

    async def test_a_known_revocation_wins_whichever_gateway_writes_first(self, fleet: Fleet) -> None:
        """Both give a key back to an empty store: one reads it while it is empty, the other writes in between."""
        late, knows = await fleet.gateway(refresh_interval_s=3600), await fleet.gateway(refresh_interval_s=3600)
        new = await late.create()
        await knows.ring.refresh()
        fleet.broadcast.available = False
        await knows.ring.revoke(new.record.id)
        fleet.flush()
        read = knows.ring._replica._read

        async def then_the_other_writes() -> dict[str, bytes]:
            found = await read()
            await late.ring.refresh()
            return found

        knows.ring._replica._read = then_the_other_writes  # type: ignore[method-assign]
        await knows.ring.refresh()
        assert not (await fleet.gateway()).knows(new.key)

    async def test_a_gateway_that_was_cut_off_for_long_forgets_keys(self, fleet: Fleet) -> None:
        """What has left the store meanwhile may have been revoked: it is not brought back."""
        gateway = await fleet.gateway(refresh_interval_s=3600)
        new = await gateway.create()
        fleet.now += TRUSTED_S + 1
        fleet.flush()
        await gateway.ring.refresh()
        assert not gateway.knows(new.key)
        assert fleet.stored_ids() == []


class TestManyGateways:
    async def test_a_change_is_received_at_once(self, fleet: Fleet, eventually: Eventually) -> None:
        """By the notice alone: this gateway would read by itself only after an hour."""
        one, other = await fleet.gateway(), await fleet.gateway(refresh_interval_s=3600)
        new = await one.create()
        await eventually(lambda: other.knows(new.key))
        await one.ring.revoke(new.record.id)
        await eventually(lambda: not other.knows(new.key))

    async def test_a_lost_broadcast_only_delays_a_change(self, fleet: Fleet, eventually: Eventually) -> None:
        """By reading alone."""
        fleet.broadcast.available = False
        one, other = await fleet.gateway(), await fleet.gateway()
        new = await one.create()
        await eventually(lambda: other.knows(new.key))
        await one.ring.revoke(new.record.id)
        await eventually(lambda: not other.knows(new.key))

    async def test_concurrent_creation_loses_no_key(self, fleet: Fleet, eventually: Eventually) -> None:
        """None is lost; of one name, one is made."""
        gateways = [await fleet.gateway() for _ in range(4)]
        made = await asyncio.gather(*(gateways[n % 4].create(f"k{n}") for n in range(40)))
        for gateway in gateways:
            await eventually(lambda gateway=gateway: all(gateway.knows(new.key) for new in made))
        same = await asyncio.gather(*(gateway.create("same") for gateway in gateways), return_exceptions=True)
        assert sorted(type(one).__name__ for one in same) == ["InvalidRequest"] * 3 + ["IssuedKey"]

    async def test_more_keys_than_one_page(self, fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
        """All are read."""
        monkeypatch.setattr("gateway.auth.key_store.PAGE_SIZE", 3)
        one = await fleet.gateway()
        made = [await one.create(f"k{n}") for n in range(10)]
        other = await fleet.gateway()
        assert all(other.knows(new.key) for new in made)
        assert {key.name for key in await other.ring.list_active()} == {f"k{n}" for n in range(10)}

    async def test_the_number_of_keys_is_limited(self, fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
        """Every gateway holds them all in memory, so there is a bound; what is revoked does not count."""
        monkeypatch.setattr("gateway.auth.key_store.MAX_KEYS", 2)
        gateway = await fleet.gateway()
        first = await gateway.create("a")
        await gateway.create("b")
        await fails(lambda: gateway.create("c"), InvalidRequest)
        await gateway.ring.revoke(first.record.id)
        await gateway.create("c")

    @pytest.mark.parametrize("value", [b"", b"{}", b"[1", b'{"id": "key_x"}'])
    async def test_unreadable_records_are_ignored(self, fleet: Fleet, value: bytes) -> None:
        """Somebody wrote nonsense into the store: the others work."""
        await fleet.documents.put(KIND, "", "key_x", value)
        gateway = await fleet.gateway()
        new = await gateway.create()
        assert gateway.knows(new.key)
        assert [key.id for key in await gateway.ring.list_active()] == [new.record.id]
        fleet.flush()
        await gateway.ring.refresh()
        assert fleet.stored_ids() == [new.record.id]


class TestChanges:
    async def test_limits_change_without_a_new_key(self, fleet: Fleet, eventually: Eventually) -> None:
        """At every gateway, by the notice alone: of the key, and of its team."""
        one, other = await fleet.gateway(), await fleet.gateway(refresh_interval_s=3600)
        new = await one.create(owner="team", max_queued=9)
        await eventually(lambda: other.knows(new.key))
        await one.ring.change(new.record.id, max_queued=3)
        await TeamStore(one.ring, lambda: fleet.now).change("team", max_queued=5, requests_per_minute=60)
        await eventually(lambda: other.check(new.key).limits.queued == (3, 5))
        assert [rate.per_minute for rate in other.check(new.key).limits.requests] == [60]

    async def test_an_older_version_never_replaces_a_newer_one(self, fleet: Fleet) -> None:
        """A gateway that missed a change gives its old record back to an empty store: the others correct it."""
        late, knows = await fleet.gateway(refresh_interval_s=3600), await fleet.gateway(refresh_interval_s=3600)
        new = await late.create(max_queued=9)
        await knows.ring.refresh()
        fleet.broadcast.available = False
        await knows.ring.change(new.record.id, max_queued=1)
        fleet.flush()
        await late.ring.refresh()
        await knows.ring.refresh()
        assert (await fleet.gateway()).check(new.key).limits.queued == (1, None)

    async def test_a_rotated_key_overlaps_with_the_new_one(self, fleet: Fleet) -> None:
        """Both are valid for the time of overlap; then the old one says why it is not."""
        gateway = await fleet.gateway()
        old = await gateway.create()
        new = await gateway.ring.rotate(old.record.id, 60)
        assert new.record.id == old.record.id
        assert gateway.check(old.key).key_id == gateway.check(new.key).key_id == old.record.id
        fleet.now += 60
        assert "replaced" in await fails(lambda: _raise(gateway, old.key), AuthenticationFailed)
        assert gateway.knows(new.key)
        assert not gateway.knows((await gateway.ring.rotate(old.record.id, 0), new.key)[1])

    async def test_the_end_of_a_team_ends_its_keys(self, fleet: Fleet) -> None:
        gateway = await fleet.gateway()
        new = await gateway.create(owner="team")
        await TeamStore(gateway.ring, lambda: fleet.now).change("team", expires_at=int(fleet.now) + 10)
        assert gateway.knows(new.key)
        fleet.now += 10
        assert not gateway.knows(new.key)

    async def test_defaults_hold_where_a_team_has_no_limit(self, fleet: Fleet) -> None:
        ring = KeyStore(fleet.documents, fleet.broadcast, defaults=AccessLimits(max_queued=7, lanes=("flex",)))
        await ring.start()
        new = await ring.create("alice", scopes=[Scope.JOBS], max_queued=100)
        assert ring.find(new.key.encode()).limits.queued == (100, 7)
        await TeamStore(ring).change("alice", lanes=("priority", "flex"))
        assert ring.find(new.key.encode()).limits.lanes == frozenset({"priority", "flex"})
        await ring.close()

    async def test_the_last_use_is_noted_once_a_minute(self, fleet: Fleet) -> None:
        gateway = await fleet.gateway(refresh_interval_s=3600)
        used, unused = await gateway.create("a"), await gateway.create("b")
        gateway.check(used.key)
        fleet.now += 60
        await gateway.ring._note_used()
        assert await gateway.ring.last_used([used.record, unused.record]) == {used.record.id: int(fleet.now)}


async def _raise(gateway: Gateway, key: str) -> None:
    gateway.check(key)
