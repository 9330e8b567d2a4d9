"""Signing in with an identity provider, and the screen of people."""

from __future__ import annotations

from playwright.async_api import expect

from tests.cluster import free_port
from tests.console.site import Site
from tests.identity_provider import PASSWORD, IdentityProvider


class TestPeople:
    async def test_somebody_signs_in_with_a_provider_and_changes_a_persons_role(self, site: Site) -> None:
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        provider = IdentityProvider(url, ann=["nexus-admins"], max=["nexus-team-vision"])
        await provider.start()
        try:
            roles = {"OIDC_ROLES": "nexus-admins=admin, nexus-team-*=member", "OIDC_TEAMS": "nexus-team-*=*"}
            await site.cluster.start_gateway(GATEWAY_PORT=str(port), **provider.settings(PUBLIC_URL=url, **roles))
            for name in ("max", "ann"):
                tab = await site.tab(None, url=url)
                page = tab.page
                await tab.open("keys?q=x", heading="Sign in")
                await page.get_by_role("link", name="Sign in with").click()
                await page.locator("input[name=login]").fill(name)
                await page.keyboard.press("Enter")
                await page.locator("input[name=password]").fill(PASSWORD)
                await page.keyboard.press("Enter")
                # A member manages the team's keys, and nothing else.
                await tab.shows("Keys")
                assert page.url == f"{url}/ui/keys?q=x"
                await expect(page.get_by_role("link", name="People")).to_have_count(1 if name == "ann" else 0)
            await page.get_by_role("link", name="People").click()
            await tab.shows("People")
            await expect(page.get_by_role("row", name="max")).to_contain_text("member")
            await tab.shot("people")
            await page.get_by_role("row", name="max").click()
            dialog = page.get_by_role("dialog", name="max")
            await dialog.get_by_label("Role").select_option("operator")
            await tab.shot("person")
            await dialog.get_by_role("button", name="Save").click()
            await expect(page.get_by_role("row", name="max")).to_contain_text("operator (set here)")
            assert tab.problems == []
        finally:
            await site.close_tabs()
            await provider.stop()
