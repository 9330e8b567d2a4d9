"""The screen of usage and budgets."""

from __future__ import annotations

from playwright.async_api import expect

from tests.cluster import chat
from tests.conftest import Eventually
from tests.console.site import ConsolePage, Site


class TestUsage:
    async def test_usage_is_added_up_beside_budgets(
        self, admin: ConsolePage, site: Site, eventually: Eventually
    ) -> None:
        page = admin.page
        key = {"authorization": f"Bearer {site.member_key}"}
        budgets = [
            {"unit": "tokens", "amount": 5000, "period": "month", "warn_at": 0.8},
            {"unit": "cost", "amount": 0.001, "period": "day"},
        ]
        for _ in range(3):
            assert (await site.cluster.post("/v1/chat/completions", chat("a b c"), headers=key)).is_success
        assert (await site.cluster.post("/v1/chat/completions", chat("d"))).is_success

        async def recorded() -> bool:
            rows = (await site.cluster.get("/v1/usage?group_by=team")).json()["data"]
            return {"vision", "default"} <= {row["team"] for row in rows if row["requests"]}

        await eventually(recorded, what="usage in the ledger")
        assert (await site.cluster.http.patch(site.url + "/v1/teams/vision", json={"budgets": budgets})).is_success
        await admin.open("usage", heading="Usage and budgets")
        row = page.get_by_role("region", name="Usage and budgets").get_by_role("row", name="vision")
        await expect(row.get_by_role("cell")).to_have_count(7)
        await expect(page.get_by_role("img", name="Tokens per day (UTC)")).to_be_visible()
        await expect(page.get_by_role("row", name="5,000 tokens a month")).to_contain_text("renews in")
        await expect(page.get_by_role("row", name="$0.001 a day")).to_contain_text("used up")
        await admin.shot("usage")
        await site.cluster.http.patch(site.url + "/v1/teams/vision", json={"budgets": None})

    async def test_a_member_sees_the_own_team_alone(self, member: ConsolePage) -> None:
        await member.open("usage?by=team", heading="Usage and budgets")
        await expect(
            member.page.get_by_role("region", name="Usage and budgets").get_by_role("row", name="vision")
        ).to_be_visible()
        await expect(member.page.get_by_role("row", name="default")).to_have_count(0)
