"""`nexus permissions`: what to write into nats-server's configuration, so that each process may do its work and no more."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.errors import ConsoleError

if TYPE_CHECKING:
    from backbone.bus.nats.permissions import AccountExports, NatsPermissions
    from backbone.registry.auth import EtcdAccess
    from schemas.jobs import Capability

app = typer.Typer(
    name="permissions",
    help="Accounts and users of NATS with the least of rights, as blocks for nats-server's configuration. deploy/nats has it whole.",
    no_args_is_help=True,
)

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
User = Annotated[str, typer.Argument(help="The user's name, NATS_USER of the process: [A-Za-z0-9_-].")]
HEAD = "# Made by `nexus permissions`; the code's own list, held by tests/deploy/test_permissions.py.\n"


@app.command()
def worker(
    name: User,
    model: Annotated[
        list[str] | None, typer.Option("--model", "-m", help="A model that it serves; may be repeated.")
    ] = None,
    capability: Annotated[
        list[str] | None, typer.Option("--capability", "-c", help="What it does with them. Default: everything.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="All models and capabilities.")] = False,
    worker_name: Annotated[
        list[str] | None,
        typer.Option("--worker", help="WORKER_NAME of a process with this user; may be repeated. Default: the user's."),
    ] = None,
    any_worker: Annotated[
        bool, typer.Option("--any-worker", help="Processes without a WORKER_NAME, as under `--scale worker=4`.")
    ] = False,
) -> None:
    """An account with one user, for a worker: it takes from the queues it is given, and nothing else. Goes into `accounts`."""
    from backbone.bus.nats.permissions import queues_for, worker_account, worker_permissions

    names = ["*"] if any_worker else (worker_name or [name])
    _check([name, *(one for one in names if one != "*")])
    if every == bool(model):
        raise typer.BadParameter("say which models it serves, with --model, or --all")
    queues = None if every else queues_for(model or (), _capabilities(capability))
    print(_account(worker_account(name), name, worker_permissions(_inbox(name), workers=names, queues=queues)))


@app.command()
def gateway(name: User = "gateway") -> None:
    """A gateway: it owns the streams and their consumers, but deletes no stream. Goes into `users` of the account NEXUS."""
    from backbone.bus.nats.permissions import gateway_permissions

    _check([name])
    print(_block(name, gateway_permissions(_inbox(name))))


@app.command()
def monitor(name: User = "monitor") -> None:
    """An account with one user, for a monitor: it sees depths and sizes, and no message. Goes into `accounts`."""
    from backbone.bus.nats.permissions import monitor_permissions

    _check([name])
    print(_account(f"MONITOR-{name}", name, monitor_permissions(_inbox(name))))


@app.command()
def config() -> None:
    """The roles, and what accounts export and import, as variables of nats-server's configuration: deploy/nats/permissions.conf."""
    print(render_permissions_conf(), end="")


@app.command()
def etcd(
    root_password_file: Annotated[Path, typer.Option("--root-password-file", help="Holds the password of `root`.")],
    gateway_password_file: Annotated[
        Path, typer.Option("--gateway-password-file", help="Holds the password of `gateway`.")
    ],
    worker_password_file: Annotated[
        Path, typer.Option("--worker-password-file", help="Holds the password of `worker`.")
    ],
) -> None:
    """Make etcd's users and roles, and switch its authentication on. Run it again after a change: it repeats nothing.

    Where etcd is, and whom it believes: ETCD_URL, ETCD_PREFIX, ETCD_TLS_CA, ETCD_TLS_CERT, as for every process.
    """
    import asyncio

    from pydantic import SecretStr

    from backbone.registry.auth import EtcdLogin, read_etcd_access
    from backbone.registry.permissions import GATEWAY, ROOT, WORKER, role_grants
    from backbone.registry.users import create_users
    from backbone.registry.version_check import ADVICE
    from backbone.secret_files import ConfigurationError, Password, read_secret
    from backbone.settings import CommonSettings
    from cli.serve import read_settings
    from schemas.errors import Unavailable

    settings = read_settings(CommonSettings)
    files = {ROOT: root_password_file, GATEWAY: gateway_password_file, WORKER: worker_password_file}
    try:
        passwords = {user: read_secret(f"--{user}-password-file", str(file)) for user, file in files.items()}
        access = read_etcd_access(
            settings.model_copy(update={"etcd_user": "", "etcd_password": None, "etcd_password_file": ""})
        )
        switched_on = asyncio.run(create_users(access, settings.etcd_prefix, passwords))
    except (ConfigurationError, Unavailable) as error:
        raise ConsoleError(str(error)) from error
    for role, given in role_grants(settings.etcd_prefix).items():
        print(f"{role}: " + ", ".join(f"{grant.kind.lower()} {grant.prefix}" for grant in given))
    print("authentication switched on" if switched_on else "authentication was on")
    root = EtcdLogin(ROOT, Password("--root-password-file", SecretStr(passwords[ROOT]), ""))
    if version := asyncio.run(_vulnerable_version(replace(access, login=root), settings.etcd_prefix)):
        print(f"nexus: THESE ROLES DO NOT HOLD: etcd {version}: {ADVICE}", file=sys.stderr)


