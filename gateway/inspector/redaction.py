"""Hide secrets and media in texts of requests and answers, before they are stored. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

import orjson

from schemas.inspection import RedactPattern

MAX_READ_BYTES = 64 * 1024
"""Bytes of a body that are looked at: redaction takes a few milliseconds for that many."""
CUT_CHARACTERS = 512
"""Characters dropped at a cut: they may be the beginning of a secret that no rule would recognize."""
HIDDEN = "[redacted]"
CUT = " … [cut]"
_MEDIA = re.compile(r"(?:data:[\w/+.;=-]{1,100};base64,)?[A-Za-z0-9+/_-]{256,}={0,2}")
_NAMES = r"password|passwd|secret|api[_-]?key|token|authorization|credentials?|private[_-]?key|cookie"
_FIELD = re.compile(
    rf"""(?i)(?<![A-Za-z0-9])((?:{_NAMES})\\*["']?\s{{0,5}}[:=]\s{{0,5}})"""
    r"""("(?:[^"\\]|\\.)*"?|\\+"[^"\\]*|'[^']*'?|(?:(?:Bearer|Basic)\s+)?[^\s"'\\,;&{}()\[\]]+)"""
)
"""A field whose name says that its value is a secret, in JSON, in JSON within a string, in a query or in a header."""
_SECRETS = re.compile(
    r"""(?x)
    -----BEGIN\ [A-Z ]{0,30}PRIVATE\ KEY-----[\s\S]*?(?:-----END\ [A-Z ]{0,30}-----|$)
    | \beyJ[\w-]{10,}(?:\.[\w-]*){0,2}                      # JSON Web Tokens
    | \b(?:sk|pk|rk|nexus|whsec|xox[abpr]|glpat|hf|gsk)[-_][\w-]{8,}
    | \bgh[oprsu]_\w{8,} | \bgithub_pat_\w{8,}
    | \b(?:AKIA|ASIA)[A-Z0-9]{8,}
    | \bAIza[\w-]{20,}
    | (?i:\bBearer\s+[\w.~+/=-]{8,})
    | (?<=://)[^\s/"'@:]{1,100}:[^\s/"'@]{1,200}(?=@)        # passwords in URLs
    """
)


def redact(text: str, patterns: Iterable[RedactPattern] = ()) -> str:
    """Return the text without secrets, with media by their sizes. `patterns`: what else is hidden."""
    text = _MEDIA.sub(lambda found: f"[base64, {len(found[0])} characters]", text)
    text = _FIELD.sub(lambda found: f"{found[1]}{_hidden_like(found[2])}", text)
    text = _SECRETS.sub(HIDDEN, text)
    for pattern in patterns:
        text = _compiled(pattern).sub(HIDDEN, text)
    return text


def _hidden_like(value: str) -> str:
    """Return the mark in the quotes that the value has."""
    quotes = re.match(r"""\\*["']?""", value)
    start = quotes[0] if quotes is not None else ""
    end = value[-1] if start and value.endswith(("'", '"')) else ""
    return f"{start}{HIDDEN}{end}"


@lru_cache(maxsize=256)
def _compiled(pattern: RedactPattern) -> re.Pattern[str]:
    return re.compile(r"""[^\s"'\\]{0,200}""".join(map(re.escape, pattern.split("*"))))


def describe_body(body: bytes, content_type: str, patterns: Iterable[RedactPattern] = (), *, size: int = 0) -> str:
    """Return what is stored of a body: redacted text, or the type and size of anything else. `size`: of the whole body, if this is its beginning."""
    size = max(size, len(body))
    if not is_text(content_type):
        return f"[{content_type.partition(';')[0]}, {size} bytes]"
    is_cut = size > MAX_READ_BYTES
    text = body[:MAX_READ_BYTES].decode(errors="replace")
    text = redact(text[:-CUT_CHARACTERS] if is_cut else text, patterns)
    return text + CUT if is_cut else text


def is_text(content_type: str) -> bool:
    """Return whether bodies of this type are text."""
    kind = content_type.partition(";")[0].strip()
    return kind.startswith("text/") or kind.endswith(("json", "xml", "x-subrip"))


def join_stream(data: bytes) -> bytes:
    """Return the pieces of a stream of chat or completion events as one JSON object, so that no secret is split among them."""
    texts: dict[tuple[int, str], list[str]] = {}
    rest: list[object] = []
    for line in data.split(b"\n"):
        if not line.startswith(b"data:") or line[5:].strip() == b"[DONE]":
            continue
        try:
            event = orjson.loads(line[5:])
        except orjson.JSONDecodeError:
            continue
        for choice in event.get("choices") or () if isinstance(event, dict) else ():
            _collect(choice, texts)
        if isinstance(event, dict) and (event.get("usage") or event.get("error")):
            rest.append({name: event[name] for name in ("usage", "error") if event.get(name)})
    joined = [{"index": index, name: "".join(pieces)} for (index, name), pieces in sorted(texts.items())]
    return orjson.dumps({"joined_stream": joined, **({"more": rest} if rest else {})})


def _collect(choice: object, texts: dict[tuple[int, str], list[str]]) -> None:
    if not isinstance(choice, dict):
        return
    index = choice.get("index")
    key = index if isinstance(index, int) else 0
    delta = choice.get("delta")
    fields = {"text": choice.get("text"), "finish_reason": choice.get("finish_reason")}
    fields |= delta if isinstance(delta, dict) else {}
    for name, value in fields.items():
        if isinstance(value, str):
            texts.setdefault((key, name), []).append(value)
        elif isinstance(value, list):
            for call in value:
                function = call.get("function") if isinstance(call, dict) else None
                for part in function.values() if isinstance(function, dict) else ():
                    if isinstance(part, str):
                        texts.setdefault((key, name), []).append(part)
