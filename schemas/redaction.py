"""Remove internal addresses, host names and paths from the text of errors before callers see it.

The rest of the text stays: the message of a server about the request is meant for the caller. These are removed:

- URLs, addresses and host names that are not public, `unix:` and `file:` addresses, and URLs that hold credentials;
- names of the process's configuration: its inference server, NATS, etcd, Redis, this machine;
- paths of files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from ipaddress import ip_address
from urllib.parse import urlsplit

REDACTED_ADDRESS = "[internal address]"
REDACTED_PATH = "[internal path]"
MAX_TEXT_LENGTH = 4096
CACHE_SIZE = 512
"""The number of texts whose redacted form is cached: most errors repeat."""

_NAME = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
_SUFFIX = r"(?:internal|local|localdomain|lan|corp|intranet|svc|home\.arpa)"
_URL = re.compile(r"\b[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>`,;)}]+")
_SOCKET = re.compile(r"\b(?:unix|file):/*[^\s'\"<>`,;)}]+(?<![.:])")
_PAIR = re.compile(rf"\(\s*['\"]({_NAME}|[0-9a-fA-F:.%]+)['\"]\s*,\s*\d+(?:\s*,\s*\d+)*\s*\)")
_IPV4 = re.compile(r"(?<![\w.])(\d{1,3}(?:\.\d{1,3}){3})(?::\d{1,5})?(?![\w.]*\w)")
_IPV6 = re.compile(
    r"(?<![\w:.])\[?((?:[0-9a-fA-F]{0,4}:){2,7}(?:\d{1,3}(?:\.\d{1,3}){3}|[0-9a-fA-F]{0,4}))(?:%\w+)?\]?(?::\d{1,5})?(?!\w|:\w)"
)
_INSIDE = re.compile(
    rf"(?<![\w@.-])(?:(?:[A-Za-z0-9_-]+\.)+{_SUFFIX}|localhost)\.?(?::\d{{1,5}})?(?![\w-]|\.\w)", re.IGNORECASE
)
_HOST = re.compile(
    r"(?i:(?P<before>\bconnect(?:ing|ion|ed)?\b[^\n:\[]{0,40}?\b(?:to|from|with|at)\s+(?:host\s+)?"
    r"|\b(?:nats|etcd|redis|valkey) at\s+|\bdial\s+\w+\s+|\blookup\s+|\b(?:resolve|resolving|reach)\s+(?:host\s+)?"
    r"|\b(?:host(?:name)?|peer|server)\s?[=:]\s?|\b(?:ENOTFOUND|EAI_AGAIN|ECONNREFUSED|ETIMEDOUT|EHOSTUNREACH|ENETUNREACH)\s+)"
    rf"(?P<quote>['\"]?))(?P<host>{_NAME})(?P<port>:\d{{1,5}}|['\"]?,\s*port=\d+)?"
)
"""A host name after words that introduce one. Without a port it counts only with a quote or a dot, or when the words are certain."""
_SURE = re.compile(r"(?i)(?:lookup|resolv\w+\s+host|ENOTFOUND|EAI_AGAIN|host(?:name)?\s?[=])\s*$")
_ROOTS = (
    r"var|home|root|opt|usr|etc|srv|mnt|tmp|run|proc|dev|lib|lib64|private|Users|Volumes|nix|snap|media|sys|boot|s?bin"
)
_FILE_ROOTS = r"app|apps|data|models?|workspace|content|cache|weights|checkpoints|code|src|repo"
_FILE = re.compile(
    rf"(?<![\w:/.])/(?:(?:{_ROOTS})/[^\s'\"<>`,;)\]}}]+(?<![.:])|(?:{_FILE_ROOTS})/[^\s'\"<>`,;)\]}}]*\.\w{{1,12}}\b)"
    r"|(?<![\w/])~/[^\s'\"<>`,;)\]}]+(?<![.:])"
    r"|\b[A-Za-z]:\\[^\s'\"<>`|,;)\]}]+(?<![.:])|(?<!\\)\\\\[\w.-]+\\[^\s'\"<>`|,;)\]}]+(?<![.:])"
)


class Redactor:
    """Replaces internal addresses and paths in texts. The rules need no names; names that were added are replaced as well."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._names: frozenset[str] = frozenset()
        self._pattern: re.Pattern[str] | None = None
        self._known = lru_cache(CACHE_SIZE)(self._redact)
        self.add(*names)

    def add(self, *urls: str) -> None:
        """Add host names, `host:port`, or URLs of this process's configuration. One text may hold several, separated by commas."""
        hosts = {host for url in urls for one in url.split(",") if (host := _host_of(one.strip()))}
        self._names |= hosts
        if self._names:
            self._pattern = re.compile("|".join(_name_pattern(name) for name in sorted(self._names)), re.IGNORECASE)
        self._known.cache_clear()

    def redact(self, text: str) -> str:
        """Return at most `MAX_TEXT_LENGTH` characters of the text, without internal addresses and paths. Idempotent."""
        return self._known(text if len(text) <= MAX_TEXT_LENGTH else text[: MAX_TEXT_LENGTH - 1] + "…")

    def _redact(self, text: str) -> str:
        text = _URL.sub(self._url, text)
        text = _SOCKET.sub(REDACTED_ADDRESS, text)
        text = _PAIR.sub(self._pair, text)
        text = _IPV6.sub(self._ip, text)
        text = _IPV4.sub(self._ip, text)
        text = _INSIDE.sub(REDACTED_ADDRESS, text)
        if self._pattern is not None:
            text = self._pattern.sub(REDACTED_ADDRESS, text)
        text = _HOST.sub(self._host, text)
        return _FILE.sub(REDACTED_PATH, text)

    def _is_inside(self, host: str) -> bool:
        host = host.strip("[]").rstrip(".").lower()
        try:
            return not ip_address(host.split("%")[0]).is_global or host in self._names
        except ValueError:
            pass
        return "." not in host or host in self._names or bool(_INSIDE.fullmatch(host))

    def _url(self, match: re.Match[str]) -> str:
        found = match[0].rstrip(".:")
        try:
            parts = urlsplit(found)
            hidden = not parts.hostname or "@" in parts.netloc or self._is_inside(parts.hostname)
        except ValueError:
            hidden = True
        return REDACTED_ADDRESS + match[0][len(found) :] if hidden else match[0]

    def _pair(self, match: re.Match[str]) -> str:
        return REDACTED_ADDRESS if self._is_inside(match[1]) else match[0]

    def _ip(self, match: re.Match[str]) -> str:
        try:
            address = ip_address(match[1])
        except ValueError:
            return match[0]
        named = str(address) in self._names
        return match[0] if (address.is_global and not named) or not re.search(r"\d", match[1]) else REDACTED_ADDRESS

    def _host(self, match: re.Match[str]) -> str:
        host, port = match["host"], match["port"]
        certain = port or match["quote"] or "." in host or _SURE.search(match["before"])
        return match["before"] + match["quote"] + REDACTED_ADDRESS if certain and self._is_inside(host) else match[0]


def _host_of(url: str) -> str:
    try:
        return (urlsplit(url if "://" in url else f"//{url}").hostname or "").rstrip(".").lower()
    except ValueError:
        return ""


def _name_pattern(name: str) -> str:
    """Return a pattern for a configured name. A name that is a plain word counts only with a port, since the text may use the word."""
    plain = "." not in name and ":" not in name and not re.search(r"\d|-", name)
    port = r":\d{1,5}" if plain else r"(?::\d{1,5})?"
    return r"(?<![\w.-])" + re.escape(name) + port + r"(?![\w-]|\.\w)"


REDACTOR = Redactor()
"""The process's redactor. It is global, because errors reach callers in too many ways to pass it along. The process adds its names once,
when it reads its settings.
"""