async def _vulnerable_version(access: EtcdAccess, prefix: str) -> str:
    """Return the version of etcd where its roles do not hold, else "". An etcd that does not say counts as sound."""
    from backbone.registry.etcd_client import EtcdClient
    from backbone.registry.version_check import vulnerable_version
    from schemas.errors import Unavailable

    link = EtcdClient(access.url, probe_key=prefix, tls=access.tls, login=access.login)
    try:
        await link.open()
        return await vulnerable_version(link)
    except Unavailable:
        return ""
    finally:
        await link.close()


def render_permissions_conf() -> str:
    """Return the rights of the users `gateway`, `worker` (all queues) and `monitor`, and what their accounts share."""
    from backbone.bus.nats.permissions import (
        account_exports,
        gateway_permissions,
        monitor_permissions,
        worker_permissions,
    )

    worker = worker_permissions(_inbox("worker"), workers=("*",), queues=None)
    monitor = monitor_permissions(_inbox("monitor"))
    variables = {
        "NEXUS_EXPORTS": _exports(account_exports(), ""),
        "NEXUS_GATEWAY": _permissions(gateway_permissions(_inbox("gateway")), ""),
        "NEXUS_WORKER": _permissions(worker, ""),
        "NEXUS_WORKER_IMPORTS": _imports(worker, ""),
        "NEXUS_MONITOR": _permissions(monitor, ""),
        "NEXUS_MONITOR_IMPORTS": _imports(monitor, ""),
    }
    return HEAD + "".join(f"\n{name} = {value}\n" for name, value in variables.items())


def password_variable(user: str) -> str:
    """The variable, of the environment or the configuration, where nats-server finds the user's password."""
    return f"NATS_{re.sub('[^A-Za-z0-9]', '_', user).upper()}_PASSWORD"


def _inbox(user: str) -> str:
    return f"_INBOX.{user}"


def _capabilities(names: Iterable[str] | None) -> list[Capability]:
    from schemas.jobs import Capability

    known = {str(one): one for one in Capability}
    wanted = list(names or (one for one in known if one != Capability.MODELS))
    if unknown := [one for one in wanted if one not in known]:
        raise typer.BadParameter(f"no capability is called {unknown[0]}; there are {', '.join(known)}")
    return [known[one] for one in wanted]


def _check(names: Iterable[str]) -> None:
    for name in names:
        if not _NAME.fullmatch(name):
            raise ConsoleError(f"'{name}' cannot be a name in NATS: use [A-Za-z0-9_-]")


def _block(user: str, rights: NatsPermissions, indent: str = "") -> str:
    fields = {
        "user": json.dumps(user),
        "password": f"${password_variable(user)}",
        "permissions": _permissions(rights, f"{indent}  "),
    }
    return "{\n" + "".join(f"{indent}  {name}: {value}\n" for name, value in fields.items()) + f"{indent}}}"


def _account(name: str, user: str, rights: NatsPermissions) -> str:
    return f"{json.dumps(name)} {{\n  users: [ {_block(user, rights, '  ')} ]\n  imports: {_imports(rights, '  ')}\n}}"


def _exports(account_exports: AccountExports, indent: str) -> str:
    from backbone.bus.nats.permissions import ANSWER_S, PULL

    def service(subject: str) -> str:
        kind = "response_type: stream, " if subject.startswith(PULL) else ""
        return f'{{ service: {json.dumps(subject)}, {kind}response_threshold: "{ANSWER_S}s" }}'

    lines = [
        *map(service, account_exports.services),
        *(f"{{ stream: {json.dumps(one)} }}" for one in account_exports.streams),
    ]
    return _list(lines, indent)


def _imports(rights: NatsPermissions, indent: str) -> str:
    def imported(kind: str, subject: str) -> str:
        return f"{{ {kind}: {{ account: NEXUS, subject: {json.dumps(subject)} }} }}"

    services = [imported("service", subject) for subject in rights.services]
    return _list([*services, *(imported("stream", subject) for subject in rights.streams)], indent)


def _list(lines: Iterable[str], indent: str) -> str:
    return "[\n" + "".join(f"{indent}  {line}\n" for line in lines) + f"{indent}]"


def _permissions(rights: NatsPermissions, indent: str) -> str:
    def allow(subjects: Iterable[str]) -> str:
        lines = "".join(f"{indent}    {json.dumps(subject)}\n" for subject in subjects)
        return f"{{ allow: [\n{lines}{indent}  ] }}"

    publish, subscribe = allow(rights.publish), allow(rights.subscribe)
    return f"{{\n{indent}  publish: {publish}\n{indent}  subscribe: {subscribe}\n{indent}}}"
