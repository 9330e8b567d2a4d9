"""What a person sees who starts a worker or a gateway by hand and something is wrong: a sentence, and an exit code.

On real terminals, with real servers. Elsewhere the same is one JSON object a line.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import pytest_asyncio

from backbone.terminal_log import SENTENCES
from cli.embedded.servers import EtcdServer, NatsServer, RedisServer
from tests.backends.doubles.openai import OpenAIDouble
from tests.conftest import running
from tests.deploy.production import (
    ProductionEtcd,
    ProductionNats,
    ProductionRedis,
    Secrets,
    gateway_settings,
    worker_settings,
)
from tests.servers import ROOT
from tests.terminal import Seen, on_terminal

pytestmark = pytest.mark.asyncio(loop_scope="module")

MACHINE = re.compile(
    r"Traceback|^\s*File \"|\{\"|AioRpcError|UNAVAILABLE|status = |pydantic|input_value|\[Errno|failed after \d+ attempts|"
    r"goroutine|\b[A-Za-z]+Error\b|event=|error=",
    re.MULTILINE,
)
"""What only a program, or its author, reads."""


@dataclass(frozen=True, slots=True)
class Case:
    """Something wrong, and what is to be said of it. `{dead}` is an address at which nobody listens."""

    name: str
    command: str
    settings: dict[str, str]
    says: tuple[str, ...]
    """Patterns, all of which stand on the terminal."""
    code: int | None
    """None: it goes on, since what is away may come back."""
    servers: str = "open"
    files: dict[str, str] = field(default_factory=dict)


WORKER, GATEWAY = "-m workers", "-m gateway"
NEXUS_WORKER, NEXUS_GATEWAY = "-m cli.main worker", "-m cli.main gateway"
CASES = [
    # Settings
    *(
        Case(
            f"a setting is wrong: {command}",
            command,
            {name: value},
            (rf"^nexus: {name} is '{value}' \(in the environment\): it must be {must}\.$",),
            2,
        )
        for command, name, value, must in (
            (WORKER, "WORKER_CONCURRENCY", "four", "a whole number"),
            (NEXUS_WORKER, "WORKER_CONCURRENCY", "four", "a whole number"),
            (GATEWAY, "GATEWAY_PORT", "99999", "at most 65535"),
            (NEXUS_GATEWAY, "ACK_WAIT_S", "0", "more than 0"),
            (GATEWAY, "FETCH_MEDIA", "perhaps", "true or false"),
            (NEXUS_WORKER, "LOG_LEVEL", "loud", "one of 'debug', 'info', 'warning' or 'error'"),
        )
    ),
    Case(
        "a setting in .env is wrong",
        WORKER,
        {},
        (r"^nexus: WORKER_DRAIN_S is 'soon' \(in /.*/\.env\): it must be a number\.$",),
        2,
        files={".env": "WORKER_DRAIN_S=soon\n"},
    ),
    Case(
        "several settings are wrong, the shared ones among them",
        NEXUS_WORKER,
        {"ACK_WAIT_S": "x", "WORKER_LEASE_S": "1"},
        (r"ACK_WAIT_S is 'x'", r"WORKER_LEASE_S is '1' .*at least 2"),
        2,
    ),
    Case(
        "a flag is wrong",
        f"{NEXUS_GATEWAY} --port 70000",
        {},
        (r"^nexus: GATEWAY_PORT is '70000' \(on the command line\): it must be at most 65535\.$",),
        2,
    ),
    Case(
        "a list is wrong", GATEWAY, {"PUBLIC_ROUTES": "metrics,x"}, (r"PUBLIC_ROUTES .* contains 'x'; allowed are",), 2
    ),
    Case(".env is no text", WORKER, {}, (r"\.env cannot be read: it is not text",), 2, files={".env": "\udcff"}),
    Case(
        "a secret's file is missing",
        WORKER,
        {"NATS_USER": "u", "NATS_PASSWORD_FILE": "/nowhere/secret"},
        (r"^nexus: NATS_PASSWORD_FILE: /nowhere/secret cannot be read: No such file",),
        2,
    ),
    Case(
        "the key's file cannot be made",
        GATEWAY,
        {"GATEWAY_BEARER_TOKEN_FILE": "/proc/nexus/key"},
        (r"^nexus: GATEWAY_BEARER_TOKEN_FILE: .*/proc/nexus/key",),
        2,
    ),
    *(
        Case(f"{name} is none", command, {name: value}, (rf"^nexus: {name} .*(must look like|an etcd URL is) .*",), 2)
        for name, command, value in (
            ("NATS_URL", WORKER, "foo://bar baz"),
            ("NATS_URL", GATEWAY, "nats://host:99999"),
            ("ETCD_URL", WORKER, "ftp://etcd"),
            ("REDIS_URL", GATEWAY, "http://redis"),
            ("REDIS_URL", GATEWAY, "redis://h:port"),
        )
    ),
    # The backend
    Case("no such backend", WORKER, {"WORKER_BACKEND": "olama"}, (r"called 'olama'\. Did you mean 'ollama'\?",), 2),
    Case("the same by a flag", f"{NEXUS_WORKER} -b olama", {}, (r"there is no backend called 'olama'.* ollama",), 2),
    Case(
        "a backend without its URL",
        f"{NEXUS_WORKER} --backend openai",
        {},
        (r"^nexus: WORKER_BACKEND_URL \(--url\) is not set, and the backend 'openai' needs it: .*http://host:port",),
        2,
    ),
    Case(
        "a backend's URL that is none",
        WORKER,
        {"WORKER_BACKEND": "openai", "WORKER_BACKEND_URL": "ftp://x"},
        (r"WORKER_BACKEND_URL \(--url\) is 'ftp://x'",),
        2,
    ),
    Case(
        "the backend's server is away",
        WORKER,
        {"WORKER_BACKEND": "openai", "WORKER_BACKEND_URL": "http://{dead}"},
        (
            r"The inference server cannot be used: no connection to http://{dead}: Connection refused\. The worker retries",
        ),
        None,
    ),
    Case(
        "the server lacks the model",
        WORKER,
        {"WORKER_BACKEND": "openai", "WORKER_BACKEND_URL": "{openai}", "WORKER_MODELS": "no-such-model"},
        (r"The inference server cannot be used: the backend lacks no-such-model; it has .*The worker retries",),
        None,
    ),
    # Servers that are away, or other ones
    *(
        Case(
            f"NATS is away: {command}",
            command,
            {"NATS_URL": "nats://{dead}"},
            (
                r"^nexus: NATS does not answer at nats://{dead}: Connection refused\. Is it running\? NATS_URL .*`nexus up`",
            ),
            1,
        )
        for command in (WORKER, NEXUS_WORKER, GATEWAY, NEXUS_GATEWAY)
    ),
    Case(
        "etcd is away",
        WORKER,
        {"ETCD_URL": "http://{dead}"},
        (r"etcd at {dead} did not answer: the connection was refused\. .*ETCD_URL .*Retrying",),
        None,
    ),
    Case(
        "etcd is away from a gateway",
        GATEWAY,
        {"ETCD_URL": "http://{dead}"},
        (r"etcd at {dead} did not answer: the connection was refused",),
        None,
    ),
    Case(
        "Redis is away",
        GATEWAY,
        {"REDIS_URL": "redis://{dead}/0"},
        (r"Redis cannot be used: .*{dead}.*Is it running\? REDIS_URL .*Jobs, API keys and files are unavailable",),
        None,
    ),
    Case("NATS is another server", WORKER, {"NATS_URL": "nats://{etcd}"}, (r"no NATS server answers there",), 1),
    Case("etcd is another server", WORKER, {"ETCD_URL": "http://{nats}"}, (r"the server there is not etcd",), None),
    Case(
        "Redis is another server", GATEWAY, {"REDIS_URL": "redis://{nats}"}, (r"the server there is not Redis",), None
    ),
    # Servers that do not let us in
    Case(
        "NATS: wrong password",
        WORKER,
        {"NATS_PASSWORD_FILE": "", "NATS_PASSWORD": "wr0ng-secret"},
        (r"^nexus: NATS at .* refuses this user or its password: check NATS_USER and NATS_PASSWORD",),
        1,
        "closed",
    ),
    Case(
        "NATS: another authority",
        GATEWAY,
        {"NATS_TLS_CA": "{stranger}"},
        (r"^nexus: NATS at .* has an untrusted certificate .*check NATS_TLS_CA",),
        1,
        "closed",
    ),
    Case(
        "etcd: wrong password",
        WORKER,
        {"ETCD_PASSWORD_FILE": "", "ETCD_PASSWORD": "wr0ng-secret"},
        (r"etcd at \S+ refuses this user or its password: check ETCD_USER and ETCD_PASSWORD",),
        None,
        "closed",
    ),
    Case(
        "etcd: another authority",
        WORKER,
        {"ETCD_TLS_CA": "{stranger}"},
        (r"etcd at \S+ did not answer: its certificate is not trusted; check ETCD_TLS_CA",),
        None,
        "closed",
    ),
    Case(
        "etcd: no certificate of one's own",
        GATEWAY,
        {"ETCD_TLS_CERT": "", "ETCD_TLS_KEY": ""},
        (r"etcd at \S+ did not answer: it requires a client certificate.*set ETCD_TLS_CERT and ETCD_TLS_KEY",),
        None,
        "closed",
    ),
    Case(
        "Redis: wrong password",
        GATEWAY,
        {"REDIS_PASSWORD_FILE": "", "REDIS_URL": "redis://gateway:wr0ng-secret@{redis}/0"},
        (r"Redis cannot be used: .*check the user in REDIS_URL, and its password",),
        None,
        "closed",
    ),
    Case(
        "Redis: an authority for a URL without TLS",
        GATEWAY,
        {"REDIS_TLS_CA": "{stranger}"},
        (r"^nexus: REDIS_TLS_CA is set, but REDIS_URL is not rediss://: nothing would be encrypted$",),
        2,
        "closed",
    ),
    # Ports
    *(
        Case(
            f"the port is in use: {setting}",
            command,
            {setting: "{taken}"},
            (
                rf"^nexus: port {{taken}} on 127\.0\.0\.1 is in use by \S+ \(pid {os.getpid()}\)\. Choose another port",
                rf"another port with {setting} \({flag}\), or stop that program\.$",
            ),
            2,
        )
        for command, setting, flag in (
            (GATEWAY, "GATEWAY_PORT", "--port"),
            (NEXUS_GATEWAY, "OBSERVABILITY_PORT", "--observability-port"),
            (NEXUS_WORKER, "WORKER_OBSERVABILITY_PORT", "--observability-port"),
        )
    ),
    Case(
        "an address of another machine",
        GATEWAY,
        {"GATEWAY_HOST": "192.0.2.1"},
        (r"has no address 192\.0\.2\.1.*_HOST",),
        2,
    ),
    # Nothing wrong
    Case("a worker", NEXUS_WORKER, {}, (r"^\d\d:\d\d:\d\d  Serving echo with 4 slots\.$",), None),
    Case("a gateway", NEXUS_GATEWAY, {}, (r"^\d\d:\d\d:\d\d  The gateway is up: http://127\.0\.0\.1:\d+/v1 ",), None),
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Secrets, Secrets]:
    """Ours, and another authority's."""
    both = Secrets(tmp_path_factory.mktemp("secrets")), Secrets(tmp_path_factory.mktemp("strangers"))
    for one in both:
        one.make()
    return both


