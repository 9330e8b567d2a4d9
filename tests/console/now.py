"""The screen of what happens now."""

from __future__ import annotations

from playwright.async_api import expect

from tests.cluster import chat
from tests.console.site import ConsolePage, Site


class TestNow:
    async def test_a_worker_that_is_killed_is_seen_and_so_are_the_jobs_that_wait_for_it(
        self, admin: ConsolePage, site: Site
    ) -> None:
        page, cluster = admin.page, site.cluster
        worker = await cluster.start_worker("echo", name="doomed", WORKER_MODELS="doomed-model")
        await admin.open("now", heading="Now")
        row = page.get_by_role("row", name="doomed-model")
        await expect(row).to_contain_text("ready")
        await expect(page.get_by_text("live", exact=True)).to_be_visible()
        await admin.shot("now")
        cluster.workers[worker].kill()
        await expect(page.get_by_role("row", name="doomed-model")).to_have_count(0)
        answer = await cluster.post(
            "/v1/chat/completions", chat(model="doomed-model"), headers={"prefer": "respond-async"}
        )
        assert answer.status_code == 202
        await expect(row).to_contain_text("no worker")
        item = page.get_by_role("region", name="Needs attention").get_by_role("listitem")
        await expect(item.filter(has_text="1 job waits for 'doomed-model'")).to_contain_text("Start a worker for it")
        await admin.shot("now-attention")
        await cluster.post(f"/v1/jobs/{answer.json()['id']}/cancel", {})
        await expect(row).to_have_count(0)

    async def test_without_nats_the_figures_stay_and_the_screen_says_since_when(
        self, admin: ConsolePage, site: Site
    ) -> None:
        page, cluster = admin.page, site.cluster
        await admin.open("now", heading="Now")
        row = page.get_by_role("row", name="echo", exact=False).first
        await expect(row).to_contain_text("ready")
        cluster.nats.kill()
        await cluster.nats.process.wait()
        await expect(page.get_by_text("NATS does not answer since")).to_be_visible()
        await expect(row).to_contain_text("ready")
        await admin.shot("now-stale")
        await cluster.nats.restart()
        await expect(page.get_by_text("NATS does not answer since")).to_have_count(0)

    async def test_an_empty_nexus_says_the_next_step(self, admin: ConsolePage, site: Site) -> None:
        await site.cluster.start_gateway(ETCD_PREFIX="/empty/")
        await admin.page.goto(f"{site.cluster.urls[-1]}/ui/now")
        await expect(admin.page.get_by_role("heading", name="No worker serves a model yet")).to_be_visible()
        await expect(admin.page.get_by_text("nexus worker --backend")).to_be_visible()
