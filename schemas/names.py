"""Names that become part of a NATS subject: nothing in them can end a token, a subject or a line of NATS's protocol."""

from __future__ import annotations

from typing import Annotated

from pydantic import StringConstraints

Token = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,200}$")]
"""One token of a subject: the name of a worker, the id of a job."""
Subject = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*$", max_length=500)]
"""A whole subject without wildcards."""