@pytest.fixture(scope="module")
def open_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    folder = tmp_path_factory.mktemp("open")
    for nats in running(NatsServer(folder / "nats")):
        for etcd in running(EtcdServer(folder / "etcd")):
            for redis in running(RedisServer(folder / "redis")):
                yield {"NATS_URL": nats.url, "ETCD_URL": etcd.url, "REDIS_URL": redis.url}


@pytest.fixture(scope="module")
def closed_servers(
    tmp_path_factory: pytest.TempPathFactory, secrets: tuple[Secrets, Secrets]
) -> Iterator[dict[str, str]]:
    folder, ours = tmp_path_factory.mktemp("closed"), secrets[0]
    for nats in running(ProductionNats(folder / "nats", ours)):
        for etcd in running(ProductionEtcd(folder / "etcd", ours)):
            for redis in running(ProductionRedis(folder / "redis", ours)):
                yield {"NATS_URL": nats.url, "ETCD_URL": etcd.url, "REDIS_URL": redis.url}


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def openai() -> AsyncIterator[str]:
    async with OpenAIDouble() as double:
        yield double.url


@pytest.fixture
def urls(case: Case, request: pytest.FixtureRequest) -> dict[str, str]:
    """Of the servers that the case wants."""
    found: dict[str, str] = request.getfixturevalue(f"{case.servers}_servers")
    return found


