"""The screens of keys and teams."""

from __future__ import annotations

from playwright.async_api import expect

from tests.console.site import ConsolePage, Site


class TestKeys:
    async def test_a_wrong_limit_of_a_new_key_is_named_beside_its_field(self, admin: ConsolePage) -> None:
        page = admin.page
        await admin.open("keys", heading="Keys")
        await page.get_by_role("button", name="Create a key").click()
        dialog = page.get_by_role("dialog", name="Create a key")
        await dialog.get_by_label("Name", exact=True).fill("scripts")
        await dialog.get_by_label("Team", exact=True).fill("console")
        await dialog.get_by_text("Limits", exact=True).click()
        await dialog.get_by_label("Networks").fill("not a network")
        await dialog.get_by_role("button", name="Create", exact=True).click()
        # The API's own error, beside its field.
        await expect(dialog.get_by_label("Networks")).to_have_attribute("aria-invalid", "true")
        await expect(dialog.get_by_role("alert")).to_be_visible()
        await dialog.get_by_label("Networks").fill("127.0.0.0/8")
        await dialog.get_by_label("Requests per minute").fill("600")

    async def test_a_key_without_the_scope_manages_none(self, member: ConsolePage) -> None:
        await member.open("keys", heading="There is no such page")

    async def test_a_team_is_made_limited_and_deleted(self, admin: ConsolePage, site: Site) -> None:
        page = admin.page
        await admin.open("teams", heading="Teams")
        await page.get_by_role("button", name="Create a team").click()
        dialog = page.get_by_role("dialog", name="Create a team")
        await dialog.get_by_label("Team").fill("research")
        await dialog.get_by_label("Weight").fill("101")
        await dialog.get_by_role("button", name="Create", exact=True).click()
        await expect(dialog.get_by_label("Weight")).to_have_attribute("aria-invalid", "true")
        await dialog.get_by_label("Weight").fill("3")
        await dialog.get_by_role("button", name="Add a budget").click()
        await dialog.get_by_label("Amount").fill("5000000")
        await dialog.get_by_role("button", name="Create", exact=True).click()
        await expect(page.get_by_role("row", name="research")).to_contain_text("1 budget")
        await admin.shot("teams")
        await page.get_by_role("row", name="research").get_by_role("link").click()
        await admin.shows("research")
        await expect(page.get_by_role("row", name="5,000,000 tokens a month")).to_be_visible()
        await page.get_by_label("Lanes").fill("priority, default")
        await page.get_by_role("button", name="Save").click()
        await expect(page.get_by_text("Team research is changed.")).to_be_visible()
        await admin.shot("team", full=True)
        record = (await site.cluster.get("/v1/teams/research")).json()
        assert (record["weight"], record["lanes"]) == (3, ["priority", "default"])
        await page.get_by_role("button", name="Delete").click()
        await page.get_by_role("dialog").get_by_role("button", name="Delete").click()
        await admin.shows("Teams")
        await expect(page.get_by_role("row", name="research")).to_have_count(0)
