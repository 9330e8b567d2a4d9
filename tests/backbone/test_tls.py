"""Getting into secured servers: certificates, users, passwords; and what a process says when it is not let in."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import secrets as secrets_module
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import nkeys
import pytest
from pydantic import SecretStr

from backbone.bus.nats.auth import NatsAccess, read_nats_access
from backbone.bus.nats.connection import NatsConnection
from backbone.registry.auth import EtcdAccess, read_etcd_access
from backbone.registry.etcd import EtcdRegistry
from backbone.registry.etcd_client import EtcdClient
from backbone.registry.users import create_users
from backbone.secret_files import ConfigurationError
from backbone.settings import CommonSettings
from backbone.store.auth import read_redis_access
from backbone.store.redis import RedisStore
from cli.embedded.servers import NatsServer
from schemas.errors import Unavailable
from schemas.jobs import Capability
from schemas.presence import Alias, ModelOffer, WorkerPresence, WorkerState
from tests.conftest import Eventually, running
from tests.deploy.production import (
    ProductionEtcd,
    ProductionNats,
    ProductionRedis,
    Secrets,
    gateway_settings,
    worker_settings,
)
from tests.servers import ROOT


def settings(**values: Any) -> CommonSettings:
    """Settings from these variables alone."""
    return CommonSettings(_env_file=None, **{name.lower(): value for name, value in values.items()})


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Secrets:
    made = Secrets(tmp_path_factory.mktemp("secrets"))
    made.make()
    return made


@pytest.fixture(scope="module")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> Secrets:
    """Another authority's."""
    made = Secrets(tmp_path_factory.mktemp("strangers"))
    made.make()
    return made


@pytest.fixture(scope="module")
def secure_nats(tmp_path_factory: pytest.TempPathFactory, secrets: Secrets) -> Iterator[ProductionNats]:
    yield from running(ProductionNats(tmp_path_factory.mktemp("nats"), secrets))


@pytest.fixture
def secure_etcd(tmp_path: Path, secrets: Secrets) -> Iterator[ProductionEtcd]:
    yield from running(ProductionEtcd(tmp_path / "etcd", secrets))


@pytest.fixture(scope="module")
def secure_redis(tmp_path_factory: pytest.TempPathFactory, secrets: Secrets) -> Iterator[ProductionRedis]:
    yield from running(ProductionRedis(tmp_path_factory.mktemp("redis"), secrets))


# NATS


def nats_settings(server: ProductionNats, secrets: Secrets, **values: str) -> NatsAccess:
    return read_nats_access(settings(**{"NATS_URL": server.url} | _of("NATS", gateway_settings(secrets)) | values))


def _of(name: str, values: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in values.items() if key.startswith(name)}


async def test_nats_with_tls_user_and_password_file(secure_nats: ProductionNats, secrets: Secrets) -> None:
    """A process gets in, and its inboxes are its user's own."""
    connection = NatsConnection(nats_settings(secure_nats, secrets), "test")
    await connection.connect()
    try:
        await connection.ping()
        assert connection.new_inbox().startswith("_INBOX.gateway.")
    finally:
        await connection.close()


REFUSED = {
    "wrong password": (
        {"NATS_PASSWORD_FILE": "", "NATS_PASSWORD": "wr0ng-secret"},
        "check NATS_USER and NATS_PASSWORD",
    ),
    "no user": ({"NATS_PASSWORD_FILE": "", "NATS_USER": ""}, "check NATS_USER and NATS_PASSWORD"),
    "another authority": ({"NATS_TLS_CA": "STRANGER"}, "check NATS_TLS_CA"),
    "the system's authorities": ({"NATS_TLS_CA": ""}, "check NATS_TLS_CA"),
}


@pytest.mark.parametrize("why", REFUSED)
async def test_nats_refuses_and_the_error_says_what_to_do(
    secure_nats: ProductionNats, secrets: Secrets, strangers: Secrets, why: str
) -> None:
    """At once, not after all retries; without the password."""
    values, expected = REFUSED[why]
    values = {name: strangers.file("ca/ca.crt") if value == "STRANGER" else value for name, value in values.items()}
    connection = NatsConnection(nats_settings(secure_nats, secrets, **values), "test")
    with pytest.raises(Unavailable, match=expected) as caught:
        await asyncio.wait_for(connection.connect(timeout_s=60), 20)
    assert "wr0ng-secret" not in str(caught.value)