@pytest.fixture
def taken() -> Iterator[int]:
    """A port at which this process listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def place(url: str) -> str:
    return url.partition("://")[2].partition("/")[0].rpartition("@")[2]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_what_is_wrong_is_said_in_words(
    case: Case,
    tmp_path: Path,
    urls: dict[str, str],
    secrets: tuple[Secrets, Secrets],
    taken: int,
    openai: str,
) -> None:
    """With the setting to change, or what to do. Nothing of it is meant for machines, and no secret is repeated."""
    words = {
        "dead": f"127.0.0.1:{free_port()}",
        "taken": str(taken),
        "openai": openai,
        "stranger": secrets[1].file("ca/ca.crt"),
        **{name.partition("_")[0].lower(): place(url) for name, url in urls.items()},
    }
    for name, text in case.files.items():
        (tmp_path / name).write_text(text, errors="surrogateescape")
    ports = {name: str(free_port()) for name in ("GATEWAY_PORT", "OBSERVABILITY_PORT")}
    if case.servers == "closed":
        role = worker_settings if "worker" in case.command else gateway_settings
        ports |= role(secrets[0])
    if "--port" in case.command:
        ports.pop("GATEWAY_PORT")
    given = {name: filled(value, words) for name, value in case.settings.items()}
    patterns = [filled(pattern, {name: re.escape(word) for name, word in words.items()}) for pattern in case.says]
    seen = await on_terminal(
        *case.command.split(),
        folder=tmp_path,
        env={**ports, **urls, **given},
        until="(?m)" + patterns[-1] if case.code is None else "",
    )
    assert seen.code == case.code, seen.text
    for pattern in patterns:
        assert re.search(pattern, seen.text, re.MULTILINE), seen.text
    assert not MACHINE.search(seen.text), seen.text
    assert "wr0ng-secret" not in seen.text
    if case.code is not None:
        assert len(said(seen)) <= 4, seen.text


def filled(text: str, words: dict[str, str]) -> str:
    """Only these are replaced: patterns have braces of their own."""
    for name, word in words.items():
        text = text.replace(f"{{{name}}}", word)
    return text


def said(seen: Seen) -> list[str]:
    """Lines, less those of the log before the end."""
    return [line for line in seen.text.splitlines() if line.strip() and not re.match(r"\d\d:\d\d:\d\d  ", line)]


@pytest.mark.parametrize(
    ("module", "settings"),
    [
        ("workers", {"WORKER_CONCURRENCY": "four"}),
        ("gateway", {"GATEWAY_PORT": "99999"}),
        ("workers", {"NATS_URL": "nats://127.0.0.1:1"}),
        ("gateway", {"NATS_URL": "nats://127.0.0.1:1"}),
    ],
)
async def test_without_a_terminal_it_is_one_json_object(module: str, settings: dict[str, str], tmp_path: Path) -> None:
    """For collectors of logs; the exit codes are the same."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "GATEWAY_PORT": "0", "OBSERVABILITY_PORT": "0", **settings}
    ran = await asyncio.to_thread(
        subprocess.run,
        (sys.executable, "-m", module),
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    last = json.loads(ran.stdout.splitlines()[-1])
    assert last["event"] == f"{module.removesuffix('s')}.start_failed"
    assert last["level"] == "error"
    assert ran.returncode == (1 if "NATS_URL" in settings else 2)
    assert ran.stderr == ""


async def test_log_format_json_holds_on_a_terminal_too(tmp_path: Path, open_servers: dict[str, str]) -> None:
    """Anyone who sets it wants it."""
    seen = await on_terminal(
        "-m", "workers", folder=tmp_path, env={**open_servers, "LOG_FORMAT": "json"}, until='"event":"worker.serving"'
    )
    assert '"models":["echo"]' in seen.text


async def test_every_sentence_belongs_to_an_event_of_the_code() -> None:
    """An event that is renamed takes its sentence along."""
    code = "".join(
        path.read_text()
        for folder in ("backbone", "gateway", "workers")
        for path in (ROOT / folder).rglob("*.py")
        if path.name != "terminal.py"
    )
    assert [key for key in SENTENCES if f'"{key}"' not in code] == []
