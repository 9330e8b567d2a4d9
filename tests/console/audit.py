"""The screen of the audit log."""

from __future__ import annotations

import re

from playwright.async_api import expect

from tests.conftest import Eventually
from tests.console.site import ConsolePage, Site


class TestAudit:
    async def test_who_did_what_is_found_read_and_exported(
        self, admin: ConsolePage, site: Site, eventually: Eventually
    ) -> None:
        page = admin.page
        await site.cluster.http.put(site.url + "/v1/services/audited", json={"base_url": "http://127.0.0.1:9"})
        await site.cluster.http.put(site.url + "/v1/services/audited", json={"base_url": "http://127.0.0.1:10"})
        await site.cluster.http.delete(site.url + "/v1/services/audited")
        await site.cluster.http.delete(site.url + "/v1/services/audited")

        async def recorded() -> bool:
            return len((await site.cluster.get("/v1/audit?action=service.delete&target=audited")).json()["data"]) == 2

        await eventually(recorded, what="all of it in the audit log")
        await admin.open("audit", heading="Audit")
        await expect(page.get_by_role("row", name="service.delete")).to_have_count(2)
        await admin.shot("audit")
        await page.get_by_label("Any result").select_option("failed")
        await expect(page.get_by_role("row", name="service_not_found")).to_be_visible()
        await expect(page.get_by_role("row", name="service.set")).to_have_count(0)
        await page.get_by_role("button", name="Clear").click()
        await page.keyboard.press("/")
        await page.keyboard.type("service.set")
        await expect(page.get_by_role("row", name="service.set")).to_have_count(2)
        await expect(page).to_have_url(re.compile("action=service.set"))
        # The newest: j goes to the first row, Enter opens it.
        await page.keyboard.press("Escape")
        await page.keyboard.press("j")
        await page.keyboard.press("Enter")
        dialog = page.get_by_role("dialog", name="service.set")
        change = dialog.get_by_role("row", name="base_url")
        await expect(change).to_contain_text(re.compile(r"127\.0\.0\.1:9\s*http://127\.0\.0\.1:10"))
        await page.keyboard.press("Escape")
        async with page.expect_download() as downloading:
            await page.get_by_role("link", name="Export JSON lines").click()
        lines = (await (await downloading.value).path()).read_text().splitlines()
        assert len(lines) == 2
        await page.get_by_label("Action, or key.*").fill("not an action")
        await expect(page.get_by_role("alert")).to_contain_text("'action' must be a name")
