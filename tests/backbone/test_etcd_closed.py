"""Production's etcd towards strangers, and a version of it whose roles do not hold.

The wheel's etcd is 3.5.1. What is shown here of certificates needs no newer one; its roles do not hold, which is what is reported.
"""

from __future__ import annotations

import re
import ssl
from base64 import b64encode
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import structlog.testing
from typer.testing import CliRunner

from backbone.registry.auth import read_etcd_access
from backbone.registry.etcd import EtcdRegistry
from backbone.registry.version_check import is_vulnerable
from backbone.settings import CommonSettings
from cli.app import app
from tests.conftest import Eventually, running
from tests.deploy.production import ProductionEtcd, Secrets, gateway_settings

WITHOUT_LOGIN = (
    "/version",
    "/health",
    "/metrics",
    "/v3/cluster/member/list",
    "/v3/lease/grant",
    "/v3/lease/leases",
    "/v3/maintenance/alarm",
    "/v3/maintenance/status",
    "/v3/auth/authenticate",
)
"""What etcd 3.5.1 answers to callers who have not logged in."""


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Secrets:
    made = Secrets(tmp_path_factory.mktemp("secrets"))
    made.make()
    return made


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory, secrets: Secrets) -> Iterator[ProductionEtcd]:
    yield from running(ProductionEtcd(tmp_path_factory.mktemp("etcd"), secrets))


@pytest.fixture(scope="module")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> Secrets:
    """Another Nexus's."""
    made = Secrets(tmp_path_factory.mktemp("strangers"))
    made.make()
    return made


@pytest.mark.parametrize("path", WITHOUT_LOGIN)
async def test_a_neighbour_on_the_network_gets_no_answer(
    etcd: ProductionEtcd, secrets: Secrets, strangers: Secrets, path: str
) -> None:
    """Nobody without a certificate of this authority: no members, no lease, no alarm, no guess at a password."""
    with_theirs = ssl.create_default_context(cafile=secrets.file("ca/ca.crt"))
    with_theirs.load_cert_chain(strangers.file("worker/etcd-client.crt"), strangers.file("worker/etcd-client.key"))
    for context in (secrets.client_context, with_theirs):
        async with httpx.AsyncClient(base_url=etcd.url, verify=context, trust_env=False) as client:
            with pytest.raises((httpx.TransportError, ssl.SSLError)):  # the second in the midst of TLS 1.3
                await client.post(path, json={})


async def test_a_certificate_reads_no_key(etcd: ProductionEtcd, secrets: Secrets) -> None:
    """It names no user, not even where etcd would take its common name for one."""
    async with httpx.AsyncClient(base_url=etcd.url, verify=secrets.etcd_context("gateway"), trust_env=False) as client:
        answer = await client.post("/v3/kv/range", json={"key": "Lw=="})
    assert answer.status_code == 400
    assert "user name is empty" in answer.text


def b64(text: str) -> str:
    return b64encode(text.encode()).decode()


async def test_a_worker_gets_past_its_role_by_no_transaction(etcd: ProductionEtcd, secrets: Secrets) -> None:
    """With all that a worker has, on an etcd whose roles do not hold within transactions: each of them is refused."""
    alias = {"key": b64("/nexus/aliases/mine"), "value": b64('"mine"')}
    everything = {"key": b64("\0"), "range_end": b64("\0")}
    calls: list[Any] = [{"request_put": alias}, {"request_range": everything}, {"request_delete_range": everything}]
    own = {"key": b64("/nexus/workers/mine"), "value": b64("{}")}
    async with httpx.AsyncClient(base_url=etcd.url, verify=secrets.etcd_context("worker"), trust_env=False) as client:
        login = {"name": "worker", "password": secrets.text("worker/etcd-password")}
        client.headers["authorization"] = (await client.post("/v3/auth/authenticate", json=login)).json()["token"]
        assert (await client.post("/v3/kv/put", json=own)).status_code == 200
        for call in calls:
            for transaction in ({"success": [call]}, {"success": [{"request_txn": {"success": [call]}}]}):
                answer = await client.post("/v3/kv/txn", json=transaction)
                assert answer.status_code in {400, 403}, answer.text
                assert re.search("too many operations|permission denied", answer.text)
        login["name"], login["password"] = "root", secrets.text("admin/etcd-password")
        client.headers["authorization"] = (await client.post("/v3/auth/authenticate", json=login)).json()["token"]
        kept = (await client.post("/v3/kv/range", json=everything)).json()["kvs"]
        assert [one["key"] for one in kept] == [own["key"]]


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("3.4.45", True),
        ("3.5.1", True),
        ("3.5.16", True),
        ("3.5.32", True),
        ("3.5.33", False),
        ("3.5.34", False),
        ("3.6.0", True),
        ("3.6.13", True),
        ("3.6.14", False),
        ("3.6.16+git", False),
        ("3.7.0", False),
        ("4.0.1", False),
        ("", True),
        ("unknown", True),
    ],
)
def test_versions_whose_roles_hold(version: str, expected: bool) -> None:
    """By etcd's own advisories."""
    assert is_vulnerable(version) is expected


def production_settings(etcd: ProductionEtcd, values: dict[str, str]) -> CommonSettings:
    names: dict[str, Any] = {name.lower(): value for name, value in values.items() if name.startswith("ETCD_")}
    return CommonSettings(_env_file=None, etcd_url=etcd.url, **names)


async def test_a_gateway_reports_an_etcd_whose_roles_do_not_hold(
    etcd: ProductionEtcd, secrets: Secrets, eventually: Eventually
) -> None:
    """One line of its log, an error that says what to do; once, however often etcd comes and goes."""
    registry = EtcdRegistry(read_etcd_access(production_settings(etcd, gateway_settings(secrets))))
    with structlog.testing.capture_logs() as logs:
        await registry.start()
        try:
            await eventually(lambda: [line for line in logs if line["event"] == "registry.etcd_version_vulnerable"])
        finally:
            await registry.close()
    [line] = [line for line in logs if line["event"] == "registry.etcd_version_vulnerable"]
    assert line["log_level"] == "error"
    assert line["version"].startswith("3.5.")
    assert "3.5.33" in line["advice"]


def test_the_command_that_makes_the_roles_says_that_they_do_not_hold(
    etcd: ProductionEtcd, secrets: Secrets, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`nexus permissions etcd`, which docker-compose.prod.yml runs at each start."""
    monkeypatch.setenv("ETCD_URL", etcd.url)
    monkeypatch.setenv("ETCD_TLS_CA", secrets.file("admin/ca.crt"))
    monkeypatch.setenv("ETCD_TLS_CERT", secrets.file("admin/etcd-client.crt"))
    monkeypatch.setenv("ETCD_TLS_KEY", secrets.file("admin/etcd-client.key"))
    files = {"root": "etcd-password", "gateway": "etcd-gateway-password", "worker": "etcd-worker-password"}
    options = [f"--{user}-password-file={secrets.file(f'admin/{file}')}" for user, file in files.items()]
    done = CliRunner().invoke(app, ["permissions", "etcd", *options])
    assert done.exit_code == 0, done.output
    assert "THESE ROLES ARE NOT ENFORCED: etcd 3.5." in done.stderr
