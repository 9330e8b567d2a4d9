"""The screens of jobs, of one job, and of dead letters."""

from __future__ import annotations

import re
from typing import Any

from playwright.async_api import expect

from tests.conftest import Eventually
from tests.console.site import ConsolePage, Site

ECHO = "/v1/chat/completions"


async def submit(site: Site, text: str = "hello", *, metadata: dict[str, str] | None = None, **body: Any) -> str:
    chat = {"model": "echo", "messages": [{"role": "user", "content": text}], **body}
    answer = await site.cluster.post("/v1/jobs", {"endpoint": ECHO, "body": chat, "metadata": metadata or {}})
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


class TestJobs:
    async def test_filters_stand_in_the_url_and_all_that_match_are_cancelled(
        self, admin: ConsolePage, site: Site, eventually: Eventually
    ) -> None:
        page = admin.page
        done = await submit(site)
        await eventually(lambda: is_in(site, done, "completed"))
        running = [await submit(site, echo={"delay_ms": 200, "tokens": 10_000}) for _ in range(3)]
        for job in running:
            await eventually(lambda job=job: is_in(site, job, "in_progress"))
        await admin.open("jobs", heading="Jobs")
        await expect(page.get_by_role("row", name=done)).to_contain_text("completed")
        await admin.shot("jobs")
        await page.get_by_label("Any status").select_option("in_progress")
        await expect(page.get_by_role("row", name=done)).to_have_count(0)
        assert "status=in_progress" in page.url
        await page.reload()
        await expect(page.get_by_label("Any status")).to_have_value("in_progress")
        await expect(page.get_by_role("row", name=running[0])).to_be_visible()
        await page.get_by_role("button", name="Cancel all that match").click()
        dialog = page.get_by_role("dialog")
        await dialog.get_by_role("button", name="Cancel", exact=True).last.click()
        await expect(dialog).to_contain_text("3 done.")
        await dialog.get_by_role("button", name="Close").last.click()
        await expect(page.get_by_role("row", name=running[0])).to_have_count(0)
        assert {(await cluster_job(site, job))["status"] for job in running} == {"cancelled"}

    async def test_a_job_streams_on_after_a_reload(self, admin: ConsolePage, site: Site) -> None:
        page = admin.page
        words = " ".join(f"word{number}" for number in range(200))
        job = await submit(site, words, stream=True, echo={"delay_ms": 40})
        await admin.open(f"jobs/{job}", heading=job)
        text = page.get_by_role("region", name="Streamed text")
        await expect(text).to_contain_text("word3")
        async with page.expect_request(re.compile("/events$")) as resumed:
            await page.reload()
        assert re.fullmatch(r"1-1-\d+", (await resumed.value).headers.get("last-event-id", ""))
        await expect(text).to_contain_text("word199")
        assert re.findall(r"word\d+", await text.inner_text()) == words.split(), (
            "nothing is lost, and nothing comes twice"
        )
        await expect(page.get_by_text("first output after")).to_be_visible()
        await expect(page.get_by_role("main")).to_contain_text("application/json")
        await admin.shot("job")

    async def test_a_job_whose_worker_was_killed_shows_both_attempts(
        self, admin: ConsolePage, site: Site, eventually: Eventually
    ) -> None:
        page = admin.page
        cluster = site.cluster
        model = "echo-killed"
        name = await cluster.start_worker("echo", name="victim", WORKER_MODELS=model)
        job = await submit(site, model=model, stream=True, echo={"delay_ms": 200, "tokens": 10_000})
        await admin.open(f"jobs/{job}", heading=job)
        await expect(page.get_by_text("Attempt 1")).to_be_visible()
        cluster.workers[name].kill()
        await cluster.start_worker("echo", name="heir", WORKER_MODELS=model)
        await expect(page.get_by_text("Attempt 2")).to_be_visible(timeout=60_000)
        await expect(page.get_by_role("list", name="Timeline")).to_contain_text("its worker was lost")
        await admin.shot("job-two-attempts")
        await page.get_by_role("button", name="Cancel", exact=True).click()
        await page.get_by_role("dialog").get_by_role("button", name="Cancel", exact=True).last.click()
        await eventually(lambda: is_in(site, job, "cancelled"))
        await cluster.stop_workers("heir")


class TestDeadLetters:
    async def test_a_group_is_replayed(self, admin: ConsolePage, site: Site, eventually: Eventually) -> None:
        page = admin.page
        jobs = [await submit(site, echo={"fail": "before"}) for _ in range(2)]
        for job in jobs:
            await eventually(lambda job=job: is_in(site, job, "failed"))
        await admin.open("dead-letters", heading="Dead letters")
        group = page.get_by_role("region", name="Groups of dead letters").get_by_role("row").nth(1)
        await expect(group).to_contain_text("2")
        await admin.shot("dead-letters")
        await group.get_by_role("button", name="Replay all").click()
        dialog = page.get_by_role("dialog")
        await dialog.get_by_role("button", name="Replay", exact=True).click()
        await expect(dialog).to_contain_text("2 done.")
        for job in jobs:
            assert (await cluster_job(site, job))["run"] == 2


async def cluster_job(site: Site, job: str) -> dict[str, Any]:
    return dict((await site.cluster.get(f"/v1/jobs/{job}")).json())


async def is_in(site: Site, job: str, wanted: str) -> bool:
    return (await cluster_job(site, job))["status"] == wanted
