"""Render the pages of a sign-in. They hold no script, and load nothing."""

from __future__ import annotations

import base64
import hashlib
from html import escape
from urllib.parse import quote

STYLE = """
:root { color-scheme: light dark; --text: #1f2328; --faint: #59636e; --back: #fff; --line: #8b949e; --link: #0757b8; --on: #fff; --bad: #b3161f }
@media (prefers-color-scheme: dark) {
  :root { --text: #e8ebee; --faint: #a0a9b3; --back: #14171a; --line: #6b747d; --link: #7cb7ff; --on: #10151a; --bad: #ff8a84 }
}
body { margin: 0; background: var(--back); color: var(--text); font: 1rem/1.6 system-ui, sans-serif }
main { max-width: 24rem; margin: 0 auto; padding: 4rem 1.25rem }
h1 { margin: 0 0 1.5rem; font-size: 1.6rem } p { margin: 0 0 1rem } .faint { color: var(--faint) } .bad { color: var(--bad) }
a { color: var(--link) } label { display: block; margin: 0 0 .3rem }
input { box-sizing: border-box; width: 100%; padding: .6rem; border: 1px solid var(--line); border-radius: .4rem; background: var(--back); color: var(--text); font: inherit }
button, .button { display: block; box-sizing: border-box; width: 100%; margin: .8rem 0 1.6rem; padding: .6rem; border: 0; border-radius: .4rem; background: var(--link); color: var(--on); font: inherit; font-weight: 600; text-align: center; text-decoration: none; cursor: pointer }
"""
HEADERS = {
    "cache-control": "no-store",
    "content-security-policy": "; ".join(
        (
            "default-src 'none'",
            f"style-src 'sha256-{base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()}'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'self'",
            "frame-ancestors 'none'",
        )
    ),
}
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="robots" content="noindex">
<meta name="referrer" content="same-origin">
<title>{title} - Nexus</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
{content}
</main>
</body>
</html>
"""
PROVIDER = '<a class="button" href="/auth/login?with=openid&amp;next={target}">Sign in with {name}</a>\n'
KEY_FORM = """<form method="post" action="/auth/login">
<input type="hidden" name="next" value="{target}">
<label for="key">API key</label>
<input id="key" name="key" type="password" autocomplete="current-password" maxlength="500" required>
<button>Sign in with a key</button>
</form>"""
LINK_FORM = """<p>This link signs you in to this Nexus, once.</p>
<form method="post" action="/auth/link">
<input type="hidden" name="token" value="{token}">
<button>Sign in</button>
</form>"""
ERROR = """<p class="bad">{message}</p>
<p><a href="/auth/login">Sign in</a></p>
<p class="faint">Request {request_id}</p>"""


def login_page(target: str, provider: str | None) -> str:
    """Return the page that offers the ways to sign in. `provider`: its name; None: there is none."""
    link = "" if provider is None else PROVIDER.format(target=quote(target, safe=""), name=escape(provider))
    return _page("Sign in", link + KEY_FORM.format(target=escape(target)))


def link_page(token: str) -> str:
    """Return the page behind a sign-in link: a button, so that nothing that only looks at the link uses it up."""
    return _page("Sign in", LINK_FORM.format(token=escape(token)))


def error_page(message: str, request_id: str) -> str:
    """Return a page about an error."""
    return _page("Sign-in failed", ERROR.format(message=escape(message), request_id=escape(request_id)))


def message_page(title: str, content: str) -> str:
    """Return a page in the same style. `content`: HTML."""
    return _page(title, content)


def _page(title: str, content: str) -> str:
    return PAGE.format(title=title, style=STYLE, content=content)
