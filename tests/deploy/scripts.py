"""Runs the project's scripts as people do: another process, its words and its exit status."""

from __future__ import annotations

import asyncio
import os
import subprocess
from pathlib import Path
from typing import Any

from tests.servers import ROOT

SCRIPTS = ROOT / "deploy" / "scripts"
DONE, FAILED, USAGE, MISSING = 0, 1, 2, 3


def plain_environment(**settings: str) -> dict[str, str]:
    """Nothing of Nexus's own settings but those given; English words of tools."""
    mine = ("ETCD_", "NATS_", "REDIS_", "GATEWAY_", "WORKER_", "NEXUS_", "NX_", "COMPOSE_")
    return {name: value for name, value in os.environ.items() if not name.startswith(mine)} | {
        "LC_ALL": "C.UTF-8",
        **settings,
    }


class Said:
    """What a script printed, and how it ended."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def all(self) -> str:
        return self.out + self.err

    def lines(self, word: str) -> list[str]:
        """The lines that begin with this word, without it."""
        return [line[len(word) :].strip() for line in self.out.splitlines() if line.startswith(f"{word} ")]


def run(script: str | Path, *words: str, cwd: Path | None = None, **settings: str) -> Said:
    """A script of deploy/scripts by its name, or any by its path."""
    path = SCRIPTS / script if isinstance(script, str) else script
    done = subprocess.run(
        ["bash", str(path), *words],
        cwd=cwd or ROOT,
        env=plain_environment(**settings),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=110,
        check=False,
    )
    return Said(done.returncode, done.stdout.decode(), done.stderr.decode())


async def run_beside(script: str | Path, *words: str, **settings: Any) -> Said:
    """The same, while the test's event loop goes on."""
    return await asyncio.to_thread(lambda: run(script, *words, **settings))