async def test_no_password_is_sent_without_tls(nats_url: str, secrets: Secrets) -> None:
    """A server, or somebody in between, that says it has no TLS, is not believed."""
    access = read_nats_access(settings(NATS_URL=nats_url, **_of("NATS_", gateway_settings(secrets))))
    with pytest.raises(Unavailable, match="offers no TLS"):
        await NatsConnection(access, "test").connect()


async def test_a_password_in_the_url_is_not_told(nats_url: str) -> None:
    """Errors name the server, never what stands before the `@`."""
    connection = NatsConnection("nats://me:s3cret-word@127.0.0.1:1", "test")
    with pytest.raises(Unavailable) as caught:
        await connection.connect(timeout_s=0.5)
    assert "127.0.0.1:1" in str(caught.value)
    assert "s3cret-word" not in str(caught.value)


async def test_a_changed_password_needs_no_restart(tmp_path: Path, eventually: Eventually) -> None:
    """nats-server drops whom a reload denies; the client reads its file again, and comes back."""
    own = Secrets(tmp_path / "secrets")
    own.make()
    server = ProductionNats(tmp_path / "nats", own)
    await server.start()
    connection = NatsConnection(nats_settings(server, own), "test")
    await connection.connect()
    try:
        reconnects = connection.client.stats["reconnects"]
        own.make("--rotate", "nats-gateway")
        server.reload()
        await eventually(lambda: connection.connected and connection.client.stats["reconnects"] > reconnects)
        await connection.ping()
    finally:
        await connection.close()
        await server.stop()


async def test_the_next_server_is_tried(secure_nats: ProductionNats, secrets: Secrets) -> None:
    """One that is away costs nothing but a moment."""
    connection = NatsConnection(
        nats_settings(secure_nats, secrets, NATS_URL=f"tls://127.0.0.1:1,{secure_nats.url}"), "test"
    )
    await connection.connect()
    await connection.ping()
    await connection.close()


# etcd


def etcd_for(server: ProductionEtcd, values: dict[str, str], **more: str) -> EtcdAccess:
    return read_etcd_access(settings(**{"ETCD_URL": server.url} | _of("ETCD", values) | more))


@asynccontextmanager
async def registry(access: EtcdAccess, **options: Any) -> AsyncIterator[EtcdRegistry]:
    made = EtcdRegistry(access, "/nexus/", lease_s=2, **options)
    await made.start()
    try:
        yield made
    finally:
        await made.close()


@asynccontextmanager
async def link(access: EtcdAccess) -> AsyncIterator[EtcdClient]:
    made = EtcdClient(access.url, probe_key="/nexus/workers/", tls=access.tls, login=access.login)
    await made.open()
    try:
        yield made
    finally:
        await made.close()


def presence(name: str) -> WorkerPresence:
    return WorkerPresence(
        id=name,
        backend="echo",
        host="here",
        pid=1,
        version="0",
        slots=1,
        busy=0,
        models=(ModelOffer(name="m", capabilities=(Capability.CHAT,)),),
        state=WorkerState.READY,
    )


async def test_a_worker_announces_itself_to_a_gateway(
    secure_etcd: ProductionEtcd, secrets: Secrets, eventually: Eventually
) -> None:
    """Each with its own user, over TLS; after a restart of etcd, which forgets every login, again."""
    gateway_access = etcd_for(secure_etcd, gateway_settings(secrets))
    worker_access = etcd_for(secure_etcd, worker_settings(secrets))
    async with registry(gateway_access) as gateway, registry(worker_access, services_only=True) as worker:
        await worker.announce(presence("w1"))

        def seen(name: str) -> Callable[[], bool]:
            return lambda: gateway.snapshot is not None and name in gateway.snapshot.workers

        await eventually(seen("w1"))
        await eventually(lambda: gateway.snapshot is not None and "m" in gateway.snapshot.models)
        await secure_etcd.restart()
        await worker.announce(presence("w2"))
        await eventually(seen("w2"))
        await gateway.put_alias(Alias(name="a", targets=("m",)))
        await eventually(lambda: gateway.snapshot is not None and "a" in gateway.snapshot.aliases)
        await eventually(seen("w1"))


