"""The screen of workers and hosts."""

from __future__ import annotations

from playwright.async_api import expect

from tests.console.site import ConsolePage, Site


class TestHosts:
    async def test_a_worker_is_seen_its_log_is_read_it_drains_and_stays_in_view(
        self, admin: ConsolePage, site: Site
    ) -> None:
        page = admin.page
        await site.cluster.start_worker("echo", name="host-worker", WORKER_MODELS="host-model")
        await admin.open("hosts", heading="Workers and hosts")
        row = page.get_by_role("row", name="host-worker")
        await expect(row).to_contain_text("ready")
        await expect(row).to_contain_text("host-model")
        await row.get_by_role("button", name="Log").click()
        await expect(page.get_by_role("dialog")).to_contain_text("worker.serving")
        await page.get_by_role("dialog").get_by_role("button", name="Close").click()
        await row.get_by_role("button", name="Drain").click()
        await page.get_by_role("dialog").get_by_role("button", name="Drain").click()
        await expect(row).to_contain_text("gone")
        await admin.shot("hosts")
