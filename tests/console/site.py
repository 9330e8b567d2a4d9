"""A Nexus with its console, and browsers in which somebody has signed in."""

from __future__ import annotations

from typing import Any

import httpx
from playwright.async_api import Browser, BrowserContext, ConsoleMessage, Page, expect

from tests.cluster import KEY, Cluster
from tests.servers import ROOT

AXE = ROOT / "console" / "node_modules" / "axe-core" / "axe.min.js"
SCREENSHOTS = ROOT / "dist" / "screenshots"
DESKTOP = {"width": 1360, "height": 850}
PHONE = {"width": 360, "height": 740}
TIMEOUT_MS = 30_000
"""Machines may be busy: what a page should show is awaited for so long."""
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]

expect.set_options(timeout=TIMEOUT_MS)


class ConsolePage:
    """One tab. `page` is Playwright's."""

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.url = url
        self.problems: list[str] = []
        """Uncaught errors, and what the browser's own console says: refusals by the content security policy, for one."""
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("console", self._note)

    def _note(self, message: ConsoleMessage) -> None:
        # Answers of 4xx and lost connections are said so too; tests provoke them. An identity provider's pages are its own business.
        own = message.location.get("url", "").startswith(self.url)
        if own and message.type == "error" and not message.text.startswith("Failed to load resource"):
            self.problems.append(message.text)

    async def open(self, path: str = "", *, heading: str = "") -> None:
        """Load a path below `/ui/`, and wait for the heading of its screen."""
        await self.page.goto(f"{self.url}/ui/{path}")
        await self.shows(heading)

    async def go(self, path: str, *, heading: str = "") -> None:
        """Follow a link of the console, without loading the page again."""
        await self.page.evaluate(
            "path => { const link = Object.assign(document.createElement('a'), { href: '/ui/' + path });"
            " document.body.append(link); link.click(); link.remove(); }",
            path,
        )
        await self.shows(heading)

    async def shows(self, heading: str) -> None:
        """Wait for a heading."""
        if heading:
            await expect(self.page.get_by_role("heading", level=1, name=heading, exact=True)).to_be_visible()

    async def shot(self, name: str, *, full: bool = False) -> None:
        """Take pictures of the page, light and dark and as a phone shows it, and check its accessibility."""
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        for way, scheme, size in (("light", "light", DESKTOP), ("dark", "dark", DESKTOP), ("phone", "light", PHONE)):
            await self.page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
            await self.page.set_viewport_size(size)  # type: ignore[arg-type]
            await self.page.screenshot(path=SCREENSHOTS / f"{name}-{way}.png", full_page=full)
            if way != "phone":  # its colors and structure are those of the light one
                await self.check_accessibility(f"{name} ({way})")
            else:
                width = await self.page.evaluate("document.documentElement.scrollWidth")
                assert width <= PHONE["width"], f"{name}: {width} px wide on a phone"
        await self.page.emulate_media(color_scheme="light")
        await self.page.set_viewport_size(DESKTOP)  # type: ignore[arg-type]

    async def check_accessibility(self, name: str = "") -> None:
        """Fail for what axe finds: contrast, names of controls, structure."""
        if not await self.page.evaluate("'axe' in window"):
            await self.page.evaluate(AXE.read_text())
        found: list[dict[str, Any]] = await self.page.evaluate(
            "async rules => (await axe.run(document, { runOnly: rules, resultTypes: ['violations'] })).violations"
            ".map(one => ({ id: one.id, help: one.help, nodes: one.nodes.slice(0, 3).map(node => node.html.slice(0, 200)) }))",
            RULES,
        )
        assert not found, f"{name}: {found}"


class Site:
    """A running Nexus, and a browser beside it."""

    def __init__(self, cluster: Cluster, browser: Browser, member_key: str) -> None:
        self.cluster = cluster
        self.browser = browser
        self.member_key = member_key
        self._contexts: list[BrowserContext] = []

    @property
    def url(self) -> str:
        return self.cluster.url

    async def tab(self, key: str | None = KEY, *, url: str = "") -> ConsolePage:
        """Open a tab of a browser of its own, in which the holder of the key has signed in; None: nobody has. `url`: of another gateway."""
        context = await self.browser.new_context(viewport=DESKTOP)  # type: ignore[arg-type]
        self._contexts.append(context)
        context.set_default_timeout(TIMEOUT_MS)
        if key is not None:
            await context.add_cookies([await self._session(key)])
        return ConsolePage(await context.new_page(), url or self.url)

    async def close_tabs(self) -> None:
        """Close all tabs."""
        while self._contexts:
            await self._contexts.pop().close()

    async def _session(self, key: str) -> Any:
        """Sign in with a key; the session's cookie."""
        async with httpx.AsyncClient() as http:
            answer = await http.post(f"{self.url}/auth/login", data={"key": key})
        assert answer.status_code == 303, answer.text
        name, value = next(iter(answer.cookies.items()))
        return {"name": name, "value": value, "url": self.url, "httpOnly": True, "sameSite": "Lax"}
