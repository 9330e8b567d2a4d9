"""`nexus permissions`: print the permissions that each process needs at NATS, and set up those of etcd."""

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
    help="Print NATS accounts and users with least privilege, as blocks for nats-server's configuration; set up etcd's. "
    "deploy/nats holds a whole configuration.",
    no_args_is_help=True,
)

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
User = Annotated[str, typer.Argument(help="Name of the user, the process's NATS_USER. Allowed: [A-Za-z0-9_-].")]
HEAD = "# Made by `nexus permissions`; the code's own list, held by tests/deploy/test_permissions.py.\n"


@app.command()
def worker(
    name: User,
    model: Annotated[
        list[str] | None, typer.Option("--model", "-m", help="Model that the worker serves; may be repeated.")
    ] = None,
    capability: Annotated[
        list[str] | None,
        typer.Option("--capability", "-c", help="Capability of these models; may be repeated. Default: all."),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Allow all models and capabilities.")] = False,
    worker_name: Annotated[
        list[str] | None,
        typer.Option(
            "--worker", help="WORKER_NAME of a process with this user; may be repeated. Default: the user's name."
        ),
    ] = None,
    any_worker: Annotated[
        bool,
        typer.Option(
            "--any-worker",
            help="Allow any worker name, for processes without a WORKER_NAME such as `--scale worker=4`.",
        ),
    ] = False,
) -> None:
    """Print the account of a worker.

    Its user may take jobs from the queues of its models only. Paste it into `accounts`.
    """
    from backbone.bus.nats.permissions import queues_for, worker_account, worker_permissions

    names = ["*"] if any_worker else (worker_name or [name])
    _check([name, *(one for one in names if one != "*")])
    if every == bool(model):
        raise typer.BadParameter("name the models that the worker serves with --model, or pass --all")
    queues = None if every else queues_for(model or (), _capabilities(capability))
    print(_account(worker_account(name), name, worker_permissions(_inbox(name), workers=names, queues=queues)))


@app.command()
def gateway(name: User = "gateway") -> None:
    """Print the user of a gateway.

    It owns the streams and their consumers, but may delete no stream. Paste it into `users` of the account NEXUS.
    """
    from backbone.bus.nats.permissions import gateway_permissions

    _check([name])
    print(_block(name, gateway_permissions(_inbox(name))))


@app.command()
def monitor(name: User = "monitor") -> None:
    """Print the account of a monitor.

    Its user reads queue depths and sizes, but no messages. Paste it into `accounts`.
    """
    from backbone.bus.nats.permissions import monitor_permissions

    _check([name])
    print(_account(f"MONITOR-{name}", name, monitor_permissions(_inbox(name))))


@app.command()
def config() -> None:
    """Print all roles, exports and imports.

    They are variables of nats-server's configuration: deploy/nats/permissions.conf.
    """
    print(render_permissions_conf(), end="")


@app.command()
def etcd(
    root_password_file: Annotated[Path, typer.Option("--root-password-file", help="File with the password of `root`.")],
    gateway_password_file: Annotated[
        Path, typer.Option("--gateway-password-file", help="File with the password of `gateway`.")
    ],
    worker_password_file: Annotated[
        Path, typer.Option("--worker-password-file", help="File with the password of `worker`.")
    ],
) -> None:
    """Create etcd's users and roles.

    It also turns authentication on. Run it again after a change: it repeats nothing. ETCD_URL, ETCD_PREFIX, ETCD_TLS_CA and ETCD_TLS_CERT name the server, as for every process.
    """
    import asyncio

    from pydantic import SecretStr

    from backbone.registry.auth import EtcdCredentials, read_etcd_access
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
        turned_on = asyncio.run(create_users(access, settings.etcd_prefix, passwords))
    except (ConfigurationError, Unavailable) as error:
        raise ConsoleError(str(error)) from error
    for role, given in role_grants(settings.etcd_prefix).items():
        print(f"{role}: " + ", ".join(f"{grant.kind.lower()} {grant.prefix}" for grant in given))
    print("authentication turned on" if turned_on else "authentication was already on")
    root = EtcdCredentials(ROOT, Password("--root-password-file", SecretStr(passwords[ROOT]), ""))
    if version := asyncio.run(_vulnerable_version(replace(access, login=root), settings.etcd_prefix)):
        print(f"nexus: warning: THESE ROLES ARE NOT ENFORCED: etcd {version}: {ADVICE}", file=sys.stderr)


async def _vulnerable_version(access: EtcdAccess, prefix: str) -> str:
    """Return the version of an etcd that does not enforce its roles; empty for another, or one that hides its version."""
    from backbone.registry.etcd_client import EtcdClient
    from backbone.registry.version_check import vulnerable_version
    from schemas.errors import Unavailable

    client = EtcdClient(access.url, probe_key=prefix, tls=access.tls, login=access.login)
    try:
        await client.open()
        return await vulnerable_version(client)
    except Unavailable:
        return ""
    finally:
        await client.close()


def render_permissions_conf() -> str:
    """Return the permissions of `gateway`, `worker` (all queues) and `monitor`, and the exports and imports of accounts."""
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
    """Return the variable, of the environment or the configuration, with the user's password for nats-server."""
    return f"NATS_{re.sub('[^A-Za-z0-9]', '_', user).upper()}_PASSWORD"


def _inbox(user: str) -> str:
    return f"_INBOX.{user}"


def _capabilities(names: Iterable[str] | None) -> list[Capability]:
    from schemas.jobs import Capability

    known = {str(one): one for one in Capability}
    wanted = list(names or (one for one in known if one != Capability.MODELS))
    if unknown := [one for one in wanted if one not in known]:
        raise typer.BadParameter(f"'{unknown[0]}' is not a capability; choose from {', '.join(known)}")
    return [known[one] for one in wanted]


def _check(names: Iterable[str]) -> None:
    for name in names:
        if not _NAME.fullmatch(name):
            raise ConsoleError(f"'{name}' is not a valid name in NATS. Use only [A-Za-z0-9_-].")


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
    from backbone.bus.nats.permissions import PULL, REPLY_ROUTE_S

    def service(subject: str) -> str:
        kind = "response_type: stream, " if subject.startswith(PULL) else ""
        return f'{{ service: {json.dumps(subject)}, {kind}response_threshold: "{REPLY_ROUTE_S}s" }}'

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
