"""People who sign in with a real identity provider, what their sessions are good for, and who tries to misuse them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import httpx
import pytest
import pytest_asyncio

from tests.cluster import KEY, Cluster, Crew, chat, free_port
from tests.conftest import Eventually
from tests.identity_provider import Browser, IdentityProvider

pytestmark = pytest.mark.asyncio(loop_scope="module")

ROLES = "nexus-admins=admin, nexus-operators=operator, nexus-team-*=member, guests=viewer"
TEAMS = "nexus-team-*=*, guests=vision"
ELSEWHERE = "https://evil.example"


class Site:
    """A gateway with an identity provider."""

    def __init__(self, url: str, provider: IdentityProvider, stack: AsyncExitStack) -> None:
        self.url = url
        self.provider = provider
        self._stack = stack

    async def browser(self, name: str = "") -> Browser:
        """A new browser, in which somebody has signed in."""
        browser = await self._stack.enter_async_context(Browser(self.url))
        if name:
            answer = await browser.sign_in(name)
            assert (answer.status_code, answer.headers["location"]) == (303, "/ui/"), answer.text
        return browser


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site(cluster: Cluster) -> AsyncIterator[Site]:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    provider = IdentityProvider(
        url,
        ann=["nexus-admins"],
        olga=["nexus-operators", "nexus-team-vision"],
        max=["nexus-team-vision"],
        gus=["guests"],
        nobody=["others"],
    )
    async with AsyncExitStack() as stack:
        stack.push_async_callback(provider.stop)
        await provider.start()
        ledger = f"sqlite:///{cluster.folder / 'ledger.db'}"
        settings = provider.settings(PUBLIC_URL=url, OIDC_ROLES=ROLES, OIDC_TEAMS=TEAMS, LEDGER_URL=ledger)
        await cluster.start_gateway(GATEWAY_PORT=str(port), **settings)
        yield Site(url, provider, stack)


async def test_a_member_signs_in_makes_a_key_and_signs_out(
    site: Site, shared_crew: Crew, eventually: Eventually
) -> None:
    """The session is worth as much as a key of the team, until it ends; the key that it made stays. Usage names the person."""
    member = await site.browser("max")
    who = (await member.ask("GET", "/auth/session")).json()
    assert (who["name"], who["role"], who["team"]) == ("Max", "member", "vision")
    models = await member.ask("GET", "/v1/models")
    assert shared_crew.model in [model["id"] for model in models.json()["data"]]
    answer = await member.ask("POST", "/v1/chat/completions", json=chat(model=shared_crew.model))
    assert answer.status_code == 200, answer.text
    made = await member.ask("POST", "/v1/keys", json={"name": "max's key"})
    assert (made.status_code, made.json()["owner"], made.json()["person"]) == (201, "vision", who["person"])
    assert [key["id"] for key in (await member.ask("GET", "/v1/keys")).json()["data"]] == [made.json()["id"]]
    for wrong in ({"owner": "default"}, {"scopes": ["admin:read"]}):
        assert (await member.ask("POST", "/v1/keys", json={"name": "more"} | wrong)).status_code == 403
    bearer = {"authorization": f"Bearer {made.json()['key']}"}
    body = chat(model=shared_crew.model)
    assert (await member.ask("POST", "/v1/chat/completions", json=body, headers=bearer)).status_code == 200
    rows = await eventually(lambda: _usage(member, 2))
    assert rows == {("", who["person"]): 1, (made.json()["id"], who["person"]): 1}
    cookies = dict(member.http.cookies)
    out = await member.ask("POST", "/auth/logout")
    assert out.json()["provider_url"].startswith(site.provider.url)
    thief = await site.browser()
    thief.http.cookies.update(cookies)
    assert (await thief.ask("GET", "/v1/models")).status_code == 401
    assert (await thief.ask("GET", "/v1/models", headers=bearer)).status_code == 200  # a key wins over a cookie


async def _usage(browser: Browser, count: int) -> dict[tuple[str, str], int] | None:
    """Requests by key and person, once there are as many rows."""
    rows = (await browser.ask("GET", "/v1/usage?group_by=key,person")).json()["data"]
    return {(row["key"], row["person"]): row["requests"] for row in rows} if len(rows) == count else None


async def test_roles_bound_what_people_do(cluster: Cluster, site: Site, shared_crew: Crew) -> None:
    """A viewer reads, an operator operates, an administrator does all; somebody without a role does not come in."""
    viewer, operator, admin = [await site.browser(name) for name in ("gus", "olga", "ann")]
    job = {"endpoint": "/v1/chat/completions", "body": chat(model=shared_crew.model)}
    made = (await operator.ask("POST", "/v1/jobs", json=job)).json()
    assert (await viewer.ask("GET", f"/v1/jobs/{made['id']}")).status_code == 200  # of the same team
    assert (await admin.ask("GET", f"/v1/jobs/{made['id']}")).status_code == 404
    refused = await viewer.ask("POST", "/v1/jobs", json=job)
    assert (refused.status_code, "viewer" in refused.json()["error"]["message"]) == (403, True)
    statuses = [(await person.ask("GET", "/v1/workers")).status_code for person in (viewer, operator, admin)]
    assert statuses == [403, 200, 200]
    statuses = [(await person.ask("GET", "/v1/people")).status_code for person in (viewer, operator, admin)]
    assert statuses == [403, 403, 200]
    stranger = await site.browser()
    page = await stranger.sign_in("nobody")
    assert (page.status_code, page.headers["content-type"]) == (403, "text/html; charset=utf-8")
    assert "OIDC_ROLES" in page.text
    assert "script" not in page.headers["content-security-policy"]
    people = (await cluster.http.get(site.url + "/v1/people")).json()["data"]
    assert "nobody" not in [person["subject"] for person in people]


async def test_a_disabled_person_is_out_at_all_gateways(
    cluster: Cluster, site: Site, crew: Crew, eventually: Eventually
) -> None:
    """Open calls end, sessions too, and the next sign-in is refused, until the person is enabled again. A session that ends by itself
    ends its own calls alone.
    """
    await crew.start(options="first_delay_ms=600000")
    person, signed_out = await site.browser("olga"), await site.browser("olga")
    session = (await person.ask("GET", "/auth/session")).json()
    body = chat(model=crew.model, stream=True)
    stream, other = [
        asyncio.create_task(browser.ask("POST", "/v1/chat/completions", json=body)) for browser in (person, signed_out)
    ]
    await eventually(lambda: _stored(cluster, crew, 2))
    assert (await signed_out.ask("POST", "/auth/logout")).status_code == 200
    async with asyncio.timeout(10):
        assert (await other).status_code == 401
    assert not stream.done()
    path = f"/v1/people/{session['person']}"
    key = (await person.ask("POST", "/v1/keys", json={"name": "olga's key"})).json()
    refused = await cluster.http.patch(cluster.url + path, json={"keys": "revoke"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "keys")
    # At the other gateway.
    changed = await cluster.http.patch(cluster.url + path, json={"disabled": True, "keys": "revoke"})
    assert (changed.status_code, changed.json()["status"], changed.json()["sessions"]) == (200, "disabled", 0)
    async with asyncio.timeout(10):
        ended = await stream
    assert ended.status_code == 401
    assert (await person.ask("GET", "/v1/models")).status_code == 401
    bearer = {"authorization": f"Bearer {key['key']}"}
    assert (await cluster.http.get(cluster.url + "/v1/models", headers=bearer)).status_code == 401
    refused = await person.sign_in("olga")
    assert (refused.status_code, "disabled" in refused.text) == (403, True)
    changed = await cluster.http.patch(cluster.url + path, json={"disabled": False, "role": "viewer", "team": "art"})
    assert (changed.json()["role"], changed.json()["team"]) == ("viewer", "art")
    assert (await person.sign_in("olga")).status_code == 303
    assert (await person.ask("GET", "/auth/session")).json()["team"] == "art"
    await cluster.http.delete(site.url + path + "/sessions")
    assert (await person.ask("GET", "/v1/models")).status_code == 401
    restored = await cluster.http.patch(site.url + path, json={"role": None, "team": None})
    assert (restored.json()["role"], restored.json()["team"]) == ("operator", "vision")


async def _stored(cluster: Cluster, crew: Crew, count: int) -> bool:
    return await cluster.stored(crew.model) == count


async def test_a_request_of_another_site_changes_nothing(site: Site) -> None:
    """Without the token, or from a page of another origin, an unsafe request is refused; so is a form that signs in."""
    member = await site.browser("max")
    forged: list[dict[str, str]] = [
        {"x-csrf-token": ""},
        {"x-csrf-token": "x" * 43},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"origin": ELSEWHERE},
        {"origin": "null"},
    ]
    for headers in forged:
        answer = await member.ask("POST", "/v1/keys", json={"name": "forged"}, headers=headers)
        assert answer.status_code == 403, headers
        assert answer.json()["error"]["code"] in {"csrf_token_invalid", "cross_site_request"}
        assert (await member.ask("POST", "/auth/logout", headers=headers)).status_code == 403
    answer = await member.ask("GET", "/auth/session", headers={"origin": ELSEWHERE})
    assert answer.headers.get("access-control-allow-credentials") is None
    answer = await member.ask("POST", "/auth/login", data={"key": KEY}, headers={"origin": ELSEWHERE})
    assert (answer.status_code, "set-cookie" in answer.headers) == (403, False)
    assert (await member.ask("POST", "/v1/keys", json={"name": "own"}, headers={"origin": site.url})).status_code == 201


async def test_what_a_sign_in_refuses(site: Site) -> None:
    """Another state, nonce or challenge than was sent, another browser, a code that was used: no session begins."""
    browser = await site.browser()
    for name in ("state", "nonce", "code_challenge"):
        url = await browser.begin()
        back = await browser.log_in(url.copy_set_param(name, "x" * 43), "max")
        answer = await browser.http.get(back)
        assert (answer.status_code, "nexus-session" in browser.http.cookies) == (401, False), name
    back = await browser.log_in(await browser.begin(), "max")
    other = await site.browser()
    assert (await other.http.get(back)).status_code == 401
    assert (await other.http.get(back.copy_set_param("iss", ELSEWHERE))).status_code == 401
    pending = dict(browser.http.cookies)
    assert (await browser.http.get(back)).status_code == 303
    other.http.cookies.update({name: value for name, value in pending.items() if name == "nexus-sign-in"})
    assert (await other.http.get(back)).status_code == 401  # the provider gives a code's tokens once
    refused = await browser.http.get(site.url + "/auth/callback?error=access_denied&state=x")
    assert refused.status_code == 401
    as_json = await browser.http.get(site.url + "/auth/callback", headers={"accept": "application/json"})
    assert as_json.json()["error"]["code"] == "sign_in_failed"


async def test_a_sign_in_leads_to_this_gateway_alone(site: Site) -> None:
    """Whatever `next` says; a path of this gateway it keeps."""
    browser = await site.browser()
    for path, target in (
        ("/ui?model=a#b", "/ui?model=a#b"),
        (ELSEWHERE, "/"),
        ("//evil.example", "/"),
        ("/\\evil.example", "/"),
        ("/\tx", "/"),
    ):
        query = httpx.QueryParams({"with": "openid", "next": path})
        answer = await browser.sign_in("max", f"/auth/login?{query}")
        assert answer.headers["location"] == target, path


async def test_the_provider_is_away_and_has_new_keys(site: Site) -> None:
    """Nobody new comes in while it is away; sessions go on. What it signs with new keys counts at once."""
    member = await site.browser("max")
    back = await (browser := await site.browser()).log_in(await browser.begin(), "max")
    await site.provider.stop()
    away = await browser.http.get(back)
    assert (away.status_code, "identity provider" in away.text) == (503, True)
    assert (await member.ask("GET", "/v1/models")).status_code == 200
    await site.provider.start()
    assert (await browser.http.get(back)).status_code == 401  # it has forgotten the code
    assert (await browser.sign_in("max")).status_code == 303


async def test_a_local_administrator_signs_in_with_the_key_or_a_link(cluster: Cluster) -> None:
    """At a gateway without a provider. A link works once, and is not used up by being looked at."""
    async with Browser(cluster.url) as browser:
        page = await browser.ask("GET", "/auth/login?next=/ui")
        assert "openid" not in page.text
        assert (await browser.ask("GET", "/auth/login?with=openid")).status_code == 404
        wrong = await browser.ask("POST", "/auth/login", data={"key": KEY + "x"})
        assert (wrong.status_code, KEY not in wrong.text) == (401, True)
        answer = await browser.ask("POST", "/auth/login", data={"key": KEY, "next": "/ui"})
        assert (answer.status_code, answer.headers["location"]) == (303, "/ui")
        session = (await browser.ask("GET", "/auth/session")).json()
        assert (session["role"], session["key"], session["team"]) == (None, "", "default")
        browser.csrf = session["csrf_token"]
        assert (await browser.ask("POST", "/v1/teams", json={"id": "made-in-a-browser"})).status_code == 201
        assert (await browser.ask("POST", "/v1/login-links")).status_code == 400
        link = (await cluster.post("/v1/login-links", {})).json()["url"]
        token = httpx.URL(link).params["token"]
        before = browser.http.cookies["nexus-session"]
        for status in (303, 401):
            assert token in (await browser.http.get(link)).text
            assert (await browser.ask("POST", "/auth/link", data={"token": token})).status_code == status
        assert browser.http.cookies["nexus-session"] != before
        made = (await cluster.post("/v1/keys", {"name": "visitor"})).json()
        await browser.ask("POST", "/auth/login", data={"key": made["key"]})
        assert (await browser.ask("GET", "/auth/session")).json()["team"] == "visitor"
        await cluster.http.delete(f"{cluster.url}/v1/keys/{made['id']}")
        assert (await browser.ask("GET", "/v1/models")).status_code == 401
