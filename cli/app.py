"""The tree of `nexus` commands. A command's module is imported when that command runs: `nexus jobs list` pays for nothing else."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

COMMANDS = {
    "up": ("cli.stack.up:up", "Start everything on this machine: servers, gateway, workers."),
    "down": ("cli.stack.down:down", "Stop what `nexus up` runs."),
    "logs": ("cli.stack.logs:logs", "Show the logs of what `nexus up` runs."),
    "env": ("cli.environment:env", "Print variables by which OpenAI's SDKs find the running gateway."),
    "gateway": ("cli.serve:gateway", "Run one gateway."),
    "worker": ("cli.serve:worker", "Run one worker beside an inference server."),
    "status": ("cli.operations:status", "Show the parts, the workers and the queues."),
    "workers": ("cli.operations:workers", "Show the workers, their slots and their models."),
    "queues": ("cli.operations:queues", "Show how many jobs wait and run, per model and lane."),
    "models": ("cli.models:models", "Show the models and aliases, and which workers serve them."),
    "pull": ("cli.models:pull", "Have a worker's server fetch a model."),
    "drain": ("cli.operations:drain", "Let a worker finish what it runs and take nothing new."),
    "chat": ("cli.chat:chat", "Chat with a model."),
    "submit": ("cli.submit:submit", "Submit a job, and print its id."),
    "watch": ("cli.watch:watch", "Follow a job to its end."),
    "backup": ("cli.backup.command:backup", "Save everything that is stored into a folder."),
    "restore": ("cli.backup.command:restore", "Write a backup into servers that hold nothing."),
    "jobs": ("cli.jobs:app", "List, show, cancel and retry jobs."),
    "dlq": ("cli.dead_letters:app", "List, replay and delete dead letters."),
    "aliases": ("cli.aliases:app", "List, set and remove aliases of models."),
    "services": ("cli.services:app", "List, add and remove HTTP services."),
    "keys": ("cli.keys:app", "List, create and revoke API keys."),
    "permissions": ("cli.permissions:app", "Print accounts and users for nats-server's configuration."),
}
"""Each command in the order of `nexus --help`: where it is, a function or a `typer.Typer`, and what it does."""


class LazyCommands(MutableMapping[str, Any]):
    """LazyCommands by name, each imported and built at its first use."""

    def __init__(self) -> None:
        self._places = {name: place for name, (place, _) in COMMANDS.items()}
        self._built: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._built:
            self._built[name] = _build(name, self._places[name])
        return self._built[name]

    def __setitem__(self, name: str, command: Any) -> None:
        self._places.setdefault(name, "")
        self._built[name] = command

    def __delitem__(self, name: str) -> None:
        del self._places[name]
        self._built.pop(name, None)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _build(name: str, place: str) -> Any:
    """Import a command, and make of it what typer runs."""
    module, _, attribute = place.partition(":")
    found = getattr(import_module(module), attribute)
    parent = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)
    if isinstance(found, typer.Typer):
        parent.add_typer(found, name=name)
    else:
        parent.command(name)(found)
    group = typer.main.get_group(parent)
    return group.commands[name]


class LazyGroup(TyperGroup):
    """The root: it knows its commands' names, and imports the one that is called."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = LazyCommands()

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002
        """Return the names without importing anything."""
        return list(self.commands)

    def format_commands(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002
        """Write the list of `nexus --help`, again without importing anything."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_) for name, (_, help_) in COMMANDS.items()])


app = typer.Typer(
    name="nexus",
    cls=LazyGroup,
    help="One OpenAI-compatible door in front of every AI server a team owns.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
)


def _version(wanted: bool) -> None:
    if wanted:
        from backbone.version import VERSION

        print(f"nexus {VERSION}")
        raise typer.Exit


@app.callback()
def _root(
    _: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    """Nothing before the command itself."""
