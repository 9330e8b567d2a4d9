"""Render the page at `/`: what Nexus is, whether it is ready, and how to call it. It is public, and reveals no more than `/readyz`."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass
from html import escape
from urllib.parse import urlsplit

from gateway.http.asgi import Headers, Scope
from gateway.signed_urls import base_url

DEFAULT_BASE_URL = "http://localhost:8800"
"""Base URL on the page if the request does not reveal how the gateway was reached."""
BASE_URL_PATTERN = re.compile(r"https?://(?:[A-Za-z0-9](?:[A-Za-z0-9.-]{0,252})|\[[0-9a-fA-F:.]{2,45}\])(?::\d{1,5})?")
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
STATUS_SENTENCES = {
    True: ("ready", "This gateway is ready for requests."),
    False: ("unavailable", "This gateway cannot serve requests now."),
}
STYLE = """
:root { color-scheme: light dark; --text: #1f2328; --faint: #59636e; --back: #fff; --box: #f3f5f7; --link: #0757b8; --good: #14692c; --bad: #b3161f }
@media (prefers-color-scheme: dark) {
  :root { --text: #e8ebee; --faint: #a0a9b3; --back: #14171a; --box: #20252a; --link: #7cb7ff; --good: #5fce7f; --bad: #ff8a84 }
}
body { margin: 0; background: var(--back); color: var(--text); font: 1rem/1.6 system-ui, sans-serif }
main { max-width: 54rem; margin: 0 auto; padding: 3rem 1.25rem }
h1 { margin: 0; font-size: 2rem } h2 { margin: 2.2rem 0 .5rem; font-size: 1.1rem }
p { margin: .4rem 0 } a { color: var(--link) } .faint { color: var(--faint) }
.ready { color: var(--good); font-weight: 600 } .unavailable { color: var(--bad); font-weight: 600 }
code, pre { font: .9rem/1.5 ui-monospace, Menlo, Consolas, monospace }
pre { margin: 0; padding: 1rem; border-radius: .5rem; background: var(--box); overflow-x: auto }
"""
CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        f"style-src 'sha256-{base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()}'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="robots" content="noindex">
<title>Nexus</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<main>
<h1>Nexus</h1>
<p class="faint">An OpenAI-compatible gateway in front of AI servers, with a durable queue behind it.</p>
<p class="{state}">{sentence}</p>
<h2>Base URL</h2>
<pre tabindex="0" role="region" aria-label="Base URL"><code>{base}/v1</code></pre>
<h2>With curl</h2>
<pre tabindex="0" role="region" aria-label="Example with curl"><code>export OPENAI_API_KEY=nexus-…

curl {base}/v1/models -H "Authorization: Bearer $OPENAI_API_KEY"

curl {base}/v1/chat/completions \\
  -H "Authorization: Bearer $OPENAI_API_KEY" -H "Content-Type: application/json" \\
  -d '{{"model": "MODEL", "messages": [{{"role": "user", "content": "What is gravity?"}}]}}'</code></pre>
<p class="faint">MODEL is the id of a model that the first command lists. The operator of this gateway gives out keys.</p>
<h2>With Python</h2>
<pre tabindex="0" role="region" aria-label="Example with Python"><code>from openai import OpenAI  # pip install openai

client = OpenAI(base_url="{base}/v1", api_key="nexus-…")
messages = [{{"role": "user", "content": "What is gravity?"}}]
answer = client.chat.completions.create(model="MODEL", messages=messages)
print(answer.choices[0].message.content)</code></pre>
<h2>Console</h2>
<p><a href="ui/">Open the console</a>: queues, jobs, models, usage. It asks for a key or a sign-in.</p>
<h2>Documentation</h2>
{documentation}
</main>
</body>
</html>
"""
LINKS = '<p><a href="{docs}docs">API reference</a> · <a href="{docs}openapi.json">OpenAPI document</a></p>\n'
DOCS_ON_OTHER_PORT = "<p>The API reference is at <code>/docs</code> on the gateway's observability port (<code>OBSERVABILITY_PORT</code>).</p>\n"
README = "<p>README.md and the folder docs/ in the source of Nexus say how to run it.</p>"


@dataclass(frozen=True, slots=True)
class LandingPage:
    """Renders the page, and its short form in JSON."""

    public_url: str = ""
    """URL at which callers reach the gateway; empty: taken from each request."""
    documented: bool = False
    """Whether this port serves `/docs` too."""
    observability_port: int = 0

    def page(self, scope: Scope, *, ready: bool) -> str:
        """Return the HTML."""
        state, sentence = STATUS_SENTENCES[ready]
        base = self._base(scope)
        place = self._documentation(scope, base)
        documentation = (DOCS_ON_OTHER_PORT if place is None else LINKS.format(docs=escape(place))) + README
        return PAGE.format(style=STYLE, state=state, sentence=sentence, base=escape(base), documentation=documentation)

    def summary(self, scope: Scope, *, ready: bool) -> dict[str, str]:
        """Return the page's content as JSON."""
        return {"name": "nexus", "status": STATUS_SENTENCES[ready][0], "base_url": f"{self._base(scope)}/v1"}

    def _base(self, scope: Scope) -> str:
        """Return the base URL at which callers reach the gateway. A malformed `Host` is not repeated."""
        if self.public_url:
            return self.public_url.rstrip("/")
        named = any(name == b"host" and value for name, value in scope["headers"])
        url = base_url(scope) if named else ""
        return url if BASE_URL_PATTERN.fullmatch(url) else DEFAULT_BASE_URL

    def _documentation(self, scope: Scope, base: str) -> str | None:
        """Return the URL below which `docs` is; None for readers on other machines, if only the observability port has it."""
        if self.documented:
            return ""
        url = urlsplit(base)
        client = (scope.get("client") or ("",))[0]
        if not self.observability_port or client not in LOOPBACK or url.hostname not in LOOPBACK:
            return None
        return f"http://{f'[{url.hostname}]' if ':' in url.hostname else url.hostname}:{self.observability_port}/"


def wants_json(headers: Headers) -> bool:
    """Return whether the `Accept` header prefers JSON to HTML. Without one, and for `*/*`, the answer is HTML."""
    accept = b",".join(value for name, value in headers if name == b"accept").decode("latin-1")
    weights: dict[str, float] = {}
    for one in accept.lower().split(","):
        kind, *parameters = (part.strip() for part in one.split(";"))
        weight = next((part[2:] for part in parameters if part.startswith("q=")), "1")
        try:
            weights[kind] = float(weight)
        except ValueError:
            weights[kind] = 0.0
    return weights.get("application/json", 0.0) > weights.get("text/html", 0.0)
