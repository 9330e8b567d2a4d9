"""The public status page."""

from __future__ import annotations

from playwright.async_api import expect

from tests.console.site import Site


class TestStatus:
    async def test_anybody_sees_which_models_are_up(self, site: Site) -> None:
        tab = await site.tab(None)
        await tab.open("status", heading="Status")
        row = tab.page.get_by_role("row", name="echo", exact=False).first
        await expect(row).to_contain_text("up")
        await tab.shot("status")
        assert tab.problems == []
        await site.close_tabs()
        found = (await site.cluster.get("/status.json")).json()
        assert found["state"] in {"up", "degraded"}
        assert set(found["models"][0]) == {"model", "state", "is_loaded", "expected_wait"}
