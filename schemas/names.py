"""Define names that become part of a NATS subject: no character in them can end a token, a subject or a protocol line."""

from __future__ import annotations

from typing import Annotated

from pydantic import StringConstraints

SubjectToken = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,200}$")]
"""One token of a subject: the name of a worker, the id of a job."""
Subject = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*$", max_length=500)]
"""A whole subject without wildcards."""
_INVISIBLE = r"\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff0-\ufffb\ufffe\uffff"
"""Control characters, and characters that are invisible or change the direction of text."""
_BLANK = r"\x20\xa0\u1680\u2000-\u200a\u202f\u205f\u3000"
DISPLAY_NAME = f"^[^{_INVISIBLE}{_BLANK}]([^{_INVISIBLE}]*[^{_INVISIBLE}{_BLANK}])?$"
"""A name for terminals: visible characters, with blanks only inside."""
