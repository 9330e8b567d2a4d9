"""The stack behind `nexus up`: which parts there are, how each is started, and in which order they come and go.

Up:   NATS, etcd and Redis, then the gateway; meanwhile the local models and the look for backends, then workers.
Down: workers (they hand back what they cannot finish), gateway, local models, servers. `STOP_S` for all of it.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import sys
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from backbone.port_holders import find_port_holder
from cli.embedded.credentials import NATS_USER, StackCredentials
from cli.embedded.etcd_api import EtcdLogin
from cli.embedded.managed_process import ManagedProcess
from cli.embedded.secured_etcd import SecuredEtcdServer
from cli.embedded.servers import EmbeddedServer, NatsServer, RedisServer
from cli.errors import ConsoleError
from cli.stack.bundled_models import LocalModel, find_local_models
from cli.stack.component import START_ERRORS, Component
from cli.stack.data_dir import DataDir, StackState
from cli.stack.discovery import DiscoveredBackend, find_backends
from cli.stack.display import StackDisplay
from cli.stack.etcd_seed import EtcdSeeder
from cli.stack.ports import is_free, stable_port
from cli.stack.user_models import UserModel, served
from schemas.installation import install_hint

STOP_S = 4.7
"""Everything has ended this long after it was asked to, by force where need be."""
WORKER_GRACE_S = 2.5
WORKER_DRAIN_S = 1.5
GATEWAY_DRAIN_S = 0.2
"""The workers have ended by then: what is still open waits for nobody."""
GATEWAY_GRACE_S = 1.0
LOCAL_GRACE_S = 0.3
SERVER_GRACE_S = 0.7
BLANK = {
    f"{server}_{name}": ""
    for server in ("NATS", "ETCD", "REDIS")
    for name in ("USER", "PASSWORD", "PASSWORD_FILE", "CREDS_FILE", "TLS_CA", "TLS_CERT", "TLS_KEY", "INBOX_PREFIX")
}
"""What the environment or `.env` has for other servers is none of the embedded ones'."""
TITLES = {"nats": "NATS", "etcd": "etcd", "redis": "Redis"}
GIVEN_PORTS = ("gateway", "observability")
"""By flags and settings."""
ROLES = ("gateway", "worker")
READY_TIMEOUT_S = 60.0


class StackStartError(Exception):
    """The stack cannot come up. The message is for the user."""


@dataclass(frozen=True, slots=True)
class StackOptions:
    """What `nexus up` was asked for."""

    host: str
    port: int
    observability_port: int
    key: str = field(repr=False)
    observability_host: str = "127.0.0.1"
    gateways: int = 1
    local_models: bool = True
    """The small ones that come along."""
    default_chat: bool = True
    """The one to talk to among them."""
    user_models: tuple[UserModel, ...] = ()
    context: int | None = None
    """As given for these."""
    discover: bool = True
    etcd_prefix: str = "/nexus/"

    @property
    def url(self) -> str:
        """Where this machine's programs reach the gateway."""
        return _url(self.host, self.port)

    @property
    def observability_url(self) -> str:
        """Where this machine's programs read documentation, metrics and readiness."""
        return _url(self.observability_host, self.observability_port)


def _url(host: str, port: int) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)  # noqa: S104 - compared, not bound
    return f"http://{f'[{host}]' if ':' in host and not host.startswith('[') else host}:{port}"


@dataclass(frozen=True, slots=True)
class WorkerPlan:
    """A worker to be started: for which server, under which name."""

    name: str
    backend: str
    title: str
    url: str = ""
    slots: int = 0
    options: dict[str, str] = field(default_factory=dict)
    chat: bool = False
    """Whether it may be one to talk to."""


CHATTY = frozenset({"openai", "ollama"})
"""Adapters whose servers usually chat."""
ECHO = WorkerPlan("echo", "echo", "a stand-in without a model")
SERVICES = WorkerPlan("services", "service", "services that are entered by `nexus services add`")
"""It is up whatever those are: they come and go."""


