"""The screens of models and aliases."""

from __future__ import annotations

from playwright.async_api import expect

from tests.console.site import ConsolePage, Site


class TestModels:
    async def test_a_model_shows_its_parameters_and_can_be_tested(self, admin: ConsolePage) -> None:
        page = admin.page
        await admin.open("models", heading="Models")
        row = page.get_by_role("row", name="echo").first
        await expect(row).to_contain_text("loaded")
        await expect(row).to_contain_text("echo-1")
        await row.get_by_role("link", name="echo", exact=True).click()
        await admin.shows("echo")
        await expect(page.get_by_role("region", name="Parameters: /v1/chat/completions")).to_contain_text(
            "max_completion_tokens"
        )
        endpoint = page.locator("section", has=page.get_by_role("heading", name="/v1/images/edits"))
        await endpoint.get_by_role("button", name="Test").click()
        await expect(endpoint.get_by_role("status")).to_contain_text("works:")
        await admin.shot("model")

    async def test_an_alias_is_made_changed_and_deleted(self, admin: ConsolePage, site: Site) -> None:
        """The API's own error stands beside its field; the change serves at once."""
        page = admin.page
        await admin.open("models", heading="Models")
        await page.get_by_role("button", name="Create an alias").click()
        dialog = page.get_by_role("dialog")
        await dialog.get_by_label("Alias").fill("echo")
        await dialog.get_by_label("Models").fill("gone\necho")
        await dialog.get_by_role("button", name="Save").click()
        await expect(dialog.get_by_label("Alias")).to_have_attribute("aria-invalid", "true")
        await dialog.get_by_label("Alias").fill("best")
        await dialog.get_by_role("button", name="Save").click()
        await expect(dialog.get_by_role("status")).to_contain_text("gone")
        await dialog.get_by_role("button", name="Close").last.click()
        row = page.get_by_role("row", name="best")
        await expect(row).to_contain_text("echo · now")
        await admin.shot("models")
        body = {"model": "best", "messages": [{"role": "user", "content": "hi"}]}
        assert (await site.cluster.post("/v1/chat/completions", body)).status_code == 200
        audited = (await site.cluster.get("/v1/audit")).json()["data"]
        assert "best" in str(audited)
        await row.get_by_role("button", name="Delete").click()
        await page.get_by_role("dialog").get_by_role("button", name="Delete").click()
        await expect(row).to_have_count(0)

    async def test_who_may_not_change_aliases_has_no_buttons(self, member: ConsolePage) -> None:
        page = member.page
        await member.open("models", heading="Models")
        await expect(page.get_by_role("row", name="echo").first).to_be_visible()
        await expect(page.get_by_role("button", name="Create an alias")).to_have_count(0)
