"""Fixtures of the console's tests. One Nexus and one Chromium serve all of them: they run in one process, in one module.

| fixture | what |
|---|---|
| `site` | the Nexus, `site.cluster`, and `site.tab(key)` for further tabs |
| `admin` | a tab in which the bootstrap key has signed in |
| `member` | a tab in which a key has signed in that may use models and jobs, and nothing else |

A test's tabs are closed at its end. What the browser's console says of errors fails the test.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from cli.embedded.binaries import BinaryMissing
from gateway.console.files import APP
from tests.cluster import Cluster
from tests.console.browser import chromium, give_up
from tests.console.site import ConsolePage, Site

PRICES = '{"currency": "usd", "prices": [{"model": "echo", "input_per_1m": 200, "output_per_1m": 800}]}'


@pytest_asyncio.fixture(scope="package", loop_scope="session")
async def site(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    """Shared: a test that stops a part of it starts one of its own."""
    if not (APP / "index.html.gz").is_file():
        give_up("the console is not built: run `make console`")
    folder = tmp_path_factory.mktemp("console")
    prices = folder / "prices.json"
    prices.write_text(PRICES)
    cluster = Cluster(folder, LEDGER_URL=f"sqlite:///{folder / 'ledger.db'}", LEDGER_PRICES_FILE=str(prices))
    try:
        await cluster.__aenter__()
    except BinaryMissing as error:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(str(error))
    try:
        async with chromium() as browser:
            await cluster.start_gateway()
            await cluster.start_worker("echo", name="echo-1")
            made = await cluster.post(
                "/v1/keys", {"name": "member", "owner": "vision", "scopes": ["inference", "jobs"]}
            )
            assert made.status_code in {200, 201}, made.text
            yield Site(cluster, browser, made.json()["key"])
    finally:
        await cluster.__aexit__(None, None, None)


@pytest_asyncio.fixture(loop_scope="session")
async def admin(site: Site) -> AsyncIterator[ConsolePage]:
    tab = await site.tab()
    yield tab
    await site.close_tabs()
    assert tab.problems == []


@pytest_asyncio.fixture(loop_scope="session")
async def member(site: Site) -> AsyncIterator[ConsolePage]:
    tab = await site.tab(site.member_key)
    yield tab
    await site.close_tabs()
    assert tab.problems == []