async def test_a_login_is_renewed_when_rights_change(secure_etcd: ProductionEtcd, secrets: Secrets) -> None:
    """etcd refuses a token that is older than the newest change of users: the call is made again under a new one."""
    access = etcd_for(secure_etcd, worker_settings(secrets))
    async with link(access) as worker:
        await worker.put("/nexus/workers/x", b"1")
        for prefix in ("/other/", "/nexus/"):
            assert await create_users(access, prefix, secrets.etcd_passwords) is False
        await worker.put("/nexus/workers/x", b"2")
        await asyncio.gather(*(worker.get("/nexus/workers/x") for _ in range(20)))


async def test_what_is_as_it_should_be_costs_nobody_a_login(secure_etcd: ProductionEtcd, secrets: Secrets) -> None:
    """Users are made at each start of the compose project: a thousand workers that log in at once would lose their leases."""
    access = etcd_for(secure_etcd, worker_settings(secrets))
    async with link(access) as worker:
        await worker.put("/nexus/workers/x", b"1")
        token = worker._token
        assert await create_users(access, "/nexus/", secrets.etcd_passwords) is False
        await worker.put("/nexus/workers/x", b"2")
        assert worker._token == token


async def test_a_login_that_nobody_used_is_renewed(tmp_path: Path, secrets: Secrets) -> None:
    """A token expires by itself; anyone who meets that logs in again."""
    server = ProductionEtcd(tmp_path / "etcd", secrets, token_ttl_s=1)
    await server.start()
    try:
        async with link(etcd_for(server, worker_settings(secrets))) as worker:
            first = worker._token
            worker._tasks[0].cancel()  # its probes are what keeps a token
            await asyncio.sleep(3.5)
            await worker.put("/nexus/workers/x", b"1")
            assert worker._token != first
    finally:
        await server.stop()


@pytest.mark.parametrize(
    ("key", "writes", "reads"),
    [
        ("/nexus/workers/w", True, True),
        ("/nexus/models/m", True, True),
        ("/nexus/services/s", False, True),
        ("/nexus/aliases/a", False, False),
        ("/nexus/", False, False),
        ("/other", False, False),
    ],
)
async def test_what_a_worker_may_do_in_etcd(
    shared_etcd: ProductionEtcd, secrets: Secrets, key: str, writes: bool, reads: bool
) -> None:
    """It writes presence and the catalog, reads services, and sees nothing else."""
    async with link(etcd_for(shared_etcd, worker_settings(secrets))) as worker:
        await _expect(writes, worker.put(key, b"x"))
        await _expect(writes, worker.delete(key))
        await _expect(reads, worker.get(key))


async def test_what_a_gateway_may_do_in_etcd(shared_etcd: ProductionEtcd, secrets: Secrets) -> None:
    """It reads all of Nexus, writes aliases and services, and sees nothing else."""
    async with link(etcd_for(shared_etcd, gateway_settings(secrets))) as gateway:
        await _expect(True, gateway.list_prefix("/nexus/"))
        await _expect(True, gateway.put("/nexus/aliases/a", b"x"))
        await _expect(True, gateway.put("/nexus/services/a", b"x"))
        await _expect(False, gateway.put("/nexus/workers/w", b"x"))
        await _expect(False, gateway.list_prefix("/"))


async def _expect(allowed: bool, call: Any) -> None:
    if allowed:
        await call
        return
    with pytest.raises(Unavailable, match=r"permission denied; grant this user's role the permissions in deploy/etcd"):
        await call


@pytest.fixture(scope="module")
def shared_etcd(tmp_path_factory: pytest.TempPathFactory, secrets: Secrets) -> Iterator[ProductionEtcd]:
    yield from running(ProductionEtcd(tmp_path_factory.mktemp("etcd"), secrets))


