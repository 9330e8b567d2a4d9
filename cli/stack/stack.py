"""The stack of `nexus up`: its components, how each is started, and the order in which they start and stop.

Start: NATS, etcd and Redis, then the gateway; meanwhile local models and the discovery of backends, then workers.
Stop:  workers (they return jobs that they cannot finish), gateway, local models, servers; within `STOP_TIMEOUT_S`.
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
from cli.embedded.etcd_api import EtcdApiLogin
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
from cli.stack.user_models import UserModel, plan_servers
from schemas.installation import install_hint

STOP_TIMEOUT_S = 4.7
"""A stop that takes longer kills what still runs."""
WORKER_GRACE_S = 2.5
WORKER_DRAIN_S = 1.5
GATEWAY_DRAIN_S = 0.2
"""Short: the workers have ended by then, so open requests cannot be answered any more."""
GATEWAY_GRACE_S = 1.0
LOCAL_MODEL_GRACE_S = 0.3
SERVER_GRACE_S = 0.7
NO_CREDENTIALS = {
    f"{server}_{name}": ""
    for server in ("NATS", "ETCD", "REDIS")
    for name in ("USER", "PASSWORD", "PASSWORD_FILE", "CREDS_FILE", "TLS_CA", "TLS_CERT", "TLS_KEY", "INBOX_PREFIX")
}
"""Overrides credentials for other servers in the environment or `.env`."""
SERVER_TITLES = {"nats": "NATS", "etcd": "etcd", "redis": "Redis"}
CONFIGURED_PORTS = ("gateway", "observability")
"""Ports that flags and settings choose: they are not kept from start to start."""
ROLES = ("gateway", "worker")
READY_TIMEOUT_S = 60.0


class StackStartError(Exception):
    """The stack could not be started. The message is for the user."""


@dataclass(frozen=True, slots=True)
class StackOptions:
    """The options of `nexus up`."""

    host: str
    port: int
    observability_port: int
    key: str = field(repr=False)
    observability_host: str = "127.0.0.1"
    gateways: int = 1
    local_models: bool = True
    """Whether to serve the small bundled models."""
    default_chat: bool = True
    """Whether the bundled chat model is among them."""
    user_models: tuple[UserModel, ...] = ()
    context: int | None = None
    """Value of `--context`, for `user_models`."""
    discover: bool = True
    etcd_prefix: str = "/nexus/"

    @property
    def url(self) -> str:
        """URL of the gateway for programs on this machine."""
        return _url(self.host, self.port)

    @property
    def observability_url(self) -> str:
        """URL of documentation, metrics and readiness for programs on this machine."""
        return _url(self.observability_host, self.observability_port)


def _url(host: str, port: int) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)  # noqa: S104 - compared, not bound
    return f"http://{f'[{host}]' if ':' in host and not host.startswith('[') else host}:{port}"


@dataclass(frozen=True, slots=True)
class WorkerPlan:
    """A worker to start: its name, and the server that it works for."""

    name: str
    backend: str
    title: str
    url: str = ""
    slots: int = 0
    options: dict[str, str] = field(default_factory=dict)
    chat: bool = False
    """Whether its server may offer a chat model."""


CHAT_BACKENDS = frozenset({"openai", "ollama"})
"""Adapters whose servers usually offer chat models."""
ECHO_WORKER = WorkerPlan("echo", "echo", "stand-in without a model")
SERVICE_WORKER = WorkerPlan("services", "service", "services added with `nexus services add`")
"""Ready without any service: they can be added later."""


class LocalStack:
    """All components of `nexus up`. Call `start` once, and always `stop`, also after a failed start."""

    def __init__(self, options: StackOptions, data: DataDir, display: StackDisplay, children_lock: int) -> None:
        """Describe the stack and write its credentials. Its processes inherit the file descriptor `children_lock`."""
        self.options = options
        self._pass_fds = (children_lock,)
        self._start_id = secrets.token_hex(8)
        self._previous_ports = data.ports()
        self._data = data
        self._display = display
        self._credentials = _make_credentials(data)
        self._nats = NatsServer(data.folder("nats"), user=NATS_USER, password=self._credentials.password("nats"))
        self._etcd = SecuredEtcdServer(data.folder("etcd"), self._credentials, prefix=options.etcd_prefix)
        self._redis = RedisServer(data.folder("redis"), password=self._credentials.password("redis"))
        self._etcd_seeder = EtcdSeeder(data, options.etcd_prefix, display.note)
        self._local_model_ports: dict[str, int] = {}
        self.titles: dict[str, str] = {}
        """Description of each worker, by its id."""
        self._servers_up = asyncio.Event()
        self._servers: list[Component] = []
        self._local_models: list[Component] = []
        self._gateway: list[Component] = []
        self._workers: list[Component] = []
        self._http = httpx.AsyncClient(trust_env=False, timeout=2.0)

    # Start

    async def start(self) -> None:
        """Start everything and wait until it serves. Raises StackStartError."""
        await _gather(self._start_core(), self._start_workers())
        self._save_state()
        for component in self._components():
            component.supervise(self._display.note, self._save_state)

    async def _start_core(self) -> None:
        """Start the servers, then the gateway."""
        await _gather(*(self._start_server(one) for one in self._all_servers()))
        self._servers_up.set()
        await self._etcd_seeder.start(self._etcd.url, self._etcd_login())
        await self._start_gateway()

    def _etcd_login(self) -> EtcdApiLogin:
        """Return the gateway's login, which may write aliases and services."""
        credentials = self._credentials
        return EtcdApiLogin("gateway", credentials.password("etcd-gateway"), credentials.client_context())

    async def _start_workers(self) -> None:
        """Start a worker for each local model and each discovered backend. Raises StackStartError if none starts."""
        starts = [self._start_found(), *(self._start_local(model) for model in self._choose_local_models())]
        starts.append(
            self._start_planned(
                SERVICE_WORKER, *(() if self.options.local_models or self.options.user_models else (ECHO_WORKER,))
            )
        )
        up = [plan for plans in await _gather(*starts) for plan in plans if plan is not SERVICE_WORKER]
        if self.options.local_models and not any(plan.chat for plan in up):
            up += await self._start_planned(ECHO_WORKER)
        if not up:
            raise StackStartError("No worker started.")

    async def _start_planned(self, *plans: WorkerPlan) -> list[WorkerPlan]:
        """Start workers, and return the plans of those that started."""
        await self._servers_up.wait()
        started = await _gather(*(self._start_worker(plan) for plan in plans))
        return [plan for plan, is_up in zip(plans, started, strict=True) if is_up]

    def _all_servers(self) -> list[EmbeddedServer]:
        return [self._nats, self._etcd, self._redis]

    async def _start_server(self, server: EmbeddedServer) -> None:
        server.preferred_port = self._port_for(server.name, SERVER_TITLES[server.name])
        server.pass_fds = self._pass_fds
        component = Component(server, SERVER_TITLES[server.name], grace_s=SERVER_GRACE_S)
        self._servers.append(component)
        _link_log(self._data.log(server.name), server.log_file)
        await self._start_component(component, lambda: server.url)

    def _port_for(self, name: str, title: str) -> int:
        """Return the port of the last start, which other programs may know; a new one if it is not free."""
        previous = self._previous_ports.get(name)
        if previous is None:
            return stable_port()
        if is_free(previous):
            return previous
        port = stable_port()
        self._display.print(
            f"Port {previous}, which {title} had before, is in use by {find_port_holder(previous)}; it gets {port}."
        )
        return port

    async def _start_found(self) -> list[WorkerPlan]:
        """Start a worker for each inference server that already runs on this machine."""
        found = await find_backends() if self.options.discover else []
        return await self._start_planned(*(plan_for(one) for one in found))

    def _choose_local_models(self) -> list[LocalModel]:
        """Return the models of `--model` and the installed bundled ones, and tell the user how to install the others."""
        for note in (one.note for one in self.options.user_models if one.note):
            self._display.print(note)
        own = plan_servers(list(self.options.user_models))
        if not self.options.local_models:
            return own
        installed, missing = find_local_models(chat=self.options.default_chat)
        for one in missing:
            self._display.print(f"No local model for {one.capability} is installed. To install one: {one.hint}")
        return own + installed

    async def _start_local(self, model: LocalModel) -> list[WorkerPlan]:
        """Start a model's server and its worker. A failure is shown; for a model of `--model` it is a StackStartError."""
        port = self._local_model_ports[model.name] = self._port_for(model.name, model.title)
        url = f"http://127.0.0.1:{port}"
        process = self._process(
            model.name,
            model.module,
            model.arguments(port),
            NO_CREDENTIALS,
            ready=lambda: self._responds(url + model.ready_path),
            cwd=self._data.folder(model.name) if model.own_folder else None,
        )
        component = Component(process, model.title, grace_s=LOCAL_MODEL_GRACE_S)
        self._local_models.append(component)
        try:
            await self._start_component(component, url)
        except StackStartError as error:
            if model.required:
                raise
            self._display.print(str(error))
            self._local_models.remove(component)
            del self._local_model_ports[model.name]
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
            "gateway", "gateway", [], variables, ready=lambda: self._responds(f"{self.options.url}/readyz")
        )
        count = self.options.gateways
        component = Component(process, "gateway" if count == 1 else f"{count} gateways", grace_s=GATEWAY_GRACE_S)
        self._gateway.append(component)
        await self._start_component(component, self.options.url)

    async def _start_worker(self, plan: WorkerPlan) -> bool:
        """Start a worker and return whether it started. One that did not is restarted later by its supervision."""
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
        component = Component(process, f"worker {plan.name}", grace_s=WORKER_GRACE_S, retires=True)
        self._workers.append(component)
        self.titles[plan.name] = plan.title
        try:
            await self._start_component(component, f"{plan.title}  {plan.url}".rstrip())
        except StackStartError as error:
            self._display.print(str(error))
            return False
        return True

    async def _start_component(self, component: Component, detail: str | Callable[[], str]) -> None:
        """Start a component and show its progress. Raises StackStartError with the end of its log."""
        self._display.begin(component.name, component.title)
        try:
            await component.start()
        except START_ERRORS as error:
            self._display.failed(component.name, "")
            raise StackStartError(f"{component.title} could not be started: {error}") from error
        self._display.up(component.name, detail() if callable(detail) else detail)

    def _process(
        self,
        name: str,
        module: str,
        arguments: list[str],
        variables: Mapping[str, str],
        ready: Callable[[], Awaitable[bool]],
        cwd: Path | None = None,
    ) -> ManagedProcess:
        """Return a Python child. `-P` keeps a folder called `workers` in the current directory from being imported."""
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
        """Return the variables with which a process of this role connects to the servers, and to no others."""
        return NO_CREDENTIALS | self._joining(role)

    def _joining(self, role: str) -> dict[str, str]:
        """Return the variables with which another process of this role joins the stack. The servers have started."""
        urls = {"NATS_URL": self._nats.url, "ETCD_URL": self._etcd.url, "ETCD_PREFIX": self.options.etcd_prefix}
        gateways = {"REDIS_URL": self._redis.url} | self._ledger() if role == "gateway" else {}
        return urls | gateways | self._credentials.settings(role)

    def _ledger(self) -> dict[str, str]:
        """Return the ledger's settings: a file in the data directory, unless the environment names a database."""
        journal = {"USAGE_JOURNAL_DIR": str(self._data.folder("usage"))}
        return journal if os.environ.get("LEDGER_URL") else {"LEDGER_URL": f"sqlite:///{self._data.ledger}"} | journal

    # State

    async def workers(self) -> list[dict[str, Any]]:
        """Return the gateway's list of workers. Raises httpx.HTTPError or ValueError."""
        headers = {"authorization": f"Bearer {self.options.key}"}
        answer = await self._http.get(f"{self.options.url}/v1/workers", headers=headers)
        answer.raise_for_status()
        return list(answer.json()["data"])

    async def _is_registered(self, name: str, process: ManagedProcess) -> bool:
        try:
            rows = await self.workers()
        except (httpx.HTTPError, ValueError, KeyError):
            return False
        own = (one for one in rows if one["id"] == name and one["pid"] == process.pid)
        return any(one["state"] == "ready" or name == SERVICE_WORKER.name for one in own)

    async def _responds(self, url: str) -> bool:
        try:
            return (await self._http.get(url)).status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False

    def _components(self) -> list[Component]:
        return [*self._servers, *self._local_models, *self._gateway, *self._workers]

    def _save_state(self) -> None:
        ports = {"gateway": self.options.port, "observability": self.options.observability_port}
        ports |= {server.name: server.port for server in self._all_servers()}
        ports |= self._local_model_ports
        self._data.save_ports(
            self._previous_ports | {name: port for name, port in ports.items() if name not in CONFIGURED_PORTS}
        )
        pids = {component.name: component.pid for component in self._components() if component.pid is not None}
        self._data.save_state(
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

    # Stop

    async def stop(self) -> None:
        """Stop everything in order, and kill what still runs after `STOP_TIMEOUT_S`."""
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                for group in (self._workers, self._gateway, self._local_models, self._servers):
                    await asyncio.gather(*(component.stop() for component in group))
                await self._http.aclose()
        except TimeoutError:
            pass
        finally:
            self.kill()
            await self._etcd_seeder.stop()

    def kill(self) -> None:
        """Kill everything at once."""
        for component in self._components():
            component.kill()


def _make_credentials(data: DataDir) -> StackCredentials:
    credentials = StackCredentials(data.secrets)
    try:
        credentials.make()
    except OSError as error:
        raise ConsoleError(f"Cannot write {data.secrets} ({error.strerror}). Choose another --data-dir.") from error
    except ImportError as error:
        raise ConsoleError(f"{error}. Install what is missing with: {install_hint('embedded')}") from error
    return credentials


def plan_for(found: DiscoveredBackend) -> WorkerPlan:
    """Return the worker for a discovered server."""
    return WorkerPlan(
        found.candidate.name,
        found.backend,
        found.candidate.title,
        found.candidate.url,
        chat=found.backend in CHAT_BACKENDS,
    )


async def _gather(*work: Coroutine[Any, Any, Any]) -> list[Any]:
    """Return the results of all. The first failure cancels the others and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


def _link_log(link: Path, target: Path) -> None:
    """Link to a log in a server's own folder."""
    link.unlink(missing_ok=True)
    link.symlink_to(target)
