"""The registry seam: one contract for every implementation, then what only a real etcd can go through."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from urllib.parse import quote

import pytest

from backbone.registry.auth import EtcdAccess, EtcdTls, parse_endpoints
from backbone.registry.etcd import EtcdRegistry
from backbone.registry.etcd_client import EtcdClient, LeaseNotFound, WatchEnded
from backbone.registry.keys import RegistryKeys
from backbone.registry.registry import Registry
from backbone.registry.snapshot import RegistryState
from backbone.testing.registry import MemoryHub, MemoryRegistry
from cli.embedded.binaries import ETCD
from cli.embedded.managed_process import ManagedProcess
from cli.embedded.servers import free_port
from schemas.errors import Unavailable
from schemas.jobs import Capability
from schemas.presence import (
    Alias,
    CatalogEntry,
    ModelOffer,
    RegistrySnapshot,
    ServiceRecord,
    WorkerPresence,
    WorkerState,
)
from tests.servers import Server

MakeRegistry = Callable[[], Registry]


def offer(name: str = "llama3:8b", *capabilities: Capability) -> ModelOffer:
    return ModelOffer(name=name, capabilities=capabilities or (Capability.CHAT,))


def worker(id_: str = "w1", *models: ModelOffer, **fields) -> WorkerPresence:
    return WorkerPresence(id=id_, backend="echo", host="here", models=models or (offer(),), **fields)


def ids(registry: Registry) -> set[str]:
    return set(registry.snapshot.workers) if registry.snapshot else set()


class Cast:
    """Makes registries of one kind that share one server, and closes them."""

    def __init__(self, make: MakeRegistry) -> None:
        self.make = make
        self.made: list[Registry] = []

    async def gateway(self) -> Registry:
        return await self._start(watch=True)

    async def worker(self) -> Registry:
        return await self._start(watch=False)

    async def _start(self, *, watch: bool) -> Registry:
        registry = self.make()
        self.made.append(registry)
        await registry.start(watch=watch)
        return registry

    async def close(self) -> None:
        for registry in self.made:
            await registry.close()


@pytest.fixture(params=["memory", "etcd"])
def make_registry(request: pytest.FixtureRequest) -> MakeRegistry:
    if request.param == "memory":
        hub = MemoryHub()
        return lambda: MemoryRegistry(hub)
    url, prefix = request.getfixturevalue("etcd_url"), request.getfixturevalue("etcd_prefix")
    return lambda: EtcdRegistry(url, prefix, lease_s=2)


@pytest.fixture
async def cast(make_registry: MakeRegistry) -> AsyncIterator[Cast]:
    cast = Cast(make_registry)
    yield cast
    await cast.close()


@pytest.fixture
async def etcd_cast(own_etcd: Server, etcd_prefix: str) -> AsyncIterator[Cast]:
    """Registries on an etcd that the test may break."""
    cast = Cast(lambda: EtcdRegistry(own_etcd.url, etcd_prefix, lease_s=2, retain_s=3))
    yield cast
    await cast.close()


@pytest.fixture
async def client(own_etcd: Server) -> AsyncIterator[EtcdClient]:
    """A connection to the test's own etcd, to do things behind the registries' backs."""
    client = EtcdClient(own_etcd.url, probe_key="probe")
    await client.open()
    yield client
    await client.close()


class TestContract:
    async def test_start_gives_a_snapshot_though_nobody_is_there(self, cast):
        gateway = await cast.gateway()
        assert gateway.snapshot == RegistrySnapshot()
        assert gateway.connected
        await gateway.ping()

    async def test_without_watch_there_is_no_snapshot(self, cast):
        registry = await cast.worker()
        assert registry.snapshot is None
        await registry.ping()

    async def test_descriptors_come_change_and_go_with_their_worker(self, cast, eventually):
        gateway, registry = await cast.gateway(), await cast.worker()
        announcement = await registry.announce(worker("w"))
        await announcement.describe(b'{"one": "{}"}')
        await eventually(lambda: gateway.snapshot.descriptors == {"w": b'{"one": "{}"}'})
        await announcement.describe(b'{"two": "{}"}')
        await eventually(lambda: gateway.snapshot.descriptors == {"w": b'{"two": "{}"}'})
        later = await cast.gateway()
        assert later.snapshot is not None
        assert later.snapshot.descriptors == gateway.snapshot.descriptors
        await announcement.withdraw()
        await eventually(lambda: gateway.snapshot.descriptors == {} and ids(gateway) == set())

    async def test_a_worker_is_seen_with_all_it_says(self, cast, eventually):
        gateway, registry = await cast.gateway(), await cast.worker()
        presence = worker("gpu-1_a", offer("m", Capability.CHAT, Capability.EMBEDDINGS), slots=4, busy=1)
        await registry.announce(presence)
        await eventually(lambda: ids(gateway))
        assert gateway.snapshot.workers == {"gpu-1_a": presence}

    async def test_a_later_gateway_sees_it_in_its_first_snapshot(self, cast):
        await (await cast.worker()).announce(worker())
        assert ids(await cast.gateway()) == {"w1"}

    async def test_models_enter_the_catalogue_under_their_very_names(self, cast, eventually):
        gateway, registry = await cast.gateway(), await cast.worker()
        names = ["meta/llama-3:8b", "a%2Fb", "größe *.>", "plain"]
        await registry.announce(worker("w1", *(offer(name) for name in names)))
        await eventually(lambda: len(gateway.snapshot.models) == len(names))
        assert set(gateway.snapshot.models) == set(names)

    async def test_a_model_stays_in_the_catalogue_when_its_worker_leaves(self, cast, eventually):
        gateway, registry = await cast.gateway(), await cast.worker()
        announcement = await registry.announce(worker("w1", offer("m")))
        await eventually(lambda: "m" in gateway.snapshot.models)
        await announcement.withdraw()
        await eventually(lambda: not ids(gateway))
        assert gateway.snapshot.models["m"].capabilities == (Capability.CHAT,)

    async def test_an_offer_to_manage_models_goes_with_its_worker(self, cast, eventually):
        gateway = await cast.gateway()
        manages = ModelOffer(name="worker:w1", capabilities=(Capability.MODELS,))
        await (await cast.worker()).announce(worker("w1", offer("llama3:8b"), manages))
        await eventually(lambda: "w1" in ids(gateway) and gateway.snapshot.models)
        assert manages in gateway.snapshot.workers["w1"].models
        assert set(gateway.snapshot.models) == {"llama3:8b"}

    async def test_the_catalogue_joins_what_several_workers_say(self, cast, eventually):
        gateway, registry = await cast.gateway(), await cast.worker()
        kinds = [Capability.CHAT, Capability.EMBEDDINGS, Capability.RERANK, Capability.COMPLETIONS]
        await asyncio.gather(*(registry.announce(worker(f"w{n}", offer("m", kind))) for n, kind in enumerate(kinds)))
        await eventually(
            lambda: "m" in gateway.snapshot.models and set(gateway.snapshot.models["m"].capabilities) == set(kinds)
        )

    async def test_an_update_replaces_the_entry(self, cast, eventually):
        gateway, registry = await cast.gateway(), await cast.worker()
        announcement = await registry.announce(worker())
        changed = worker("w1", offer("other"), state=WorkerState.DRAINING)
        await announcement.update(changed)
        await eventually(lambda: gateway.snapshot.workers.get("w1") == changed)
        await eventually(lambda: "other" in gateway.snapshot.models)

    async def test_of_many_updates_the_last_one_stands(self, cast, eventually):
        gateway, registry = await cast.gateway(), await cast.worker()
        announcement = await registry.announce(worker(slots=100))
        for busy in range(100):
            await announcement.update(worker(slots=100, busy=busy))
        await eventually(lambda: "w1" in gateway.snapshot.workers and gateway.snapshot.workers["w1"].busy == 99)

    async def test_withdraw_removes_the_worker_and_can_be_repeated(self, cast, eventually):
        gateway, registry = await cast.gateway(), await cast.worker()
        announcement = await registry.announce(worker())
        await registry.announce(worker("w2"))
        await eventually(lambda: ids(gateway) == {"w1", "w2"})
        await announcement.withdraw()
        await announcement.withdraw()
        await eventually(lambda: ids(gateway) == {"w2"})

    async def test_a_worker_can_come_back_under_its_name(self, cast, eventually):
        gateway, registry = await cast.gateway(), await cast.worker()
        await (await registry.announce(worker())).withdraw()
        await eventually(lambda: not ids(gateway))
        await registry.announce(worker(version="2"))
        await eventually(lambda: ids(gateway) and gateway.snapshot.workers["w1"].version == "2")

    async def test_withdrawing_an_old_entry_leaves_its_successor(self, cast, eventually):
        """A restarted worker keeps its name; the old process may leave after the new one has entered."""
        gateway, old_process, new_process = await cast.gateway(), await cast.worker(), await cast.worker()
        old = await old_process.announce(worker(version="1"))
        await new_process.announce(worker(version="2"))
        await eventually(lambda: ids(gateway) and gateway.snapshot.workers["w1"].version == "2")
        await old.withdraw()
        await new_process.announce(worker("w2"))
        await eventually(lambda: "w2" in ids(gateway))
        assert gateway.snapshot.workers["w1"].version == "2"

    async def test_a_worker_that_stops_renewing_vanishes(self, cast, eventually):
        gateway, registry = await cast.gateway(), await cast.worker()
        await registry.announce(worker())
        await eventually(lambda: ids(gateway))
        await registry.close()
        await eventually(lambda: not ids(gateway))

    async def test_a_worker_that_renews_outlives_its_lease(self, cast, eventually):
        gateway, registry = await cast.gateway(), await cast.worker()
        sleeper = await cast.worker()
        await registry.announce(worker("renews"))
        await sleeper.announce(worker("dies"))
        await eventually(lambda: ids(gateway) == {"renews", "dies"})
        await sleeper.close()
        await eventually(lambda: ids(gateway) == {"renews"})

    async def test_listeners_hear_of_changes_until_they_end_it(self, cast, eventually):
        gateway, registry = await cast.gateway(), await cast.worker()
        heard: list[set[str]] = []
        end = gateway.subscribe(lambda snapshot: heard.append(set(snapshot.workers)))
        await registry.announce(worker("w1"))
        await eventually(lambda: {"w1"} in heard)
        end()
        end()
        count = len(heard)
        await registry.announce(worker("w2"))
        await eventually(lambda: ids(gateway) == {"w1", "w2"})
        assert len(heard) == count

    async def test_a_listener_that_fails_harms_nobody(self, cast, eventually):
        gateway, registry = await cast.gateway(), await cast.worker()
        heard: list[RegistrySnapshot] = []
        gateway.subscribe(lambda _: 1 / 0)
        gateway.subscribe(heard.append)
        await registry.announce(worker())
        await eventually(lambda: heard and ids(gateway))

    async def test_an_alias_is_read_as_it_was_written_until_it_is_removed(self, cast, eventually):
        """Any name; who writes sees it at once, others soon; removing says whether there was one."""
        gateway, other = await cast.gateway(), await cast.gateway()
        first, second = Alias(name="org/größe: 100% a", targets=("a", "b")), Alias(name="plain", targets=("c",))
        for alias in (first, second):
            await gateway.put_alias(alias)
        assert gateway.snapshot.aliases == {first.name: first, second.name: second}
        await eventually(lambda: other.snapshot.aliases == gateway.snapshot.aliases)
        changed = Alias(name="plain", targets=("b",))
        await other.put_alias(changed)
        assert await other.remove_alias(first.name)
        assert other.snapshot.aliases == {"plain": changed}
        assert not await other.remove_alias(first.name)
        await eventually(lambda: gateway.snapshot.aliases == {"plain": changed})
        assert (await cast.gateway()).snapshot.aliases == {"plain": changed}

    async def test_a_service_record_is_read_as_it_was_written_until_it_is_removed(self, cast, eventually):
        """With the fields that we do not know."""
        gateway, other = await cast.gateway(), await cast.gateway()
        record = ServiceRecord.model_validate({"name": "tts/1", "base_url": "http://a:1", "team": {"floor": 3}})
        await gateway.put_service(record)
        assert gateway.snapshot.services == {"tts/1": record}
        await eventually(lambda: other.snapshot.services == {"tts/1": record})
        moved = record.model_copy(update={"base_url": "http://b:1"})
        await other.put_service(moved)
        await eventually(lambda: gateway.snapshot.services == {"tts/1": moved})
        assert (await cast.gateway()).snapshot.services == {"tts/1": moved}
        assert await gateway.remove_service("tts/1")
        assert not await gateway.remove_service("tts/1")
        assert gateway.snapshot.services == {}

    async def test_who_does_not_watch_can_write_too(self, cast, eventually):
        gateway, registry = await cast.gateway(), await cast.worker()
        await registry.put_alias(Alias(name="x", targets=("m",)))
        await eventually(lambda: "x" in gateway.snapshot.aliases)
        assert await registry.remove_alias("x")
        await eventually(lambda: not gateway.snapshot.aliases)

    async def test_close_is_idempotent(self, cast):
        gateway = await cast.gateway()
        await gateway.close()
        await gateway.close()


class TestMemoryOutage:
    async def test_the_snapshot_stays_and_the_announcement_comes_later(self):
        hub = MemoryHub()
        gateway, registry = MemoryRegistry(hub), MemoryRegistry(hub)
        await gateway.start()
        await registry.announce(worker("w1"))
        hub.available = False
        await registry.announce(worker("w2"))
        assert ids(gateway) == {"w1"}
        assert not gateway.connected
        with pytest.raises(Unavailable):
            await gateway.ping()
        hub.available = True
        assert ids(gateway) == {"w1", "w2"}

    async def test_writing_fails(self):
        hub = MemoryHub()
        registry = MemoryRegistry(hub)
        hub.available = False
        await assert_writing_fails(registry)
        hub.available = True
        assert hub.aliases == {}


async def assert_writing_fails(registry: Registry) -> None:
    """Nobody may believe that a change was taken."""
    for change in (
        registry.put_alias(Alias(name="x", targets=("m",))),
        registry.remove_alias("x"),
        registry.put_service(ServiceRecord(name="x", base_url="http://a:1")),
        registry.remove_service("x"),
    ):
        with pytest.raises(Unavailable):
            await change


class TestView:
    """What an outage hides is held; a pure matter of a clock."""

    @pytest.fixture
    def clock(self) -> list[float]:
        return [100.0]

    @pytest.fixture
    def view(self, clock) -> RegistryState:
        view = RegistryState(retain_s=10, clock=lambda: clock[0])
        view.replace({id_: worker(id_) for id_ in ("w1", "w2")}, {}, after_outage=False)
        view.publish()
        return view

    def ids(self, view: RegistryState) -> set[str]:
        view.publish()
        assert view.snapshot is not None
        return set(view.snapshot.workers)

    def test_workers_that_an_outage_hid_stay_until_the_hold_is_over(self, view, clock):
        view.replace({}, {}, after_outage=True)
        assert self.ids(view) == {"w1", "w2"}
        view.put_worker(worker("w2", slots=7))
        assert view.snapshot.workers["w2"].slots == 1
        clock[0] += 10
        assert view.remaining_retention_s() == 0
        view.drop_expired_workers()
        assert self.ids(view) == {"w2"}
        assert view.remaining_retention_s() is None

    def test_without_an_outage_nothing_is_held(self, view):
        view.replace({"w1": worker("w1")}, {}, after_outage=False)
        assert self.ids(view) == {"w1"}
        view.remove_worker("w1")
        assert self.ids(view) == set()

    def test_a_lease_that_lapsed_in_the_outage_does_not_show(self, view, clock):
        view.replace({"w1": worker("w1")}, {}, after_outage=True)
        view.remove_worker("w1")
        assert self.ids(view) == {"w1", "w2"}
        view.put_worker(worker("w1"))
        clock[0] += 10
        view.drop_expired_workers()
        assert self.ids(view) == {"w1"}

    def test_who_left_in_order_is_not_held(self, view):
        view.replace({id_: worker(id_) for id_ in ("w1", "w2")}, {}, after_outage=True)
        view.put_worker(worker("w1", state=WorkerState.DRAINING))
        view.remove_worker("w1")
        assert self.ids(view) == {"w2"}

    def test_a_second_listing_within_the_hold_keeps_it(self, view):
        view.replace({}, {}, after_outage=True)
        view.replace({}, {}, after_outage=False)
        assert self.ids(view) == {"w1", "w2"}

    def test_no_change_calls_no_listener(self, view):
        heard: list[RegistrySnapshot] = []
        view.subscribe(heard.append)
        view.put_worker(worker("w1"))
        view.publish()
        assert heard == []


@pytest.mark.parametrize(
    ("url", "endpoints"),
    [
        ("http://a:1", [("a:1", False)]),
        ("https://a.example", [("a.example:2379", True)]),
        ("http://a:1, https://b:2", [("a:1", False), ("b:2", True)]),
        ("a:1", [("a:1", False)]),
        ("http://[::1]:7", [("[::1]:7", False)]),
    ],
)
def test_etcd_urls(url, endpoints):
    assert parse_endpoints(url) == endpoints


@pytest.mark.parametrize("url", ["", " , ", "ftp://a", "http://user:secret@a:1", "http://:1"])
def test_urls_that_are_none_say_so_without_repeating_them(url):
    with pytest.raises(ValueError, match="etcd URL") as error:
        parse_endpoints(url)
    assert "secret" not in str(error.value)


def test_keys_take_any_name():
    keys = RegistryKeys("/nexus")
    assert keys.model("a/b:c") == "/nexus/models/" + quote("a/b:c", safe="")
    assert keys.model_of(keys.model("a/b:c%2F")) == "a/b:c%2F"
    assert keys.worker_of(keys.model("x")) is None
    assert keys.alias("a/b:c") == "/nexus/aliases/a/b:c"
    assert keys.alias_of(keys.alias("a%2Fb")) == "a%2Fb"
    assert keys.service_of(keys.alias("x")) is None


class TestFaults:
    async def test_an_entry_that_changes_all_the_time_keeps_its_lease(self, own_etcd, etcd_cast, client, etcd_prefix):
        """A busy worker writes its entry again and again; its lease is renewed all the same."""
        gateway, registry = await etcd_cast.gateway(), await etcd_cast.worker()
        announcement = await registry.announce(worker())
        first = (await client.get(RegistryKeys(etcd_prefix).worker("w1"))).lease
        seen: list[set[str]] = []
        gateway.subscribe(lambda snapshot: seen.append(set(snapshot.workers)))
        until = asyncio.get_running_loop().time() + 5  # more than twice the lease
        busy = 0
        while asyncio.get_running_loop().time() < until:
            busy += 1
            await announcement.update(worker(busy=busy))
            await asyncio.sleep(0.1)
        entry = await client.get(RegistryKeys(etcd_prefix).worker("w1"))
        assert entry is not None
        assert entry.lease == first
        assert set() not in seen

    async def test_start_without_etcd_does_not_raise_and_catches_up(self, own_etcd, etcd_cast, eventually):
        await own_etcd.stop()
        gateway, registry = await etcd_cast.gateway(), await etcd_cast.worker()
        assert gateway.snapshot is None
        assert not gateway.connected
        with pytest.raises(Unavailable):
            await gateway.ping()
        await assert_writing_fails(gateway)
        await registry.announce(worker())
        await own_etcd.restart()
        await eventually(lambda: ids(gateway) == {"w1"})
        assert gateway.connected

    @pytest.mark.parametrize("data", ["kept", "wiped"])
    async def test_etcd_killed_and_started_again(self, own_etcd, etcd_cast, client, etcd_prefix, eventually, data):
        """The snapshot never flickers, and the worker is entered again by itself."""
        gateway, registry = await etcd_cast.gateway(), await etcd_cast.worker()
        announcement = await registry.announce(worker())
        await eventually(lambda: ids(gateway))
        seen: list[set[str]] = []
        gateway.subscribe(lambda snapshot: seen.append(set(snapshot.workers)))
        own_etcd.kill()
        await eventually(lambda: not gateway.connected and not registry.connected)
        assert ids(gateway) == {"w1"}
        await announcement.update(worker(version="2"))
        await (own_etcd.restart() if data == "kept" else own_etcd.start())
        await eventually(lambda: gateway.connected and gateway.snapshot.workers["w1"].version == "2")
        assert await client.get(RegistryKeys(etcd_prefix).worker("w1"))
        await registry.announce(worker("w2"))
        await eventually(lambda: ids(gateway) == {"w1", "w2"})
        assert set() not in seen

    async def test_a_wipe_too_quick_for_the_probe(self, own_etcd, etcd_cast, eventually):
        """The stream resumes at a revision that the wiped etcd has not reached: nothing must wait for it."""
        gateway, registry = await etcd_cast.gateway(), await etcd_cast.worker()
        announcement = await registry.announce(worker())
        for slots in range(2, 6):
            await announcement.update(worker(slots=slots))
            await eventually(lambda slots=slots: ids(gateway) and gateway.snapshot.workers["w1"].slots == slots)
        own_etcd.kill()
        await own_etcd.start()
        await registry.announce(worker("w2"))
        await eventually(lambda: ids(gateway) == {"w1", "w2"})
        await announcement.update(worker(slots=9))
        await eventually(lambda: gateway.snapshot.workers["w1"].slots == 9)

    async def test_a_worker_that_died_in_the_outage_is_let_go_after_the_hold(self, own_etcd, etcd_cast, eventually):
        gateway, registry, dying = await etcd_cast.gateway(), await etcd_cast.worker(), await etcd_cast.worker()
        await registry.announce(worker("lives"))
        await dying.announce(worker("dies"))
        await eventually(lambda: ids(gateway) == {"lives", "dies"})
        own_etcd.kill()
        await dying.close()
        await eventually(lambda: not gateway.connected)
        await own_etcd.start()
        await eventually(lambda: gateway.connected)
        await eventually(lambda: ids(gateway) == {"lives"})

    async def test_etcd_frozen_for_longer_than_the_lease(self, own_etcd, etcd_cast, eventually):
        gateway, registry = await etcd_cast.gateway(), await etcd_cast.worker()
        announcement = await registry.announce(worker())
        await eventually(lambda: ids(gateway))
        seen: list[set[str]] = []
        gateway.subscribe(lambda snapshot: seen.append(set(snapshot.workers)))
        own_etcd.pause()
        await eventually(lambda: not gateway.connected, timeout_s=20)
        async with asyncio.timeout(20):
            with pytest.raises(Unavailable):
                await gateway.ping()
        await asyncio.sleep(2.5)  # the lease's whole time
        assert ids(gateway) == {"w1"}
        own_etcd.resume()
        await announcement.update(worker(version="2"))
        await eventually(lambda: gateway.connected and gateway.snapshot.workers["w1"].version == "2")
        assert set() not in seen

    async def test_withdraw_from_a_frozen_etcd_returns(self, own_etcd, etcd_cast):
        registry = await etcd_cast.worker()
        announcement = await registry.announce(worker())
        own_etcd.pause()
        async with asyncio.timeout(20):
            await announcement.withdraw()

    async def test_close_with_a_frozen_etcd_returns(self, own_etcd, etcd_cast):
        gateway = await etcd_cast.gateway()
        await gateway.announce(worker())
        own_etcd.pause()
        async with asyncio.timeout(20):
            await gateway.close()

    async def test_a_lease_revoked_behind_the_workers_back(self, etcd_cast, client, etcd_prefix, eventually):
        gateway, registry = await etcd_cast.gateway(), await etcd_cast.worker()
        await registry.announce(worker())
        key = RegistryKeys(etcd_prefix).worker("w1")
        first = await client.get(key)
        gone = asyncio.Event()

        def look(snapshot: RegistrySnapshot) -> None:
            if not snapshot.workers:
                gone.set()

        gateway.subscribe(look)
        await client.revoke_lease(first.lease)
        await asyncio.wait_for(gone.wait(), 10)
        await eventually(lambda: ids(gateway) == {"w1"})
        assert (await client.get(key)).lease != first.lease

    async def test_an_entry_deleted_behind_the_workers_back(self, etcd_cast, client, etcd_prefix, eventually):
        registry = await etcd_cast.worker()
        await registry.announce(worker())
        key = RegistryKeys(etcd_prefix).worker("w1")
        await client._endpoint.kv.delete(key, timeout=5)
        await eventually(lambda: client.get(key))

    async def test_withdraw_ends_the_lease(self, etcd_cast, client, etcd_prefix):
        registry = await etcd_cast.worker()
        announcement = await registry.announce(worker())
        lease = (await client.get(RegistryKeys(etcd_prefix).worker("w1"))).lease
        await announcement.withdraw()
        assert await client.get(RegistryKeys(etcd_prefix).worker("w1")) is None
        with pytest.raises(LeaseNotFound):
            await client.renew_lease(lease)

    async def test_a_leaving_worker_is_not_held_after_an_outage(self, own_etcd, etcd_prefix, eventually):
        cast = Cast(lambda: EtcdRegistry(own_etcd.url, etcd_prefix, lease_s=2, retain_s=3600))
        gateway, registry = await cast.gateway(), await cast.worker()
        announcement = await registry.announce(worker())
        await eventually(lambda: ids(gateway))
        own_etcd.kill()
        await eventually(lambda: not gateway.connected and not registry.connected)
        await own_etcd.restart()
        await eventually(lambda: gateway.connected and registry.connected)
        await announcement.update(worker(version="2"))
        await eventually(lambda: gateway.snapshot and gateway.snapshot.workers["w1"].version == "2")
        await announcement.withdraw()
        await eventually(lambda: not ids(gateway))
        await cast.close()

    async def test_a_watch_from_a_compacted_revision_says_so(self, client):
        for n in range(5):
            await client.put("/c/key", str(n).encode())
        _, revision = await client.list_prefix("/c/")
        await client._endpoint.kv.compact(revision, timeout=5)
        with pytest.raises(WatchEnded, match="compacted") as ended:
            async with asyncio.timeout(10):
                async for _ in client.watch("/c/", 1):
                    pass
        assert not ended.value.outage

    async def test_a_compacted_watch_is_listed_again(self, etcd_cast, client, etcd_prefix, eventually, monkeypatch):
        """The listing's revision is compacted before the watch begins; the gateway must not go deaf."""
        registry = await etcd_cast.worker()
        announcement = await registry.announce(worker())
        real = EtcdClient.list_prefix
        spoiled: list[bool] = []

        async def listing(self, prefix):
            entries, revision = await real(self, prefix)
            if not spoiled:
                spoiled.append(True)
                for n in range(3):
                    await client.put("/elsewhere", str(n).encode())
                await client._endpoint.kv.compact(revision + 3, timeout=5)
            return entries, revision

        monkeypatch.setattr(EtcdClient, "list_prefix", listing)
        gateway = await etcd_cast.gateway()
        assert spoiled
        await announcement.update(worker(version="2"))
        await eventually(lambda: gateway.snapshot.workers["w1"].version == "2")

    async def test_malformed_values_are_passed_over(self, etcd_cast, client, etcd_prefix, eventually):
        keys = RegistryKeys(etcd_prefix)
        for key in ("workers/early", "models/early", "services/x", "aliases/y", "unknown"):
            await client.put(etcd_prefix + key, b"\xff{not json")
        gateway, registry = await etcd_cast.gateway(), await etcd_cast.worker()
        for key in ("workers/late", "models/late", "workers/", "models/%zz", "what"):
            await client.put(etcd_prefix + key, b'{"id": 3}')
        await client.put(keys.worker("liar"), worker("somebody-else").model_dump_json().encode())
        await client.put(keys.model("m"), b"nonsense")
        await registry.announce(worker("w1", offer("m")))
        await eventually(lambda: ids(gateway) == {"w1"} and "m" in gateway.snapshot.models)
        assert set(gateway.snapshot.models) == {"m"}

    async def test_an_entry_that_becomes_malformed_is_gone(self, etcd_cast, client, etcd_prefix, eventually):
        gateway = await etcd_cast.gateway()
        entry = CatalogEntry(name="m", capabilities=(Capability.CHAT,))
        await client.put(RegistryKeys(etcd_prefix).model("m"), entry.model_dump_json().encode())
        await eventually(lambda: "m" in gateway.snapshot.models)
        await client.put(RegistryKeys(etcd_prefix).model("m"), b"nonsense")
        await eventually(lambda: "m" not in gateway.snapshot.models)

    @pytest.mark.parametrize(
        ("written", "targets"),
        [
            ('{"targets": ["llama3.1:8b", "smollm2"]}', ("llama3.1:8b", "smollm2")),
            ('{"name": "another", "targets": ["a"], "note": "x"}', ("a",)),
            ('{"targets": "a"}', ("a",)),
            ('["a", "b", "a"]', ("a", "b")),
            ('"a"', ("a",)),
        ],
    )
    async def test_aliases_as_operators_type_them(self, etcd_cast, client, etcd_prefix, eventually, written, targets):
        """The key says the name, slashes and all."""
        gateway = await etcd_cast.gateway()
        await client.put(f"{etcd_prefix}aliases/team/chat:big", written.encode())
        await eventually(lambda: gateway.snapshot.aliases)
        expected = {"team/chat:big": Alias(name="team/chat:big", targets=targets)}
        assert gateway.snapshot.aliases == expected
        assert (await etcd_cast.gateway()).snapshot.aliases == expected

    async def test_services_as_scripts_write_them(self, etcd_cast, client, etcd_prefix, eventually):
        """Without a name the key gives it; without `metadata_url` it is left to the default."""
        gateway = await etcd_cast.gateway()
        full = '{"name":"tts","base_url":"http://tts:8080","metadata_url":"http://tts:8080/v1/metadata"}'
        await client.put(f"{etcd_prefix}services/tts", full.encode())
        await client.put(f"{etcd_prefix}services/short", b'{"base_url": "http://short:1", "zone": 4}')
        await eventually(lambda: len(gateway.snapshot.services) == 2)
        assert gateway.snapshot.services["tts"].metadata_url == "http://tts:8080/v1/metadata"
        assert gateway.snapshot.services["short"].name == "short"
        assert gateway.snapshot.services["short"].model_extra == {"zone": 4}
        assert (await etcd_cast.gateway()).snapshot.services == gateway.snapshot.services

    @pytest.mark.parametrize(
        ("key", "good", "bad"),
        [
            ("aliases/x", b'"m"', [b"", b"m", b"[]", b"[1]", b'[""]', b"null", b"{}", b'{"targets": {}}', b"\xff"]),
            ("services/x", b'{"base_url": "http://a:1"}', [b"", b"x", b"[]", b"null", b"{}", b'{"base_url": 1}']),
        ],
    )
    async def test_an_operators_mistake_is_not_fatal(self, etcd_cast, client, etcd_prefix, eventually, key, good, bad):
        """It counts as gone, whether it is listed or watched, and what comes after it is taken."""
        gateway, kind = await etcd_cast.gateway(), key.partition("/")[0]
        for value in bad:
            await client.put(etcd_prefix + key, good)
            await eventually(lambda: getattr(gateway.snapshot, kind))
            await client.put(etcd_prefix + key, value)
            await eventually(lambda: not getattr(gateway.snapshot, kind))
        assert (await etcd_cast.gateway()).snapshot == RegistrySnapshot()

    async def test_another_endpoint_takes_over(self, own_etcd, etcd_prefix, eventually):
        """The first endpoint is away from the start."""
        cast = Cast(lambda: EtcdRegistry(f"http://127.0.0.1:1,{own_etcd.url}", etcd_prefix, lease_s=2))
        gateway, registry = await cast.gateway(), await cast.worker()
        await registry.announce(worker())
        await eventually(lambda: gateway.connected and ids(gateway) == {"w1"})
        await cast.close()

    async def test_an_endpoint_by_name(self, own_etcd, etcd_prefix):
        cast = Cast(lambda: EtcdRegistry(f"http://localhost:{own_etcd.port}", etcd_prefix, lease_s=2))
        gateway = await cast.gateway()
        assert gateway.snapshot == RegistrySnapshot()
        await cast.close()

    async def test_tls(self, tmp_path, etcd_prefix, eventually):
        port = free_port()
        url, store = f"https://127.0.0.1:{port}", tmp_path / "data"
        flags = ["--data-dir", str(store), "--auto-tls", "--listen-client-urls", url, "--advertise-client-urls", url]
        peer = f"http://127.0.0.1:{free_port()}"
        flags += [
            "--listen-peer-urls",
            peer,
            "--initial-advertise-peer-urls",
            peer,
            "--initial-cluster",
            f"default={peer}",
        ]
        process = ManagedProcess("etcd-tls", [ETCD.find(), *flags], log_file=tmp_path / "log")
        await process.start()
        try:
            certificate = store / "fixtures" / "client" / "cert.pem"
            await eventually(certificate.is_file)
            registry = EtcdRegistry(EtcdAccess(url, EtcdTls(ca=certificate.read_bytes())), etcd_prefix, lease_s=2)
            await registry.start()
            await registry.announce(worker())
            await eventually(lambda: ids(registry) == {"w1"})
            await registry.close()
            stranger = EtcdRegistry(url, etcd_prefix, lease_s=2)
            await stranger.start(watch=False)
            with pytest.raises(Unavailable):
                await stranger.ping()
            await stranger.close()
        finally:
            await process.stop()

    async def test_ping_after_close(self, own_etcd, etcd_prefix):
        registry = EtcdRegistry(own_etcd.url, etcd_prefix)
        await registry.start()
        await registry.close()
        with pytest.raises(Unavailable):
            await registry.ping()
        assert not registry.connected

    async def test_nothing_is_left_running_after_close(self, own_etcd, etcd_prefix):
        before = asyncio.all_tasks()
        registry = EtcdRegistry(own_etcd.url, etcd_prefix, lease_s=2)
        await registry.start()
        announcement = await registry.announce(worker())
        await announcement.withdraw()
        await registry.announce(worker("w2"))
        await registry.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(20):
                while asyncio.all_tasks() - before:
                    await asyncio.sleep(0.01)
        assert asyncio.all_tasks() == before
