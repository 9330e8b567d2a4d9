"""Real servers for tests.

| fixture | scope | what |
|---|---|---|
| `nats_server`, `etcd_server`, `redis_server` | session | shared: never stop, pause or flush them |
| `nats_url`, `etcd_url`, `redis_url` | session | their URLs |
| `own_nats`, `own_etcd`, `own_redis` | function | the test's own, to kill, pause, restart |
| `etcd_prefix` | function | a key prefix that no other test uses |
| `eventually` | function | `await eventually(condition)`: poll until it is true, and return its value |

`--servers` says what these are: tests/servers.py. A server that cannot be had skips the test; where `CI` is set, it fails it.
"""

from __future__ import annotations

import asyncio
import gc
import inspect
import os
import random
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import structlog
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadFileScheduling

from cli.embedded.binaries import BinaryMissing
from tests.servers import Server, Source, Unusable, choose, source

# How long an example takes says how busy the machine is.
settings.register_profile("nexus", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("nexus")

LONGEST = (
    "tests/stack/test_up.py",
    "tests/faults/test_jobs_killed.py",
    "tests/console/",
    "tests/stack/",
    "tests/clients/",
    "tests/faults/",
    "tests/scale/",
    "tests/flow/",
    "tests/deploy/",
    "tests/backends/test_openai_",
    "tests/backends/test_whisper.py",
)
"""Files by how long they take, the longest first. The others take seconds."""
TOGETHER = (
    ("tests/clients/",),
    ("tests/backends/test_openai_llama.py", "tests/backends/test_openai_embeddings.py"),
)
"""Files that share what is expensive to start, as they begin."""
ALONE = ("tests/clients/test_openapi_contract.py",)
"""Files among them that share nothing."""
ATTACKS = (
    "tests/backbone/test_etcd_closed.py",
    "tests/backbone/test_sealed_job_log.py",
    "tests/backends/kit/test_limitations.py",
    "tests/clients/test_bad_input.py",
    "tests/clients/test_compressed.py",
    "tests/clients/test_media_bad_input.py",
    "tests/deploy/test_accounts.py",
    "tests/deploy/test_permissions.py",
    "tests/faults/test_readers.py",
    "tests/faults/test_strangers.py",
    "tests/flow/test_disclosure.py",
    "tests/flow/test_edge.py",
    "tests/flow/test_forged_outcomes.py",
    "tests/flow/test_hostile_worker.py",
    "tests/flow/test_people.py",
    "tests/flow/test_route_walk.py",
    "tests/stack/test_strangers.py",
    "tests/unit/gateway/jobs/test_forged_outcomes.py",
    "tests/unit/gateway/http/test_body_memory.py",
    "tests/unit/schemas/test_redaction.py",
    "tests/unit/backbone/test_ssrf_guard.py",
    "tests/unit/gateway/auth/test_guess_limiter.py",
    "tests/unit/gateway/people/test_browser.py",
    "tests/unit/gateway/people/test_openid_connect.py",
    "tests/unit/gateway/http/test_media_fields.py",
    "tests/unit/gateway/test_names.py",
    "tests/unit/gateway/http/test_connection.py",
    "tests/unit/backbone/test_public_addresses.py",
    "tests/unit/backbone/test_seals.py",
)
"""Files that hold what docs/explanation/security.md says: they get the marker `attack`."""
EXTENDED = (
    "tests/backbone/test_job_log_cluster.py",
    "tests/backbone/test_snapshots_cluster.py",
    # Beside three busy processes, a line that was cancelled has an answer with an error; the reason is not known yet.
    "tests/clients/test_batches_python.py::TestEnds::test_cancel",
    "tests/deploy/test_accounts_cluster.py",
    "tests/deploy/test_scripts.py",
    "tests/deploy/test_scripts_nexus.py",
    "tests/faults/test_servers_that_wait.py",
    "tests/scale/",
    "tests/stack/test_detached.py",
    "tests/stack/test_killed.py",
    "tests/stack/test_restarts.py",
    "tests/stack/test_terminal.py",
    "tests/stack/test_user_models.py",
)
"""Tests that take long, of parts that seldom change: `make test-all` runs them, which CI's workflows call, and so does naming their file."""
SOURCES = ["embedded", "containers", "external"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--servers", choices=SOURCES, default="embedded", help="what NATS, etcd, Redis and Nexus's parts are"
    )
    parser.addoption("--extended", action="store_true", help="also run the tests of EXTENDED in tests/conftest.py")


PARENT_INTERVAL_S = 0.2


def end_with_parent() -> None:
    """Kill this process soon after its parent's end: one of xdist goes on with its test where the run is killed."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_INTERVAL_S)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="end with parent", daemon=True).start()


def pytest_configure(config: pytest.Config) -> None:
    """What chance decides is the same in every process of one run: xdist's workers inherit it."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        end_with_parent()
    # Images of Python forbid bytecode files; without them each process that a test starts compiles all of its modules.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False
    os.environ.setdefault("NEXUS_TEST_LUCK", str(random.SystemRandom().randrange(10**9)))
    # What a shell's background or nohup ignores would be ignored by every process that a test starts, and signals.
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, usual)
    # The default renders every local variable of a traceback, which takes seconds.
    render = structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback)
    structlog.configure(processors=[*structlog.get_config()["processors"][:-1], render])
    if config.getoption("--servers") == "external" and config.getoption("numprocesses", None):
        raise pytest.UsageError("--servers external: its servers serve one cluster at a time; make test WORKERS=0")
    try:
        choose(config.getoption("--servers"))
    except Unusable as error:
        raise pytest.UsageError(str(error)) from error


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Collect without the garbage collector, which then never looks at ten thousand tests again."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark attacks, and leave out what only `--extended` runs. What takes long begins first, so that no worker of a run is left alone with
    it at the end.
    """
    for item in items:
        if item.nodeid.startswith(ATTACKS):
            item.add_marker("attack")
    if not config.getoption("--extended"):
        named = tuple(arg.removeprefix("./").partition("::")[0] for arg in config.args if ".py" in arg)
        left_out = [item for item in items if item.nodeid.startswith(EXTENDED) and not item.nodeid.startswith(named)]
        if left_out:
            config.hook.pytest_deselected(items=left_out)
            kept = set(items) - set(left_out)
            items[:] = [item for item in items if item in kept]
    items.sort(key=lambda item: _place(item.nodeid))


class _Scheduler(LoadFileScheduling):  # type: ignore[misc]
    """As `--dist loadfile`, but files of `TOGETHER` run in one process."""

    def _split_scope(self, nodeid: str) -> str:
        if nodeid.startswith(ALONE):
            return super()._split_scope(nodeid)
        return next((files[0] for files in TOGETHER if nodeid.startswith(files)), super()._split_scope(nodeid))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> _Scheduler | None:
    return _Scheduler(config, log) if config.getoption("dist") == "loadfile" else None


def _place(nodeid: str) -> int:
    return next((place for place, start in enumerate(LONGEST) if nodeid.startswith(start)), len(LONGEST))


def pytest_unconfigure() -> None:
    """Whatever a test did, and however the run ended, nothing of it stays."""
    source().close()


T = TypeVar("T")
ServerT = TypeVar("ServerT", bound=Server)


def run_sync(work: Coroutine[Any, Any, T]) -> T:
    """Run `work` on a loop of its own, leaving the loops of pytest-asyncio alone."""
    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(work)
    finally:
        loop.close()


def running(server: ServerT) -> Iterator[ServerT]:
    """Start `server` for a fixture, and stop it afterwards, whatever the test did to it."""
    try:
        run_sync(server.start())
    except BinaryMissing as error:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(str(error))
    try:
        yield server
    finally:
        run_sync(source().release(server))


@pytest.fixture(scope="session")
def servers() -> Source:
    """Where this run's servers come from: `--servers`."""
    return source()


