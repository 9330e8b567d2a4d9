"""Sign-in, navigation, keyboard, and what each role sees."""

from __future__ import annotations

from playwright.async_api import expect

from tests.cluster import KEY
from tests.console.site import ConsolePage, Site


class TestShell:
    async def test_somebody_signs_in_goes_on_where_they_wanted_to_and_signs_out(self, site: Site) -> None:
        tab = await site.tab(None)
        page = tab.page
        await tab.open("services?name=x", heading="Sign in")
        await tab.shot("sign-in")
        await page.get_by_label("API key").fill("nexus-wrong")
        await page.keyboard.press("Enter")
        # The gateway's own words, beside the field.
        await expect(page.get_by_role("alert")).to_contain_text("The API key is not valid")
        await expect(page.get_by_label("API key")).to_have_attribute("aria-invalid", "true")
        await page.get_by_label("API key").fill(KEY)
        await page.get_by_role("button", name="Sign in with a key").click()
        await tab.shows("Services")
        assert page.url == f"{site.url}/ui/services?name=x"
        await page.get_by_role("button", name="Sign out").click()
        await tab.shows("Sign in")
        await page.reload()
        await tab.shows("Sign in")
        assert tab.problems == []
        await site.close_tabs()

    async def test_a_session_that_ends_is_begun_again_where_one_was(self, admin: ConsolePage) -> None:
        page = admin.page
        await admin.open("services", heading="Services")
        await page.get_by_role("button", name="Register a service").click()
        await page.get_by_label("Name", exact=True).fill("half-written")
        await page.context.clear_cookies()
        await page.get_by_role("button", name="Register", exact=True).click()
        dialog = page.get_by_role("dialog", name="Your session has ended")
        await expect(dialog).to_be_visible()
        await dialog.get_by_label("API key").fill(KEY)
        await dialog.get_by_role("button", name="Sign in with a key").click()
        await expect(dialog).to_be_hidden()
        await expect(page.get_by_label("Name", exact=True)).to_have_value("half-written")

    async def test_what_the_caller_may_not_see_is_not_shown(self, member: ConsolePage) -> None:
        await member.open("services", heading="There is no such page")
        await expect(member.page.get_by_role("link", name="Services")).to_have_count(0)

    async def test_keys_and_colors(self, admin: ConsolePage) -> None:
        page = admin.page
        await admin.open("services", heading="Services")
        await page.keyboard.press("?")
        await expect(page.get_by_role("dialog", name="Keyboard")).to_contain_text("Show these keys")
        await page.keyboard.press("Escape")
        await expect(page.get_by_role("dialog")).to_have_count(0)
        await page.get_by_label("Colors").select_option("dark")
        await page.reload()
        await admin.shows("Services")
        assert await page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(16, 20, 26)"
        assert await page.evaluate("document.documentElement.dataset.theme") == "dark"

    async def test_nothing_is_loaded_from_elsewhere(self, admin: ConsolePage, site: Site) -> None:
        urls: list[str] = []
        admin.page.on("request", lambda request: urls.append(request.url))
        await admin.open("services", heading="Services")
        assert len(urls) > 3
        assert [url for url in urls if not url.startswith((site.url, "data:"))] == []
