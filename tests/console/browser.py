"""Chromium for tests: from PATH, else a headless build from npm."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest
from playwright.async_api import Browser, async_playwright

FOLDER = Path(__file__).parent / "chromium"
NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
FLAGS = [
    "--no-sandbox",  # root of a container has none
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--force-color-profile=srgb",
    "--hide-scrollbars",
]
INSTALL_S = 180
FIND = "import chromium from '@sparticuz/chromium'; console.log(await chromium.executablePath())"


def give_up(reason: str) -> NoReturn:
    """Skip the tests; in CI, fail them."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


async def find_chromium() -> str:
    """Return the path of a Chromium."""
    named = os.environ.get("NEXUS_TEST_CHROMIUM")
    found = named or next(filter(None, map(shutil.which, NAMES)), None)
    return found or await _from_npm()


async def _from_npm() -> str:
    """Install the headless build for Linux on x86-64 that this folder's lock file names, and return its path."""
    if shutil.which("npm") is None:
        give_up("no Chromium is on PATH (Debian: apt install chromium), and no npm to install one with")
    output = ""
    for command in (["npm", "ci", "--no-audit", "--no-fund"], ["node", "--input-type=module", "--eval", FIND]):
        process = await asyncio.create_subprocess_exec(
            *command, cwd=FOLDER, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        try:
            async with asyncio.timeout(INSTALL_S):
                output = (await process.communicate())[0].decode(errors="replace")
        except TimeoutError:
            process.kill()
        if process.returncode:
            give_up(f"no Chromium is on PATH, and npm could not install one: {output[-500:]}")
    return output.strip().splitlines()[-1]


@asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    """Run a headless Chromium."""
    path = await find_chromium()
    async with async_playwright() as playwright:
        options: dict[str, Any] = {"executable_path": path, "args": FLAGS}
        browser = await playwright.chromium.launch(**options)
        try:
            yield browser
        finally:
            await browser.close()
