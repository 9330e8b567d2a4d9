"""The screen of services."""

from __future__ import annotations

from playwright.async_api import expect

from tests.console.site import ConsolePage, Site


class TestServices:
    async def test_a_service_is_registered_found_and_removed(self, admin: ConsolePage, site: Site) -> None:
        page = admin.page
        await admin.open("services", heading="Services")
        await expect(page.get_by_role("heading", name="No service is registered")).to_be_visible()
        await page.get_by_role("button", name="Register a service").click()
        await page.get_by_label("Name", exact=True).fill("pocket-tts")
        await page.get_by_label("Base URL").fill("ftp://nowhere")
        await page.get_by_role("button", name="Register", exact=True).click()
        # The API's own error, beside its field.
        await expect(page.get_by_label("Base URL")).to_have_attribute("aria-invalid", "true")
        await page.get_by_label("Base URL").fill("http://127.0.0.1:9")
        await page.get_by_role("button", name="Register", exact=True).click()
        row = page.get_by_role("row", name="pocket-tts")
        await expect(row).to_contain_text("http://127.0.0.1:9")
        await admin.shot("services")
        await page.keyboard.press("/")
        await page.keyboard.type("nothing like it")
        await expect(row).to_have_count(0)
        assert "name=nothing+like+it" in page.url
        await page.get_by_role("button", name="Clear").click()
        await row.get_by_role("button", name="Remove").click()
        await page.get_by_role("dialog").get_by_role("button", name="Remove").click()
        await expect(page.get_by_role("heading", name="No service is registered")).to_be_visible()
        assert (await site.cluster.get("/v1/services")).json()["data"] == []