ETCD_REFUSED = {
    "wrong password": (
        {"ETCD_PASSWORD_FILE": "", "ETCD_PASSWORD": "wr0ng-secret"},
        "check ETCD_USER and ETCD_PASSWORD",
    ),
    "no user": ({"ETCD_PASSWORD_FILE": "", "ETCD_USER": ""}, "set ETCD_USER and ETCD_PASSWORD"),
    "another authority": ({"ETCD_TLS_CA": "STRANGER"}, "check ETCD_TLS_CA"),
    "no certificate": (
        {"ETCD_TLS_CERT": "", "ETCD_TLS_KEY": ""},
        "requires a client certificate: set ETCD_TLS_CERT and ETCD_TLS_KEY",
    ),
}


@pytest.mark.parametrize("why", ETCD_REFUSED)
async def test_etcd_refuses_and_the_error_says_what_to_do(
    shared_etcd: ProductionEtcd, secrets: Secrets, strangers: Secrets, why: str
) -> None:
    """Without the password, and without retrying at once: each login costs etcd's processor."""
    values, expected = ETCD_REFUSED[why]
    values = {name: strangers.file("ca/ca.crt") if value == "STRANGER" else value for name, value in values.items()}
    async with link(etcd_for(shared_etcd, worker_settings(secrets), **values)) as worker:
        with pytest.raises(Unavailable, match=expected) as caught:
            await worker.get("/nexus/workers/w")
        assert "wr0ng-secret" not in str(caught.value)
        assert not worker.connected


async def test_the_next_endpoint_is_tried(
    shared_etcd: ProductionEtcd, secrets: Secrets, eventually: Eventually
) -> None:
    """Several endpoints: the first is away, the second answers, over TLS and with a login."""
    access = etcd_for(shared_etcd, worker_settings(secrets), ETCD_URL=f"https://127.0.0.1:1,{shared_etcd.url}")
    async with link(access) as worker:
        await eventually(lambda: worker.connected)
        await worker.put("/nexus/workers/x", b"1")


async def test_a_user_for_an_etcd_without_users(etcd_url: str) -> None:
    """It says so."""
    access = read_etcd_access(settings(ETCD_URL=etcd_url, ETCD_USER="me", ETCD_PASSWORD="x"))
    async with link(access) as made:
        with pytest.raises(Unavailable, match=r"not enabled.*remove ETCD_USER"):
            await made.get("/nexus/workers/w")


# Redis: the wheel's Valkey has no TLS, so a real TLS end stands before it.


