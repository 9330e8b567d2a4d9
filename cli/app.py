"""The tree of `nexus` commands. The module of a command is imported when that command runs, and no other."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

COMMANDS = {
    "up": ("cli.stack.up:up", "Start everything on this machine: servers, gateway, workers."),
    "down": ("cli.stack.down:down", "Stop what `nexus up` runs."),
    "logs": ("cli.stack.logs:logs", "Show the logs of what `nexus up` runs, or all log lines about a request."),
    "env": ("cli.stack.environment:env", "Print the variables with which OpenAI's SDKs find the gateway."),
    "gateway": ("cli.serve:gateway", "Run a gateway."),
    "worker": ("cli.serve:worker", "Run a worker beside an inference server."),
    "status": ("cli.operations:status", "Show the gateway's dependencies, the workers and the queues."),
    "workers": ("cli.operations:workers", "Show the workers, their slots and their models."),
    "queues": ("cli.operations:queues", "Show how many jobs wait and run, per model and lane."),
    "models": ("cli.models:app", "Show the models and aliases, their workers and their parameters."),
    "pull": ("cli.models:pull", "Download a model to a worker's server."),
    "drain": ("cli.operations:drain", "Let a worker finish its jobs and take no new ones."),
    "chat": ("cli.chat:chat", "Chat with a model."),
    "submit": ("cli.submit:submit", "Submit a job, and print its id."),
    "watch": ("cli.watch:watch", "Follow a job to its end."),
    "backup": ("cli.backup.command:backup", "Save all data of NATS, etcd and Redis to a folder."),
    "restore": ("cli.backup.command:restore", "Restore a backup into empty servers."),
    "jobs": ("cli.jobs:app", "List, show, cancel and retry jobs."),
    "dlq": ("cli.dead_letters:app", "List, replay and delete dead letters."),
    "aliases": ("cli.aliases:app", "List, set and remove aliases for models."),
    "services": ("cli.services:app", "List, add and remove HTTP services."),
    "usage": ("cli.usage:usage", "Show what teams, keys and models have used."),
    "budgets": ("cli.budgets:budgets", "Show what is spent and left of budgets."),
    "audit": ("cli.audit:audit", "Show who did what to what, from where, with which result."),
    "keys": ("cli.keys:app", "List, create, change, rotate and revoke API keys."),
    "teams": ("cli.teams:app", "List, create, change and remove teams of keys."),
    "people": ("cli.people:app", "List people who sign in; change their roles and teams, disable them."),
    "login": ("cli.people:login", "Print a link that signs in with a browser, once."),
    "permissions": ("cli.permissions:app", "Print users and permissions for NATS, and set up those of etcd."),
}
"""Commands in the order of `nexus --help`: the function or `typer.Typer` of each, and its help text."""


class LazyCommands(MutableMapping[str, Any]):
    """Commands by name. Each is imported and built at its first use."""

    def __init__(self) -> None:
        self._targets = {name: target for name, (target, _) in COMMANDS.items()}
        self._built: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._built:
            self._built[name] = _build(name, self._targets[name])
        return self._built[name]

    def __setitem__(self, name: str, command: Any) -> None:
        self._targets.setdefault(name, "")
        self._built[name] = command

    def __delitem__(self, name: str) -> None:
        del self._targets[name]
        self._built.pop(name, None)

    def __contains__(self, name: object) -> bool:
        return name in self._targets

    def __iter__(self) -> Iterator[str]:
        return iter(self._targets)

    def __len__(self) -> int:
        return len(self._targets)


def _build(name: str, target: str) -> Any:
    """Import a command and return what typer runs."""
    module, _, attribute = target.partition(":")
    found = getattr(import_module(module), attribute)
    parent = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)
    if isinstance(found, typer.Typer):
        parent.add_typer(found, name=name)
    else:
        parent.command(name)(found)
    group = typer.main.get_group(parent)
    return group.commands[name]


class LazyGroup(TyperGroup):
    """The root group: it lists its commands without importing them, and imports the one that is called."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = LazyCommands()

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002
        """Return the names of the commands without importing them."""
        return list(self.commands)

    def format_commands(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002
        """Write the list of commands of `nexus --help` without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_) for name, (_, help_) in COMMANDS.items()])


app = typer.Typer(
    name="nexus",
    cls=LazyGroup,
    help="One OpenAI-compatible gateway in front of every AI server a team owns.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
)


def _print_version(is_set: bool) -> None:
    if is_set:
        from backbone.version import VERSION

        print(f"nexus {VERSION}")
        raise typer.Exit


@app.callback()
def _root(
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Do nothing before the command."""