@pytest.fixture(scope="session")
def servers_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("servers")


@pytest.fixture(scope="session")
def nats_server(servers: Source, servers_dir: Path) -> Iterator[Server]:
    yield from running(servers.nats(servers_dir / "nats"))


@pytest.fixture(scope="session")
def etcd_server(servers: Source, servers_dir: Path) -> Iterator[Server]:
    yield from running(servers.etcd(servers_dir / "etcd"))


@pytest.fixture(scope="session")
def redis_server(servers: Source, servers_dir: Path) -> Iterator[Server]:
    yield from running(servers.redis(servers_dir / "redis"))


@pytest.fixture(scope="session")
def nats_url(nats_server: Server) -> str:
    return nats_server.url


@pytest.fixture(scope="session")
def etcd_url(etcd_server: Server) -> str:
    return etcd_server.url


@pytest.fixture(scope="session")
def redis_url(redis_server: Server) -> str:
    return redis_server.url


@pytest.fixture
def own_nats(servers: Source, tmp_path: Path) -> Iterator[Server]:
    yield from running(servers.nats(tmp_path / "nats"))


@pytest.fixture
def own_etcd(servers: Source, tmp_path: Path) -> Iterator[Server]:
    yield from running(servers.etcd(tmp_path / "etcd"))


@pytest.fixture
def own_redis(servers: Source, tmp_path: Path) -> Iterator[Server]:
    yield from running(servers.redis(tmp_path / "redis"))


@pytest.fixture
def etcd_prefix() -> str:
    return f"/nexus-{uuid.uuid4().hex}/"


class Eventually:
    """Poll a condition with a deadline: `value = await eventually(lambda: thing() or None)`."""

    async def __call__(self, condition: Callable[..., Any], *, timeout_s: float = 40.0, what: str = "") -> Any:
        deadline = asyncio.get_running_loop().time() + timeout_s
        while True:
            value = condition()
            if inspect.isawaitable(value):
                value = await value
            if value:
                return value
            if asyncio.get_running_loop().time() > deadline:
                pytest.fail(f"not within {timeout_s:g} s: {what or inspect.getsource(condition).strip()}")
            await asyncio.sleep(0.02)


@pytest.fixture
def eventually() -> Eventually:
    return Eventually()