@asynccontextmanager
async def tls_before(port: int, secrets: Secrets) -> AsyncIterator[int]:
    """A port that speaks TLS and passes on to `port`."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(secrets.file("redis/redis.crt"), secrets.file("redis/redis.key"))

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        finally:
            writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        back_reader, back_writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(copy(reader, back_writer), copy(back_reader, writer), return_exceptions=True)

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


@asynccontextmanager
async def store(**values: str) -> AsyncIterator[RedisStore]:
    made = RedisStore(read_redis_access(settings(**values)))
    try:
        yield made
    finally:
        await made.close()


async def test_redis_with_tls_user_and_password_file(secure_redis: ProductionRedis, secrets: Secrets) -> None:
    """And the user has its own keys alone."""
    async with (
        tls_before(secure_redis.port, secrets) as port,
        store(REDIS_URL=f"rediss://gateway@127.0.0.1:{port}/0", **_redis(secrets)) as made,
    ):
        await made.ping()
        connection = made.connection
        await connection.call(lambda: connection._pipeline.execute("SET", "nexus:x", "1"))
        for command in (("SET", "other", "1"), ("FLUSHALL",), ("CONFIG", "GET", "*"), ("KEYS", "*"), ("ACL", "LIST")):
            with pytest.raises(Unavailable, match="deploy/redis"):
                await connection.call(partial(connection._pipeline.execute, *command))


def _redis(secrets: Secrets) -> dict[str, str]:
    return {
        "REDIS_PASSWORD_FILE": secrets.file("gateway/redis-password"),
        "REDIS_TLS_CA": secrets.file("gateway/ca.crt"),
    }


async def test_redis_refuses_and_the_error_says_what_to_do(
    secure_redis: ProductionRedis, secrets: Secrets, strangers: Secrets
) -> None:
    """Another authority, a wrong password, none."""
    async with tls_before(secure_redis.port, secrets) as port:
        url = f"rediss://gateway@127.0.0.1:{port}/0"
        for values, expected in (
            ({"REDIS_URL": url, **_redis(secrets), "REDIS_TLS_CA": strangers.file("ca/ca.crt")}, "check REDIS_TLS_CA"),
            ({"REDIS_URL": f"redis://gateway:wr0ng-secret@127.0.0.1:{secure_redis.port}/0"}, "REDIS_PASSWORD_FILE"),
            ({"REDIS_URL": f"redis://127.0.0.1:{secure_redis.port}/0"}, "REDIS_PASSWORD_FILE"),
        ):
            async with store(**values) as made:
                with pytest.raises(Unavailable, match=expected) as caught:
                    await made.ping()
                assert "wr0ng-secret" not in str(caught.value)


# Settings that cannot work


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"NATS_USER": "me"}, "NATS_USER and NATS_PASSWORD"),
        (
            {"NATS_USER": "me", "NATS_PASSWORD_FILE": "/nowhere"},
            "NATS_PASSWORD_FILE: /nowhere cannot be read: No such file",
        ),
        ({"NATS_USER": "me", "NATS_PASSWORD": "x", "NATS_PASSWORD_FILE": "/nowhere"}, "both set"),
        ({"NATS_CREDS_FILE": "/nowhere"}, "NATS_CREDS_FILE: /nowhere cannot be read"),
        ({"NATS_TLS_CA": "/nowhere"}, "NATS_TLS_CA: /nowhere cannot be read"),
        ({"NATS_TLS_CA": "/etc/hostname"}, "NATS_TLS_CA: /etc/hostname contains no certificate"),
        ({"NATS_TLS_CERT": "/etc/hostname"}, "NATS_TLS_CERT and NATS_TLS_KEY belong together"),
        ({"NATS_INBOX_PREFIX": "a.*"}, "NATS_INBOX_PREFIX"),
        ({"ETCD_USER": "me"}, "ETCD_USER and ETCD_PASSWORD"),
        ({"ETCD_TLS_CA": "/nowhere"}, "ETCD_URL is not https"),
        ({"ETCD_URL": "https://x", "ETCD_TLS_CA": "/nowhere"}, "ETCD_TLS_CA: /nowhere cannot be read"),
        ({"ETCD_URL": "https://x", "ETCD_TLS_CA": "/etc/hostname"}, "contains no certificate"),
        ({"REDIS_TLS_CA": "/nowhere"}, "REDIS_URL is not rediss"),
        ({"REDIS_URL": "rediss://x", "REDIS_TLS_CA": "/nowhere"}, "REDIS_TLS_CA: /nowhere cannot be read"),
        ({"REDIS_PASSWORD_FILE": "/nowhere"}, "REDIS_PASSWORD_FILE: /nowhere cannot be read"),
    ],
)
def test_settings_that_cannot_work_are_named(values: dict[str, str], expected: str) -> None:
    """The message names the setting, and what to do."""
    with pytest.raises(ConfigurationError, match=expected):
        made = settings(**values)
        read_nats_access(made)
        read_etcd_access(made)
        read_redis_access(made)


def test_nothing_set_is_an_open_server() -> None:
    """As `nexus up` has them; empty variables count as not set."""
    made = settings(NATS_USER="", NATS_PASSWORD=SecretStr(""), ETCD_PASSWORD=SecretStr(""), REDIS_PASSWORD_FILE="")
    assert read_nats_access(made) == NatsAccess("nats://127.0.0.1:4222")
    assert read_etcd_access(made) == EtcdAccess("http://127.0.0.1:2379")
    assert read_redis_access(made).credentials is None


@pytest.mark.parametrize("module", ["gateway", "workers"])
def test_a_process_says_it_in_one_line(module: str, secure_nats: ProductionNats, secrets: Secrets) -> None:
    """A wrong password: one line in its log, an exit status, no traceback, no password."""
    values = {
        "NATS_URL": secure_nats.url,
        "NATS_TLS_CA": secrets.file("ca/ca.crt"),
        "NATS_USER": "gateway",
        "NATS_PASSWORD": "wr0ng-secret",
        "GATEWAY_PORT": "0",
        "OBSERVABILITY_PORT": "0",
        "GATEWAY_BEARER_TOKEN": "x",
    }
    done = subprocess.run(
        [sys.executable, "-m", module],
        env=os.environ | values,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    said = [line for line in done.stdout.splitlines() if "NATS" in line]
    assert done.returncode == 1, done.stdout + done.stderr
    assert len(said) == 1, done.stdout
    assert "check NATS_USER and NATS_PASSWORD" in said[0]
    assert "wr0ng-secret" not in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


# A user with a JWT


def jwt(signer: Any, subject: str, kind: str, claims: dict[str, Any]) -> str:
    """A token as `nsc` makes it."""

    def part(value: dict[str, Any]) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()

    body = {
        "jti": "1",
        "iat": 1,
        "iss": signer.public_key.decode(),
        "sub": subject,
        "name": kind,
        "nats": {"type": kind, "version": 2} | claims,
    }
    head = f"{part({'typ': 'JWT', 'alg': 'ed25519-nkey'})}.{part(body)}"
    return f"{head}.{base64.urlsafe_b64encode(signer.sign(head.encode())).rstrip(b'=').decode()}"


def new_keys(prefix: int) -> Any:
    return nkeys.from_seed(nkeys.encode_seed(secrets_module.token_bytes(32), prefix))


async def test_nats_with_a_credentials_file(tmp_path: Path) -> None:
    """A user's JWT and seed, as an operator's `nsc` writes them; its inboxes are as the setting says."""
    operator, account, user = (
        new_keys(prefix) for prefix in (nkeys.PREFIX_BYTE_OPERATOR, nkeys.PREFIX_BYTE_ACCOUNT, nkeys.PREFIX_BYTE_USER)
    )
    account_key, user_key = account.public_key.decode(), user.public_key.decode()
    limits = {"subs": -1, "data": -1, "payload": -1}
    of_account = {"limits": limits | {"conn": -1, "leaf": -1, "imports": -1, "exports": -1, "wildcards": True}}
    of_user = limits | {"pub": {"allow": [">"]}, "sub": {"allow": ["_INBOX.jwt.>"]}}
    config = (
        f"operator: {jwt(operator, operator.public_key.decode(), 'operator', {})}\n"
        "resolver: MEMORY\n"
        f"resolver_preload: {{ {account_key}: {jwt(operator, account_key, 'account', of_account)} }}\n"
    )
    creds = tmp_path / "user.creds"
    creds.write_text(
        f"-----BEGIN NATS USER JWT-----\n{jwt(account, user_key, 'user', of_user)}\n------END NATS USER JWT------\n\n"
        f"-----BEGIN USER NKEY SEED-----\n{user.seed.decode()}\n------END USER NKEY SEED------\n"
    )

    class OperatorNats(NatsServer):
        def _config(self) -> str:
            return f'server_name: {self._identity}\nhost: "127.0.0.1"\nport: {self.port}\n{config}'

        async def _is_ready(self) -> bool:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            line = await reader.readline()
            writer.close()
            return line.startswith(b"INFO ")

    server = OperatorNats(tmp_path / "nats")
    await server.start()
    try:
        connection = NatsConnection(
            read_nats_access(settings(NATS_URL=server.url, NATS_CREDS_FILE=str(creds), NATS_INBOX_PREFIX="_INBOX.jwt")),
            "test",
        )
        await connection.connect()
        heard = asyncio.Event()
        inbox = connection.new_inbox()
        await connection.subscribe(inbox, lambda *_: heard.set())
        connection.publish(inbox.encode(), b"x")
        await asyncio.wait_for(heard.wait(), 10)
        await connection.close()
    finally:
        await server.stop()
