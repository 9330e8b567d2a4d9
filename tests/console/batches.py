"""The screens of batches and files."""

from __future__ import annotations

import json

from playwright.async_api import FilePayload, expect

from tests.console.site import ConsolePage

LINES = 60


def line(i: int, **fields: object) -> str:
    body = {"model": "echo", "messages": [{"role": "user", "content": f"question {i}"}]} | fields
    return json.dumps({"custom_id": f"q{i}", "method": "POST", "url": "/v1/chat/completions", "body": body})


class TestBatches:
    async def test_a_file_is_uploaded_run_followed_and_read(self, admin: ConsolePage) -> None:
        page = admin.page
        await admin.open("batches", heading="Batches and files")
        await expect(page.get_by_role("heading", name="No batch yet")).to_be_visible()
        await page.get_by_role("button", name="Start a batch").click()
        dialog = page.get_by_role("dialog", name="Start a batch")
        content = "\n".join(line(i) if i % 20 else line(i, model="missing") for i in range(LINES)).encode()
        file = FilePayload(name="requests.jsonl", mimeType="application/jsonl", buffer=content)
        await dialog.get_by_label("File with one request").set_input_files(file)
        await dialog.get_by_role("button", name="Start", exact=True).click()
        await expect(page.get_by_text("completed", exact=True)).to_be_visible()
        await expect(page.get_by_text(f"{LINES} / {LINES}")).to_be_visible()
        await expect(page.get_by_role("region", name="Failed lines").get_by_role("row", name="q20")).to_contain_text(
            "model"
        )
        await expect(page.get_by_role("row", name="question 1", exact=False).first).to_contain_text("200")
        await admin.shot("batch")
        async with page.expect_download() as downloading:
            await page.get_by_role("link", name="Answers").click()
        assert len((await (await downloading.value).path()).read_text().splitlines()) == LINES - 3
        await page.get_by_role("link", name="Batches and files").first.click()
        await admin.shows("Batches and files")
        await expect(
            page.get_by_role("region", name="Batches", exact=True).get_by_role("row", name="batch_")
        ).to_contain_text("requests.jsonl")
        await admin.shot("batches")

    async def test_lines_that_are_wrong_are_named(self, admin: ConsolePage) -> None:
        page = admin.page
        await admin.open("batches", heading="Batches and files")
        file = FilePayload(name="wrong.jsonl", mimeType="application/jsonl", buffer=f"{line(1)}\nnonsense\n".encode())
        await page.get_by_label("Upload a file").set_input_files(file)
        row = page.get_by_role("row", name="wrong.jsonl")
        await row.get_by_role("button", name="Run").click()
        await page.get_by_label("Endpoint").fill("/v1/nothing")
        await page.get_by_role("button", name="Start", exact=True).click()
        # The API's own error, beside its field.
        await expect(page.get_by_label("Endpoint")).to_have_attribute("aria-invalid", "true")
        await page.get_by_label("Endpoint").fill("/v1/chat/completions")
        await page.get_by_role("button", name="Start", exact=True).click()
        await expect(page.get_by_role("region", name="Failed lines").get_by_role("row", name="line 2")).to_be_visible()
