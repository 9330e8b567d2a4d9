"""A real identity provider for tests, and a browser that signs in with it."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from html import unescape
from typing import Any, Self

import httpx

from tests.ports import free_port
from tests.servers import ROOT

PASSWORD = "correct horse battery"
CLIENT_ID, CLIENT_SECRET = "nexus", "a-secret-of-the-client"


class IdentityProvider:
    """Canaille in a process of its own, with people in memory. Each start has new keys."""

    def __init__(self, redirect_base: str, **groups: list[str]) -> None:
        """`groups`: of each person, by name."""
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._parameters = {
            "port": self.port,
            "client": {
                "client_id": CLIENT_ID,
                "client_secret": CLIENT_SECRET,
                "redirect_uris": [redirect_base + "/auth/callback"],
                "post_logout_redirect_uris": [redirect_base + "/"],
            },
            "people": [{"name": name, "password": PASSWORD, "groups": found} for name, found in groups.items()],
        }
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start, and wait until it answers."""
        command = (sys.executable, "-m", "tests.identity_provider_server", json.dumps(self._parameters))
        self._process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stderr=asyncio.subprocess.DEVNULL)
        async with httpx.AsyncClient() as http, asyncio.timeout(60):
            while True:
                try:
                    await http.get(self.url + "/.well-known/openid-configuration")
                    return
                except httpx.HTTPError:
                    assert self._process.returncode is None, "the identity provider has ended"
                    await asyncio.sleep(0.05)

    async def stop(self) -> None:
        """Kill it."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    def settings(self, **more: str) -> dict[str, str]:
        """A gateway's settings."""
        return {
            "OIDC_ISSUER": self.url,
            "OIDC_CLIENT_ID": CLIENT_ID,
            "OIDC_CLIENT_SECRET": CLIENT_SECRET,
            "OIDC_SCOPES": "openid profile email groups",
            **more,
        }


class Browser:
    """Somebody's browser, without scripts: it keeps cookies, and fills in forms."""

    def __init__(self, gateway: str) -> None:
        self.gateway = gateway
        self.http = httpx.AsyncClient(headers={"accept": "text/html"}, timeout=60)
        self.csrf = ""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.http.aclose()

    async def begin(self, path: str = "/auth/login?with=openid") -> httpx.URL:
        """Begin to sign in; the provider's URL to which the gateway sends the browser."""
        sent = await self.http.get(self.gateway + path)
        assert sent.status_code == 302, sent.text
        return httpx.URL(sent.headers["location"])

    async def log_in(self, url: httpx.URL, name: str) -> httpx.URL:
        """Log in at the provider; the gateway's URL to which it sends the browser back."""
        answer = await self.http.get(url)
        for _ in range(10):
            if answer.is_redirect:
                url = answer.url.join(answer.headers["location"])
                if str(url).startswith(self.gateway):
                    return url
                answer = await self.http.get(url)
            else:
                answer = await self._fill_in(answer, {"login": name, "password": PASSWORD})
        raise AssertionError(answer.text)

    async def _fill_in(self, page: httpx.Response, known: dict[str, str]) -> httpx.Response:
        form = re.search(r"<form.*?</form>", page.text, re.DOTALL)
        assert form is not None, page.text
        fields = {}
        for field in re.findall(r"<input[^>]*>", form[0]):
            if name := re.search(r'name="([^"]*)"', field):
                value = re.search(r'value="([^"]*)"', field)
                fields[name[1]] = known.get(name[1], unescape(value[1]) if value else "")
        return await self.http.post(page.url, data=fields)

    async def sign_in(self, name: str, path: str = "/auth/login?with=openid") -> httpx.Response:
        """All of it; the gateway's last answer."""
        answer = await self.http.get(await self.log_in(await self.begin(path), name))
        if answer.is_redirect:
            self.csrf = (await self.ask("GET", "/auth/session")).json()["csrf_token"]
        return answer

    async def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        """Send a request as a page of the gateway would."""
        headers = {"x-csrf-token": self.csrf, "sec-fetch-site": "same-origin"} | options.pop("headers", {})
        return await self.http.request(method, self.gateway + path, headers=headers, **options)
