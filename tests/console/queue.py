"""The screen of a model's queue."""

from __future__ import annotations

from playwright.async_api import expect

from tests.cluster import chat
from tests.console.site import ConsolePage, Site

MODEL = "org/queue-model"


class TestQueue:
    async def test_a_queue_is_held_its_jobs_change_lanes_and_are_cancelled_and_it_is_released(
        self, admin: ConsolePage, site: Site
    ) -> None:
        page, cluster = admin.page, site.cluster
        worker = await cluster.start_worker("echo", name="queue-worker", WORKER_MODELS=MODEL)

        async def submit(tier: str) -> str:
            answer = await cluster.post(
                "/v1/chat/completions", chat(model=MODEL, service_tier=tier), headers={"prefer": "respond-async"}
            )
            assert answer.status_code == 202, answer.text
            return str(answer.json()["id"])

        await admin.open("now", heading="Now")
        await page.get_by_role("link", name=MODEL).click()
        await admin.shows(MODEL)
        await expect(page.get_by_role("heading", name="No job waits")).to_be_visible()
        await page.get_by_role("button", name="Hold the queue").click()
        await page.get_by_label("Reason").fill("the host is being updated")
        await page.get_by_role("dialog").get_by_role("button", name="Hold the queue").click()
        await expect(page.get_by_text("Reason: the host is being updated")).to_be_visible()
        first, second, third = [await submit(tier) for tier in ("default", "default", "flex")]
        rows = page.get_by_role("region", name="Waiting").get_by_role("row")
        await expect(rows).to_have_count(4)
        await expect(rows.nth(3)).to_contain_text(third)
        await admin.shot("queue")
        await rows.nth(3).get_by_role("combobox").select_option("priority")
        await expect(rows.nth(1)).to_contain_text(third)
        await rows.filter(has_text=first).get_by_role("button", name="Cancel").click()
        await page.get_by_role("dialog").get_by_role("button", name="Cancel the job").click()
        await expect(rows).to_have_count(3)
        await page.get_by_role("button", name="Release the queue").click()
        await page.get_by_role("dialog").get_by_role("button", name="Release the queue").click()
        await expect(page.get_by_role("heading", name="No job waits")).to_be_visible()
        ended = [(await cluster.get(f"/v1/jobs/{job}?wait=30")).json()["status"] for job in (first, second, third)]
        assert ended == ["cancelled", "completed", "completed"]
        await cluster.stop_workers(worker)