class Stack:
    """All parts together. Start it once; `stop` always, also after a start that failed half way."""

    def __init__(self, options: StackOptions, data: DataDir, screen: StackDisplay, children_lock: int) -> None:
        """Describe the stack; nothing runs yet. Its processes inherit the descriptor `children_lock`."""
        self.options = options
        self._pass_fds = (children_lock,)
        self._start_id = secrets.token_hex(8)
        self._kept_ports = data.ports()
        self._data = data
        self._screen = screen
        self._credentials = _make_credentials(data)
        self._nats = NatsServer(data.sub("nats"), user=NATS_USER, password=self._credentials.password("nats"))
        self._etcd = SecuredEtcdServer(data.sub("etcd"), self._credentials, prefix=options.etcd_prefix)
        self._redis = RedisServer(data.sub("redis"), password=self._credentials.password("redis"))
        self._operator_data = EtcdSeeder(data, options.etcd_prefix, screen.note)
        self._local_ports: dict[str, int] = {}
        self.titles: dict[str, str] = {}
        """What each worker stands for, by its id."""
        self._servers_up = asyncio.Event()
        self._servers: list[Component] = []
        self._local: list[Component] = []
        self._gateway: list[Component] = []
        self._workers: list[Component] = []
        self._http = httpx.AsyncClient(trust_env=False, timeout=2.0)

    # Coming up

    async def start(self) -> None:
        """Return when everything serves. Raises StackStartError."""
        await _together(self._start_core(), self._start_workers())
        self._remember()
        for part in self._parts():
            part.keep(self._screen.note, self._remember)

    async def _start_core(self) -> None:
        """The servers, then the gateway."""
        await _together(*(self._start_server(one) for one in self._all_servers()))
        self._servers_up.set()
        await self._operator_data.start(self._etcd.url, self._etcd_login())
        await self._start_gateway()

    def _etcd_login(self) -> EtcdLogin:
        """For aliases and services, which are a gateway's to write."""
        made = self._credentials
        return EtcdLogin("gateway", made.password("etcd-gateway"), made.client_context())

    async def _start_workers(self) -> None:
        """A worker for each backend found, and for each local model. Raises StackStartError when none comes up."""
        starts = [self._start_found(), *(self._start_local(model) for model in self._local_models())]
        starts.append(
            self._start_planned(SERVICES, *(() if self.options.local_models or self.options.user_models else (ECHO,)))
        )
        up = [plan for plans in await _together(*starts) for plan in plans if plan is not SERVICES]
        if self.options.local_models and not any(plan.chat for plan in up):
            up += await self._start_planned(ECHO)
        if not up:
            raise StackStartError("no worker came up")

    async def _start_planned(self, *plans: WorkerPlan) -> list[WorkerPlan]:
        """Those whose worker came up."""
        await self._servers_up.wait()
        up = await _together(*(self._start_worker(plan) for plan in plans))
        return [plan for plan, is_up in zip(plans, up, strict=True) if is_up]

    def _all_servers(self) -> list[EmbeddedServer]:
        return [self._nats, self._etcd, self._redis]

    async def _start_server(self, server: EmbeddedServer) -> None:
        server.preferred_port = self._port_for(server.name, TITLES[server.name])
        server.pass_fds = self._pass_fds
        part = Component(
            server.name,
            TITLES[server.name],
            process=lambda: server.process if server.pid else None,
            start=server.start,
            again=server.restart,
            grace_s=SERVER_GRACE_S,
        )
        self._servers.append(part)
        _link(self._data.log(server.name), server.log_file)
        await self._bring_up(part, lambda: server.url)

    def _port_for(self, name: str, title: str) -> int:
        """The port that the part had at the last start, so that what knows it finds the part again; else a new one."""
        kept = self._kept_ports.get(name)
        if kept is None:
            return stable_port()
        if is_free(kept):
            return kept
        port = stable_port()
        self._screen.say(
            f"Port {kept}, which {title} had before, is in use by {find_port_holder(kept)}; it gets {port}."
        )
        return port

    async def _start_found(self) -> list[WorkerPlan]:
        """Serve what already runs here."""
        found = await find_backends() if self.options.discover else []
        return await self._start_planned(*(plan_for(one) for one in found))

    def _local_models(self) -> list[LocalModel]:
        """The user's own, and of those that come along the installed ones, if any are wanted; the others are offered."""
        for note in (one.note for one in self.options.user_models if one.note):
            self._screen.say(note)
        own = served(list(self.options.user_models))
        if not self.options.local_models:
            return own
        installed, missing = find_local_models(chat=self.options.default_chat)
        for one in missing:
            self._screen.say(f"No local model for {one.what}. To install it: {one.hint}")
        return own + installed

    async def _start_local(self, model: LocalModel) -> list[WorkerPlan]:
        """Serve a model. Empty when that fails: the others are served without it. Raises StackStartError for one's own."""
        port = self._local_ports[model.name] = self._port_for(model.name, model.title)
        url = f"http://127.0.0.1:{port}"
        process = self._process(
            model.name,
            model.module,
            model.arguments(port),
            BLANK,
            ready=lambda: self._answers(url + model.ready_path),
            cwd=self._data.sub(model.name) if model.own_folder else None,
        )
        part = Component.of(process, model.title, grace_s=LOCAL_GRACE_S)
        self._local.append(part)
        try:
            await self._bring_up(part, url)
        except StackStartError as error:
            if model.required:
                raise
            self._screen.say(str(error))
            self._local.remove(part)
            del self._local_ports[model.name]
            return []
        return await self._start_planned(
            WorkerPlan(
                model.worker, model.backend, model.worker_title, url, model.slots, model.options, chat=model.chat
            )
        )

    async def _start_gateway(self) -> None:
        variables = {
            "GATEWAY_HOST": self.options.host,
            "GATEWAY_PORT": str(self.options.port),
            "OBSERVABILITY_PORT": str(self.options.observability_port),
            "GATEWAY_BEARER_TOKEN": self.options.key,
            "GATEWAY_WORKERS": str(self.options.gateways),
            "GATEWAY_LAME_DUCK_S": "0",
            "GATEWAY_DRAIN_S": str(GATEWAY_DRAIN_S),
        } | self._access("gateway")
        process = self._process(
            "gateway", "gateway", [], variables, ready=lambda: self._answers(f"{self.options.url}/readyz")
        )
        count = self.options.gateways
        part = Component.of(process, "gateway" if count == 1 else f"{count} gateways", grace_s=GATEWAY_GRACE_S)
        self._gateway.append(part)
        await self._bring_up(part, self.options.url)

    async def _start_worker(self, plan: WorkerPlan) -> bool:
        """Whether it came up. One that did not is tried again later, unless it is the only one."""
        variables = {
            "WORKER_BACKEND": plan.backend,
            "WORKER_BACKEND_URL": plan.url,
            "WORKER_BACKEND_KEY": "",
            "WORKER_BACKEND_OPTIONS": ",".join(f"{name}={value}" for name, value in plan.options.items()),
            "WORKER_MODELS": "",
            "WORKER_CONCURRENCY": str(plan.slots),
            "WORKER_NAME": plan.name,
            "WORKER_DRAIN_S": str(WORKER_DRAIN_S),
            "WORKER_OBSERVABILITY_PORT": "0",
        } | self._access("worker")
        process = self._process(
            f"worker-{plan.name}", "workers", [], variables, ready=lambda: self._is_registered(plan.name, process)
        )
        part = Component.of(process, f"worker {plan.name}", grace_s=WORKER_GRACE_S, retires=True)
        self._workers.append(part)
        self.titles[plan.name] = plan.title
        try:
            await self._bring_up(part, f"{plan.title}  {plan.url}".rstrip())
        except StackStartError as error:
            self._screen.say(str(error))
            return False
        return True

    async def _bring_up(self, part: Component, detail: str | Callable[[], str]) -> None:
        """Start a part in sight of the user. Raises StackStartError with the end of its log."""
        self._screen.begin(part.name, part.title)
        try:
            await part.start()
        except START_ERRORS as error:
            self._screen.failed(part.name, "")
            raise StackStartError(f"{part.title} could not be started: {error}") from error
        self._screen.up(part.name, detail() if callable(detail) else detail)

    def _process(
        self,
        name: str,
        module: str,
        arguments: list[str],
        variables: Mapping[str, str],
        ready: Callable[[], Awaitable[bool]],
        cwd: Path | None = None,
    ) -> ManagedProcess:
        """A Python child. `-P`: a folder here that happens to be called `workers` is not ours."""
        return ManagedProcess(
            name,
            [sys.executable, "-P", "-m", module, *arguments],
            log_file=self._data.log(name),
            env={**os.environ, "PYTHONUNBUFFERED": "1", **variables},
            ready=ready,
            ready_timeout_s=READY_TIMEOUT_S,
            cwd=cwd,
            pass_fds=self._pass_fds,
        )

    def _access(self, role: str) -> dict[str, str]:
        """All that a process of this role needs to get into the servers, and nothing of the environment's own."""
        return BLANK | self._joining(role)

    def _joining(self, role: str) -> dict[str, str]:
        """The variables by which a process of this role joins. The servers have started."""
        urls = {"NATS_URL": self._nats.url, "ETCD_URL": self._etcd.url, "ETCD_PREFIX": self.options.etcd_prefix}
        redis = {"REDIS_URL": self._redis.url} if role == "gateway" else {}
        return urls | redis | self._credentials.settings(role)

    # What is there

    async def workers(self) -> list[dict[str, Any]]:
        """What the gateway says about the workers. Raises httpx.HTTPError or ValueError."""
        headers = {"authorization": f"Bearer {self.options.key}"}
        answer = await self._http.get(f"{self.options.url}/v1/workers", headers=headers)
        answer.raise_for_status()
        return list(answer.json()["data"])

    async def _is_registered(self, name: str, process: ManagedProcess) -> bool:
        try:
            seen = await self.workers()
        except (httpx.HTTPError, ValueError, KeyError):
            return False
        mine = (one for one in seen if one["id"] == name and one["pid"] == process.pid)
        return any(one["state"] == "ready" or name == SERVICES.name for one in mine)

    async def _answers(self, url: str) -> bool:
        try:
            return (await self._http.get(url)).status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False

    def _parts(self) -> list[Component]:
        return [*self._servers, *self._local, *self._gateway, *self._workers]

    def _remember(self) -> None:
        ports = {"gateway": self.options.port, "observability": self.options.observability_port}
        ports |= {server.name: server.port for server in self._all_servers()}
        ports |= self._local_ports
        self._data.keep_ports(
            self._kept_ports | {name: port for name, port in ports.items() if name not in GIVEN_PORTS}
        )
        pids = {part.name: part.pid for part in self._parts() if part.pid is not None}
        self._data.remember(
            StackState(
                pid=os.getpid(),
                url=self.options.url,
                key=self.options.key,
                ports=ports,
                pids=pids,
                start_id=self._start_id,
                environments={role: self._joining(role) for role in ROLES},
            )
        )

    # Going down

    async def stop(self) -> None:
        """End all of it, in order, within `STOP_S`."""
        try:
            async with asyncio.timeout(STOP_S):
                for group in (self._workers, self._gateway, self._local, self._servers):
                    await asyncio.gather(*(part.stop() for part in group))
                await self._http.aclose()
        except TimeoutError:
            pass
        finally:
            self.kill()
            await self._operator_data.stop()

    def kill(self) -> None:
        """End all of it at once."""
        for part in self._parts():
            part.kill()


def _make_credentials(data: DataDir) -> StackCredentials:
    made = StackCredentials(data.secrets)
    try:
        made.make()
    except OSError as error:
        raise ConsoleError(f"cannot write {data.secrets} ({error.strerror}); choose another --data-dir") from error
    except ImportError as error:
        raise ConsoleError(f"{error}. Install what is missing with: {install_hint('embedded')}") from error
    return made


def plan_for(found: DiscoveredBackend) -> WorkerPlan:
    """The worker for a server that already runs here."""
    return WorkerPlan(
        found.candidate.name, found.backend, found.candidate.title, found.candidate.url, chat=found.backend in CHATTY
    )


async def _together(*work: Coroutine[Any, Any, Any]) -> list[Any]:
    """The results of all; the first failure ends the others, and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


def _link(link: Path, target: Path) -> None:
    """Make `link` show a log that lives elsewhere."""
    link.unlink(missing_ok=True)
    link.symlink_to(target)
