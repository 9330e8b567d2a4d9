"""The playground: every kind of model, by the forms that its own descriptor makes."""

from __future__ import annotations

import base64
from typing import Any

from playwright.async_api import expect

from schemas.parameters.audio import SAMPLE_SOUND
from schemas.parameters.images import SAMPLE_PICTURE
from tests.console.site import ConsolePage, Site

PNG: Any = {"name": "sky.png", "mimeType": "image/png", "buffer": base64.b64decode(SAMPLE_PICTURE)}
WAV: Any = {"name": "word.wav", "mimeType": "audio/wav", "buffer": base64.b64decode(SAMPLE_SOUND)}


class TestPlayground:
    async def test_models_answer_side_by_side(self, member: ConsolePage) -> None:
        """Each with its own figures; a picture goes along; the conversation can be begun again."""
        page = member.page
        await member.open("playground?mode=chat", heading="Playground")
        await page.get_by_role("button", name="Compare with another model").click()
        await page.get_by_label("Attach a picture").set_input_files(PNG)
        await page.get_by_label("Message", exact=True).fill("three small words")
        await page.get_by_role("button", name="Send").click()
        logs = page.get_by_role("log")
        await expect(logs).to_have_count(2)
        for number in range(2):
            await expect(logs.nth(number).locator(".assistant .text").last).to_contain_text("three small words")
            await expect(logs.nth(number)).to_contain_text("tokens/s")
        await member.shot("playground-chat")
        await page.get_by_text("Parameters", exact=True).click()
        await page.get_by_label("Longest answer").fill("1")
        await page.get_by_label("Message", exact=True).fill("one two three")
        await page.keyboard.press("Enter")
        await expect(logs.first).to_contain_text("cut at the longest length")
        await page.get_by_role("button", name="New conversation").click()
        await expect(logs.first.locator(".turn")).to_have_count(0)

    async def test_a_stream_stops(self, member: ConsolePage, site: Site) -> None:
        page = member.page
        options = "delay_ms=200"
        await site.cluster.start_worker(name="slow-1", WORKER_MODELS="slow", WORKER_BACKEND_OPTIONS=options)
        await member.open("playground?mode=chat&model=slow", heading="Playground")
        await expect(page.get_by_label("Model 1")).to_have_value("slow")
        await page.get_by_label("Message", exact=True).fill("word " * 200)
        await page.get_by_role("button", name="Send").click()
        answer = page.get_by_role("log").locator(".assistant")
        await expect(answer).to_contain_text("word")
        await page.get_by_role("button", name="Stop", exact=True).click()
        await expect(answer).to_contain_text("stopped")

    async def test_pictures_by_the_models_own_form(self, member: ConsolePage) -> None:
        """The form is made of the schema; an error of the API stands beside its field; an edit has a mask."""
        page = member.page
        await member.open("playground?mode=images", heading="Playground")
        await page.get_by_label("Prompt", exact=True).fill("a lighthouse")
        steps = page.get_by_role("spinbutton", name="Steps")
        await steps.fill("5000")
        await page.get_by_role("button", name="Generate").last.click()
        await expect(steps).to_have_attribute("aria-invalid", "true")
        await steps.fill("3")
        await page.get_by_role("button", name="Draw").click()
        await page.get_by_role("button", name="Generate").last.click()
        await expect(page.get_by_role("img", name="Picture 1")).to_be_visible()
        await page.get_by_role("button", name="Edit").first.click()
        await page.get_by_label("Picture").first.set_input_files(PNG)
        canvas = page.locator("canvas")
        await canvas.scroll_into_view_if_needed()
        box = await canvas.bounding_box()
        assert box is not None
        await page.mouse.move(box["x"] + 20, box["y"] + 20)
        await page.mouse.down()
        await page.mouse.move(box["x"] + 90, box["y"] + 60)
        await page.mouse.up()
        await expect(page.get_by_role("button", name="Undo")).to_be_enabled()
        await member.shot("playground-pictures", full=True)
        await page.get_by_role("button", name="Edit").last.click()
        await expect(page.get_by_role("img", name="Picture 2")).to_be_visible()

    async def test_run_later_is_a_flex_job(self, member: ConsolePage, site: Site) -> None:
        page = member.page
        await member.open("playground?mode=images", heading="Playground")
        await page.get_by_label("Prompt", exact=True).fill("later")
        await page.get_by_role("button", name="Run later").click()
        toast = page.get_by_text("waits in the flex lane")
        await expect(toast).to_be_visible()
        job = (await toast.inner_text()).split()[0]
        found = (
            await site.cluster.get(f"/v1/jobs/{job}", headers={"authorization": f"Bearer {site.member_key}"})
        ).json()
        assert found["service_tier"] == "flex"

    async def test_speech_is_played_and_sound_is_read(self, member: ConsolePage) -> None:
        page = member.page
        await member.open("playground?mode=speech", heading="Playground")
        await page.get_by_label("Text", exact=True).fill("hello")
        await page.get_by_label("Format", exact=True).select_option(label="wav")
        await page.get_by_role("button", name="Run", exact=True).click()
        sound = page.locator("audio")
        await expect(sound).to_have_count(1)
        assert await sound.evaluate(
            "audio => audio.duration > 0 || new Promise(done => audio.onloadedmetadata = () => done(audio.duration > 0))"
        )
        await member.shot("playground-speech")
        await page.get_by_role("button", name="Transcribe").click()
        await page.get_by_label("Audio", exact=True).set_input_files(WAV)
        await page.get_by_role("button", name="Transcribe").last.click()
        await expect(page.get_by_text("Echo heard 1644 bytes")).to_be_visible()

    async def test_vectors_are_compared_and_documents_ranked(self, member: ConsolePage) -> None:
        page = member.page
        await member.open("playground?mode=embeddings", heading="Playground")
        await page.get_by_label("Texts", exact=True).fill("same\nsame\nother")
        await page.get_by_role("button", name="Run", exact=True).click()
        row = page.get_by_role("row", name="1 · same")
        await expect(row.get_by_role("cell").nth(1)).to_have_text("1.000")
        await member.shot("playground-embeddings")
        await page.get_by_role("button", name="Rerank").click()
        await page.get_by_label("Query").fill("cats")
        await page.get_by_label("Documents", exact=True).fill("dogs bark\ncats")
        await page.get_by_role("button", name="Run", exact=True).click()
        await expect(page.get_by_role("row").nth(1)).to_contain_text("cats")
